"""Data that is an async context manager is told its position before it is entered, where its producers start."""

from typing import Self

from aengine import Engine


class Rollouts:
    def __init__(self) -> None:
        self.position = 0
        self.told: list[str] = []

    async def __aenter__(self) -> Self:
        self.told.append("entered")
        return self

    async def __aexit__(self, *error: object) -> None: ...

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> int:
        self.position += 1
        return self.position

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.told.append("loaded")
        self.position = state["position"]


async def main() -> None:
    first = Engine(lambda engine, batch: batch)
    await first.run(Rollouts(), max_iters=3)
    second, data = Engine(lambda engine, batch: batch), Rollouts()
    second.load_state_dict(first.state_dict())
    state = await second.run(data, max_iters=5)
    assert data.told == ["loaded", "entered"]
    assert state.output == 5
