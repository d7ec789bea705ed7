"""Data whose __len__ raises NotImplementedError has an unknown length, as with TypeError."""

from collections.abc import Iterator

from aengine import Engine


class Stream:
    def __iter__(self) -> Iterator[int]:
        return iter(range(5))

    def __len__(self) -> int:
        raise NotImplementedError("how many there are shows at the end")


def main() -> None:
    seen: list[int] = []
    Engine(lambda engine, batch: seen.append(batch)).run_sync(Stream(), max_epochs=2)
    assert seen == [*range(5)] * 2
