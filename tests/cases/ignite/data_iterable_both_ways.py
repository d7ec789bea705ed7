"""Data that can be iterated both ways and has a length is iterated the plain way by run_sync."""

from unittest.mock import MagicMock

from aengine import Engine


def main() -> None:
    loader = MagicMock()
    loader.__iter__.side_effect = lambda: iter([1, 2, 3])
    loader.__len__.return_value = 3
    assert Engine(lambda engine, batch: batch).run_sync(loader).iteration == 3
