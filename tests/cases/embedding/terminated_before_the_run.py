"""terminate() of an engine that does not run yet says that no run heard it."""

from aengine import Engine


def main() -> None:
    engine = Engine(lambda engine, batch: None)
    assert engine.terminate() is False
    assert engine.should_terminate
