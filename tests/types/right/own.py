"""What users write around engines: services, classes that hold one, functions that take any."""

from collections.abc import Callable
from typing import Any, TypeVar

import anyio

from aengine import Engine, EngineStatistics, ErrorInfo, Event, Events, RemovableEventHandle, Service, State, StopReason

Batch = TypeVar("Batch")
Output = TypeVar("Output")


class Heartbeat(Service):
    async def serve(self, engine: Engine) -> None:
        while True:
            print(engine.state.iteration)
            await anyio.sleep(1)

    async def run_ended(self, engine: Engine, reason: StopReason, error: BaseException | None) -> None:
        print(engine.name, reason, error)


class Counting:
    """A handler with a state, to be attached."""

    def __init__(self) -> None:
        self.count = 0

    def attach(self, engine: Engine) -> RemovableEventHandle:
        return engine.add_event_handler(Events.ITERATION_COMPLETED, self._count)

    def _count(self, engine: Engine) -> None:
        self.count += 1
        engine.state.metrics["count"] = self.count

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


class Job:
    def __init__(self, step: Callable[[Engine, int], float]) -> None:
        self.engine: Engine[int, float] = Engine(step, name="job")
        self.error: ErrorInfo | None = None

    async def run(self) -> float:
        state = await self.engine.run([1, 2, 3])
        self.error = state.error
        return state.output


def engine_of(step: Callable[[Engine, Batch], Output]) -> Engine[Batch, Output]:
    return Engine(step)


def timed(engine: Engine[Any, Any]) -> EngineStatistics:
    return engine.statistics()


def double(engine: Engine, batch: int) -> int:
    return 2 * batch


trainer = engine_of(double)
trainer.add_service(Heartbeat(), on_error="log", name="heartbeat")
Counting().attach(trainer)
trainer.state.custom = {"anything": 1}
print(trainer.state.custom["anything"], trainer.state.epoch + trainer.state.iterations_completed)
saved = trainer.state_dict()
trainer.load_state_dict(saved, restart_if_done=True)
trainer.state = State(iteration=3)
if trainer.fire_event_soon(Events.STARTED, {"why": "now"}) and trainer.terminate():
    trainer.interrupt()
print(timed(trainer).total, trainer.is_running, trainer.should_terminate)


def last_of(events: list[Event]) -> Event:
    return events[-1]


def outputs(events: list[Event[float]]) -> float:
    return sum(event.output for event in events)
