"""Checkpoints that survive, and runs that resume exactly.

from aengine.checkpoint import Checkpoint, Keep

checkpoint = Checkpoint("checkpoints", {"model": model, "optimizer": optimizer}, keep=Keep(last=3))
checkpoint.attach(trainer, Events.ITERATION_COMPLETED(every=500))
await checkpoint.restore(trainer)
await trainer.run(loader, max_epochs=10)
"""

from aengine.checkpoint.handler import Checkpoint, CheckpointEvents
from aengine.checkpoint.keep import Keep
from aengine.checkpoint.manifest import CheckpointInfo
from aengine.checkpoint.randomness import RandomStates
from aengine.checkpoint.serializers import Serializer, TorchFile

__all__ = ["Checkpoint", "CheckpointEvents", "CheckpointInfo", "Keep", "RandomStates", "Serializer", "TorchFile"]
