"""Two pictures of a run of the quickstart: its loss and accuracy, and where its time went.

    python examples/learning_curve.py [--out FOLDER]

It runs `quickstart.py` with a log of every loss (FOLDER/losses.jsonl) and samples of the statistics. When the run is
over, a thread draws FOLDER/learning_curve.png and FOLDER/timeline.png. The losses are the same in every run; the times
are not.
"""

import argparse
from pathlib import Path

if __name__ == "__main__":  # before the other imports: --help is not to wait for torch
    parser = argparse.ArgumentParser(
        description="Run the quickstart, and draw its learning curve and where its time went."
    )
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the pictures (default: here)")
    arguments = parser.parse_args()

import anyio
from anyio.to_thread import run_sync as in_thread
from quickstart import accuracies, main, trainer

from aengine import Events
from aengine.handlers import Timeline
from aengine.loggers import JSONLines, Tracker
from aengine.plots import Curve, plot_learning_curve, plot_timeline, read_curve


def draw(out: Path, timeline: Timeline) -> None:
    loss = read_curve(out / "losses.jsonl", "loss")
    length = len(loss.steps) // len(accuracies)
    accuracy = Curve([length * epoch for epoch in range(1, len(accuracies) + 1)], accuracies, "accuracy")
    plot_learning_curve(loss, accuracy).save(out / "learning_curve.png")
    plot_timeline(timeline).save(out / "timeline.png")


async def train_and_draw(out: Path) -> None:
    await anyio.Path(out / "losses.jsonl").unlink(missing_ok=True)
    Tracker(JSONLines(out / "losses.jsonl"), values=lambda engine: {"loss": engine.state.output}).attach(
        trainer, Events.ITERATION_COMPLETED
    )
    timeline = Timeline()
    timeline.attach(trainer)
    await main(out)
    await in_thread(draw, out, timeline)
    print(f"pictures in {out / 'learning_curve.png'} and {out / 'timeline.png'}")


if __name__ == "__main__":
    anyio.run(train_and_draw, arguments.out)
