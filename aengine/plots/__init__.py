"""Pictures of a run, drawn after it or meanwhile, without pyplot (extra `plots`).

from aengine.plots import plot_learning_curve, plot_timeline, read_curve

plot_timeline(timeline).save("timeline.png")
plot_learning_curve(read_curve("log.jsonl", "loss"), read_curve("log.jsonl", "accuracy")).save("learning_curve.png")
"""

from typing import TYPE_CHECKING

from aengine.lazy import lazy_names

if TYPE_CHECKING:
    from aengine.plots.curve import Curve, read_curve
    from aengine.plots.picture import Picture, plot_learning_curve, plot_timeline
else:  # out of sight of type checkers, which would take any name for one of this module's
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "curve": "Curve read_curve",
            "picture": "Picture plot_learning_curve plot_timeline",
        },
    )

__all__ = [
    "Curve",
    "Picture",
    "plot_learning_curve",
    "plot_timeline",
    "read_curve",
]
