"""A serializer that kills its process in the middle of a write, as the kernel does when memory runs out."""

import os
import signal
from pathlib import Path
from typing import Any, BinaryIO

from aengine.checkpoint import TorchFile


class CrashingSerializer(TorchFile):
    """Writes as TorchFile does, and once the file `trigger` exists kills the process that writes."""

    def __init__(self, trigger: Path) -> None:
        self._trigger = trigger

    def write(self, tree: Any, file: BinaryIO) -> None:
        super().write(tree, file)
        if self._trigger.exists():
            os.kill(os.getpid(), signal.SIGKILL)
