"""A step awaits a future that other code cancels, while nothing cancels the run: the run's task group learns of it."""

import asyncio

from aengine import Engine, StrayCancellation


async def step(engine: Engine, batch: int) -> int:
    answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    if batch == 3:
        answer.cancel()  # a pool that is closed, a request that is given up
    else:
        answer.set_result(batch)
    return await answer


async def main() -> None:
    engine = Engine(step)
    told: tuple[BaseException, ...] = ()
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(engine.run(range(10)))
    except* StrayCancellation as group:
        told = group.exceptions
    assert told, f"the group ended as if all was well, after iteration {engine.state.iteration} of 10"
