"""A state that lies past its own limit is refused."""

import pytest

from aengine import Engine


def main() -> None:
    engine = Engine(lambda engine, batch: batch)
    with pytest.raises(ValueError, match="epoch"):
        engine.load_state_dict({"epoch": 5, "max_epochs": 3, "epoch_length": 10})
