"""The reinforcement learning example: its losses are those of a plain loop, and its environments are always closed."""

import importlib.util
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import anyio
import gymnasium
import pytest
import torch
from support.record import Boom

from aengine import Engine, Events, StopReason

EXAMPLE = Path(__file__).parents[2] / "examples" / "cartpole.py"
BATCHES = 5


def load() -> ModuleType:
    """Return the example anew, with its networks as they are at the beginning."""
    spec = importlib.util.spec_from_file_location("cartpole", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.LATENCY, module.LENGTH = 0, 16
    return module  # type: ignore[no-any-return]


@pytest.fixture
def environments(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Every environment that is made, as it says whether it was closed."""
    made: list[Watched] = []
    make = gymnasium.make

    def make_watched(name: str) -> Watched:
        made.append(Watched(make(name)))
        return made[-1]

    monkeypatch.setattr(gymnasium, "make", make_watched)
    yield made
    for one in made:
        one.close()


class Watched(gymnasium.Wrapper[Any, Any, Any, Any]):
    steps = 0
    is_closed = False
    breaks_at = -1

    def step(self, action: Any) -> Any:
        self.steps += 1
        if self.steps == self.breaks_at:
            raise Boom("environment")
        return super().step(action)

    def close(self) -> None:
        self.is_closed = True
        super().close()


def plain_loop() -> list[float]:
    """The same by hand: no engine, no copy of the policy, no event loop."""
    example: Any = load()
    environments = [gymnasium.make("CartPole-v1") for _ in range(example.ENVIRONMENTS)]
    chances_of = [Random(number) for number in range(example.ENVIRONMENTS)]
    seen = [torch.from_numpy(one.reset(seed=number)[0]) for number, one in enumerate(environments)]
    losses = []
    for _ in range(BATCHES):
        rollouts = []
        for number, environment in enumerate(environments):
            rows = []
            for _ in range(example.LENGTH):
                with torch.no_grad():
                    chances = torch.log_softmax(example.policy(seen[number]), -1)
                action = 1 if chances_of[number].random() < float(chances[1].exp()) else 0
                array, _, fell, is_late, _ = environment.step(action)
                then = torch.from_numpy(array)
                flags = torch.tensor(fell), torch.tensor(fell or is_late)
                rows.append((seen[number], torch.tensor(action), chances[action], then, *flags))
                seen[number] = torch.from_numpy(environment.reset()[0]) if fell or is_late else then
            columns = [torch.stack(column) for column in zip(*rows, strict=True)]
            rollouts.append(example.Rollout(example.Experience(*columns), [], 0))
        losses.append(example.train_step(None, rollouts))
    for environment in environments:
        environment.close()
    return losses


@pytest.mark.parametrize("thread", [True, False], ids=["worker", "loop"])
async def test_losses_equal_those_of_the_plain_loop(thread: bool) -> None:  # noqa: FBT001 -- pytest passes it by name
    expected = plain_loop()
    example: Any = load()
    trainer = example.make_trainer(thread=thread)
    losses: list[float] = []
    stale: list[int] = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output))
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: stale.append(engine.state.metrics["staleness"])
    )
    await trainer.run(partial(example.in_turn, trainer, 0), max_iters=BATCHES)
    assert losses == expected
    assert len(set(losses)) == BATCHES
    assert stale == [0] * BATCHES


WAYS_OUT = ["completed", "terminated", "cancelled", "step fails", "environment fails"]


@pytest.mark.parametrize("way_out", WAYS_OUT)
@pytest.mark.parametrize("is_in_turn", [False, True], ids=["concurrently", "in turn"])
async def test_environments_are_closed(environments: list[Watched], way_out: str, is_in_turn: bool) -> None:  # noqa: FBT001 -- pytest passes it by name
    example: Any = load()
    trainer: Engine[Any, float] = example.make_trainer()
    data = partial(example.in_turn, trainer, 0) if is_in_turn else example.concurrently(0)
    scope = anyio.CancelScope()

    @trainer.on(Events.ITERATION_COMPLETED(once=2))
    async def leave(engine: Engine[Any, float]) -> None:
        assert not any(one.is_closed for one in environments)
        if way_out == "terminated":
            engine.terminate()
        elif way_out == "cancelled":
            scope.cancel()
        elif way_out == "step fails":
            raise Boom("step")
        elif way_out == "environment fails":
            environments[3].breaks_at = environments[3].steps + 1

    with scope:
        if way_out.endswith("fails"):
            with pytest.raises(Boom, match=way_out.split(maxsplit=1)[0]):
                await trainer.run(data, max_iters=100)
        else:
            await trainer.run(data, max_iters=2 if way_out == "completed" else 100)
    assert trainer.state.stop_reason is not None
    expected = StopReason.FAILED if way_out.endswith("fails") else StopReason(way_out)
    assert trainer.state.stop_reason is expected
    assert len(environments) == example.ENVIRONMENTS
    assert all(one.is_closed for one in environments)


async def test_player_that_is_ahead_of_the_learner_waits(environments: list[Watched]) -> None:
    example: Any = load()
    trainer: Engine[Any, float] = example.make_trainer()

    @trainer.on(Events.ITERATION_COMPLETED(once=3))
    async def wait(engine: Engine[Any, float]) -> None:
        await anyio.wait_all_tasks_blocked()
        # What was handed over, and a rollout in the hand of each.
        assert sum(one.steps for one in environments) == (3 + 1) * example.ENVIRONMENTS * example.LENGTH

    await trainer.run(example.concurrently(0), max_iters=4)


async def test_rollouts_say_how_stale_they_are(environments: list[Watched]) -> None:
    """The players had all played on before the first policy was published: what comes next is one version behind."""
    example: Any = load()
    trainer: Engine[Any, float] = example.make_trainer()
    stale: list[int] = []

    @trainer.on(Events.ITERATION_COMPLETED)
    async def note(engine: Engine[Any, float]) -> None:
        stale.append(engine.state.metrics["staleness"])
        await anyio.wait_all_tasks_blocked()

    await trainer.run(example.concurrently(0), max_iters=4)
    assert stale == [0, 1, 1, 1]
