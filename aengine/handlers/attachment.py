"""Attachment: what keeps something of a run serves one engine, once: two would mix what is kept, in silence."""

from typing import Any

from aengine.engine import Engine


class Attachment:
    """The engine that an object is attached to, None at first.

    Without this, the evaluator's STARTED would have a NanGuard forget what the trainer's outputs were, and a TimeLimit
    begin again.
    """

    def __init__(self) -> None:
        self._engine_name: str | None = None

    def begin(self, what: object, engine: Engine[Any, Any], advice: str = "") -> None:
        """Take note of the engine. Call it before anything is added to that.

        Args:
            what: the object that is being attached.
            engine: to which it is.
            advice: what else than another object may be wanted.

        Raises:
            RuntimeError: the object is attached already, to this engine or another one.
        """
        if self._engine_name is not None:
            raise RuntimeError(
                f"this {type(what).__qualname__} is attached to engine {self._engine_name!r} already, and keeps what it"
                f" sees there: make another one{advice}"
            )
        self._engine_name = engine.name

    def end(self) -> None:
        """It is attached no more, and may be again."""
        self._engine_name = None
