"""Ends: what is raised inside the loop where the run, or its epoch, is to end."""

from aengine.state import StopReason


class Terminated(Exception):
    """The run is to end here."""

    def __init__(self, reason: StopReason) -> None:
        self.reason = reason


class EpochTerminated(Exception):
    """The epoch is to end here."""
