"""Two pictures of the quickstart's run: how it learned, and where its time went.

    python examples/learning_curve.py [--out FOLDER]

It runs `quickstart.py` with three things more beside the step: a log of every loss (FOLDER/losses.jsonl), samples of
the statistics, and, when the run is over, a thread that draws FOLDER/learning_curve.png and FOLDER/timeline.png. The
losses are the same in every run; the time is not.
"""

import argparse

import anyio
from anyio.to_thread import run_sync as in_thread
from quickstart import accuracies, main, trainer

from aengine import Events
from aengine.handlers import picture
from aengine.handlers.timeline import Timeline
from aengine.loggers.jsonl import JSONLines
from aengine.loggers.tracker import track


def draw(out: anyio.Path, timeline: Timeline) -> None:
    loss = picture.read(out / "losses.jsonl", "loss")
    length = len(loss.steps) // len(accuracies)
    accuracy = picture.Curve([length * epoch for epoch in range(1, len(accuracies) + 1)], accuracies, "accuracy")
    picture.learning_curve(loss, accuracy).save(out / "learning_curve.png")
    picture.timeline(timeline).save(out / "timeline.png")


async def train_and_draw(out: anyio.Path) -> None:
    await (out / "losses.jsonl").unlink(missing_ok=True)
    track(
        trainer,
        JSONLines(out / "losses.jsonl"),
        Events.ITERATION_COMPLETED,
        values=lambda engine: {"loss": engine.state.output},
    )
    timeline = Timeline(trainer)
    await main(out)
    await in_thread(draw, out, timeline)
    print(f"pictures in {out / 'learning_curve.png'} and {out / 'timeline.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw pictures of the quickstart's run.")
    parser.add_argument("--out", type=anyio.Path, default=anyio.Path(), help="where they go (default: here)")
    anyio.run(train_and_draw, parser.parse_args().out)
