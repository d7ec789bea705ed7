"""Ready-made handlers, one file each. All are attached alike: `EarlyStopping(...).attach(trainer)`."""

from typing import TYPE_CHECKING

from aengine.lazy import lazy_names

if TYPE_CHECKING:
    from aengine.handlers.early_stopping import EarlyStopping
    from aengine.handlers.nan_guard import NanGuard
    from aengine.handlers.profiling import Profiler
    from aengine.handlers.progress import Bar, Display, ProgressBar
    from aengine.handlers.progress_rich import RichBars
    from aengine.handlers.progress_tqdm import TqdmBars
    from aengine.handlers.report import format_statistics
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
            "profiling": "Profiler",
            "progress": "Bar Display ProgressBar",
            "progress_rich": "RichBars",
            "progress_tqdm": "TqdmBars",
            "report": "format_statistics",
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
    "Profiler",
    "ProgressBar",
    "RichBars",
    "SystemEvents",
    "SystemStatistics",
    "TimeLimit",
    "Timeline",
    "Timer",
    "TqdmBars",
    "format_statistics",
]
