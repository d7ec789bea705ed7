"""Checkpoints that survive, and runs that resume exactly.

from aengine.checkpoint import Checkpoint, Keep

checkpoint = Checkpoint("checkpoints", {"model": model, "optimizer": optimizer}, keep=Keep(last=3))
checkpoint.attach(trainer, Events.ITERATION_COMPLETED(every=500))
await checkpoint.restore(trainer)
await trainer.run(loader, max_epochs=10)

What needs torch is loaded when it is first asked for: `python -m aengine checkpoints` reads a directory without.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from aengine.checkpoint.store.manifest import CheckpointInfo
from aengine.checkpoint.store.retention import Keep

if TYPE_CHECKING:
    from aengine.checkpoint.capture.randomness import RandomStates
    from aengine.checkpoint.capture.trainable import trainable
    from aengine.checkpoint.checkpoint import Checkpoint
    from aengine.checkpoint.events import CheckpointCommitted, CheckpointEvents
    from aengine.checkpoint.formats.serializers import Serializer, TorchFile
else:  # out of sight of type checkers, which would take any name for one of this module's

    def __getattr__(name: str) -> object:
        if name not in _WITH_TORCH:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"{__name__}.{_WITH_TORCH[name]}"), name)
        return value


__all__ = [
    "Checkpoint",
    "CheckpointCommitted",
    "CheckpointEvents",
    "CheckpointInfo",
    "Keep",
    "RandomStates",
    "Serializer",
    "TorchFile",
    "trainable",
]

_WITH_TORCH = {
    "Checkpoint": "checkpoint",
    "CheckpointCommitted": "events",
    "CheckpointEvents": "events",
    "RandomStates": "capture.randomness",
    "Serializer": "formats.serializers",
    "TorchFile": "formats.serializers",
    "trainable": "capture.trainable",
}
