"""Events of the whole package: an engine may have all of them, and a user's own beside them."""

from collections import Counter
from importlib import import_module
from pathlib import Path

import aengine
from aengine import Engine, EventEnum


def test_names_of_events_are_unique_over_the_package() -> None:
    folder = Path(aengine.__file__).parent
    for path in folder.rglob("*.py"):
        if "EventEnum)" in path.read_text(encoding="utf-8"):
            import_module(".".join(("aengine", *path.relative_to(folder).with_suffix("").parts)))
    kinds = [kind for kind in EventEnum.__subclasses__() if kind.__module__.startswith("aengine.")]
    assert len(kinds) > 5
    names = Counter(event.name for kind in kinds for event in kind)
    assert [name for name, count in names.items() if count > 1] == []
    engine: Engine[int, None] = Engine(lambda _, __: None)
    for kind in kinds:
        engine.register_events(*kind)
    for kind in kinds:  # a name says whose it is, so that a user's own event has another one
        own = {"CHECKPOINT", "GRADIENTS", "OPENTELEMETRY", "OPTIMIZER", "PROFILER", "SYSTEM"}
        assert kind.__name__ == "Events" or all(event.name.partition("_")[0] in own for event in kind)
