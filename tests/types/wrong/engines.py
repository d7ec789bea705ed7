"""What is wrong of steps, data and outputs: each line says by which rule mypy, and by which pyright, refuses it."""

from collections.abc import AsyncIterator

from aengine import Data, Engine, State


def step(engine: Engine, batch: int) -> float:
    return batch / 2


async def async_step(engine: Engine, batch: int) -> float:
    return batch / 2


def takes_three(engine: Engine, batch: int, more: int) -> float:
    return batch + more


async def words() -> AsyncIterator[str]:
    yield "a"


trainer = Engine(step)
async_trainer = Engine(async_step)

trainer.run_sync(["a"])  # error: list-item, reportArgumentType
trainer.run_sync("abc")  # error: arg-type, reportArgumentType
trainer.run_sync(3)  # error: arg-type, reportArgumentType
trainer.run_sync(words)  # error: arg-type, reportArgumentType
trainer.run_sync(words())  # error: arg-type, reportArgumentType
trainer.set_data(["a"])  # error: list-item, reportArgumentType
trainer.iterate(["a"])  # error: list-item, reportArgumentType
trainer.run_sync([1], "2")  # error: arg-type, reportArgumentType
trainer.run_sync([1], prefetch=None)  # error: arg-type, reportArgumentType
trainer.run_sync([1], 1, None, None, 2)  # error: call-arg, reportCallIssue
trainer.run_sync([1]).output.upper()  # error: union-attr, reportAttributeAccessIssue
async_trainer.run_sync([1]).output.upper()  # error: union-attr, reportAttributeAccessIssue
trainer.state.output.upper()  # error: union-attr, reportAttributeAccessIssue
trainer.state = 3  # error: assignment, reportAttributeAccessIssue
trainer.stat = 3  # error: attr-defined, reportAttributeAccessIssue
trainer.stateful_listeners()  # error: attr-defined, reportAttributeAccessIssue
trainer.load_state_dict({}, True)  # error: call-arg, reportCallIssue
Engine(takes_three)  # error: arg-type, reportArgumentType, reportCallIssue
Engine(3)  # error: call-overload, reportArgumentType, reportCallIssue
Engine(step, "name")  # error: call-overload, reportCallIssue
Engine(step, thread="worker")  # error: call-overload, reportArgumentType, reportCallIssue
words_engine: Engine[str, float] = Engine(step)  # error: arg-type, reportAssignmentType
text_engine: Engine[int, str] = Engine(async_step)  # error: arg-type, reportAssignmentType
state: State[int, str] = trainer.run_sync([1])  # error: assignment, reportAssignmentType


async def train(data: Data[str]) -> None:
    await trainer.run(data)  # error: arg-type, reportArgumentType
