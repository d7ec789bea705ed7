"""Plain data is closed in the thread in which it is iterated, with prefetch= and without: sqlite3 allows no other."""

import sqlite3
from collections.abc import Iterator

from aengine import Engine

COUNT = "WITH RECURSIVE n(x) AS (SELECT 0 UNION ALL SELECT x + 1 FROM n) SELECT x FROM n"


class Rows:
    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[int]:
        connection = sqlite3.connect(":memory:")
        try:
            for (row,) in connection.execute(COUNT):
                yield row
        finally:
            connection.close()


async def main() -> None:
    for prefetch in (0, 2):
        state = await Engine(lambda engine, batch: batch).run(Rows(), 2, prefetch=prefetch)
        assert state.iteration == 16
