"""Ready-made handlers, one file each."""

from typing import TYPE_CHECKING

from aengine.lazy import lazy_names

if TYPE_CHECKING:
    from aengine.handlers.early_stopping import EarlyStopping
    from aengine.handlers.nan_guard import NanGuard
    from aengine.handlers.profiling import profile
    from aengine.handlers.progress import Bar, Display, show_progress
    from aengine.handlers.progress_rich import RichBars
    from aengine.handlers.progress_tqdm import TqdmBars
    from aengine.handlers.report import table
    from aengine.handlers.system import SystemEvents, SystemStatistics
    from aengine.handlers.time_limit import Deadline, TimeLimit
    from aengine.handlers.timeline import Timeline
    from aengine.handlers.timer import Timer
else:  # out of sight of type checkers, which would take any name for one of this module's
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "early_stopping": "EarlyStopping",
            "nan_guard": "NanGuard",
            "profiling": "profile",
            "progress": "Bar Display show_progress",
            "progress_rich": "RichBars",
            "progress_tqdm": "TqdmBars",
            "report": "table",
            "system": "SystemEvents SystemStatistics",
            "time_limit": "Deadline TimeLimit",
            "timeline": "Timeline",
            "timer": "Timer",
        },
    )

__all__ = [
    "Bar",
    "Deadline",
    "Display",
    "EarlyStopping",
    "NanGuard",
    "RichBars",
    "SystemEvents",
    "SystemStatistics",
    "TimeLimit",
    "Timeline",
    "Timer",
    "TqdmBars",
    "profile",
    "show_progress",
    "table",
]
