"""Checkpoints that survive, and runs that resume exactly.

from aengine.checkpoint import Checkpoint, Keep

async with Checkpoint("checkpoints", {"model": model, "optimizer": optimizer}, keep=Keep(last=3)) as checkpoint:
    checkpoint.attach(trainer, Events.ITERATION_COMPLETED(every=500))
    await checkpoint.restore()
    await trainer.run(loader, max_epochs=10)

What needs torch is loaded when it is first asked for: `aengine checkpoints` reads a directory without.
"""

from typing import TYPE_CHECKING

from aengine.lazy import lazy_names

if TYPE_CHECKING:
    from aengine.checkpoint.capture.trainable import trainable
    from aengine.checkpoint.checkpoint import Checkpoint
    from aengine.checkpoint.events import CheckpointCommitted, CheckpointEvents, CheckpointStatistics
    from aengine.checkpoint.formats.serializers import Serializer, TorchFile
    from aengine.checkpoint.store.manifest import CheckpointInfo
    from aengine.checkpoint.store.retention import Keep
else:  # out of sight of type checkers, which would take any name for one of this module's
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "capture.trainable": "trainable",
            "checkpoint": "Checkpoint",
            "events": "CheckpointCommitted CheckpointEvents CheckpointStatistics",
            "formats.serializers": "Serializer TorchFile",
            "store.manifest": "CheckpointInfo",
            "store.retention": "Keep",
        },
    )

__all__ = [
    "Checkpoint",
    "CheckpointCommitted",
    "CheckpointEvents",
    "CheckpointInfo",
    "CheckpointStatistics",
    "Keep",
    "Serializer",
    "TorchFile",
    "trainable",
]
