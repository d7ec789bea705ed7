"""Two events of one name would be one: the second is refused where it is registered."""

import pytest

from aengine import Engine, EventEnum


class Sensor(EventEnum):
    SAMPLED = "sensor sampled"


class Other(EventEnum):
    SAMPLED = "other sampled"


def main() -> None:
    engine = Engine(lambda engine, batch: None)
    engine.register_events(*Sensor)
    with pytest.raises(ValueError, match="SAMPLED"):
        engine.register_events(*Other)
