"""One NanGuard on two engines is refused: what the second does would hide the NaN of the first."""

import math

import pytest

from aengine import Engine
from aengine.handlers import NanGuard


def main() -> None:
    trainer = Engine(lambda engine, batch: math.nan if engine.state.iteration == 3 else 0.0, name="trainer")
    evaluator = Engine(lambda engine, batch: 0.0, name="evaluator")
    guard = NanGuard(every=20)
    guard.attach(trainer)
    with pytest.raises(RuntimeError, match="make another one"):
        guard.attach(evaluator)
    with pytest.raises(FloatingPointError, match="iteration 3"):
        trainer.run_sync(range(18))
