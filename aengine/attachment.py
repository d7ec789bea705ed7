"""Attachment: what an object has added to the one engine that it serves, added as a whole and removed as a whole."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any
from weakref import ref

from aengine.bus.emitter import RemovableEventHandle
from aengine.engine import Engine


class Attachment:
    """The engine that an object is attached to, none at first: one object serves one engine, once.

    Without this, the evaluator's STARTED would have a NanGuard forget what the trainer's outputs were, and a TimeLimit
    begin again. The engine is kept weakly, and no handle is: that would be a cycle, and the engine be freed later.

    Args:
        what: the object; its class is what messages name.
        takes_several: it may be attached to its own engine more than once, for further events.
    """

    def __init__(self, what: object, *, takes_several: bool = False) -> None:
        self._what = type(what).__qualname__
        self._takes_several = takes_several
        self._engine_name: str | None = None
        self._engine: Callable[[], Engine[Any, Any] | None] = lambda: None
        self._count = 0

    @property
    def engine(self) -> Engine[Any, Any] | None:
        """The engine that the object is attached to; None if there is none, or it is gone."""
        return None if self._engine_name is None else self._engine()

    def begin(
        self, engine: Engine[Any, Any], handles: Iterable[RemovableEventHandle], advice: str = ""
    ) -> RemovableEventHandle:
        """Add what the object needs to an engine, and return what removes it all again, in reverse order.

        Args:
            engine: to which it is attached.
            handles: adds one thing after the other, and yields what removes it: a generator. It is advanced when the
                engine is known to be the only one. If it raises, what it has added so far is removed.
            advice: what else than another object may be wanted: "; event= takes several, joined by |".

        Raises:
            TypeError: this is no engine.
            RuntimeError: the object is attached already: to another engine, or to this one and may be so only once.
        """
        check_engine(engine, f"{self._what}.attach(engine)")
        if self._engine_name is not None and not (self._takes_several and self._engine() is engine):
            raise RuntimeError(
                f"this {self._what} is attached to engine {self._engine_name!r} already: make another one, or remove()"
                f" what attach() returned{advice}"
            )
        self._engine_name, self._engine = engine.name, ref(engine)
        self._count += 1
        with ExitStack() as added:
            added.callback(self._end)
            for handle in handles:
                added.callback(handle.remove)
            return RemovableEventHandle(added.pop_all().close)

    def _end(self) -> None:
        self._count -= 1
        if not self._count:
            self._engine_name = None


def check_engine(engine: Any, call: str) -> None:
    """Raise TypeError unless this is an engine.

    Args:
        engine: what the user gave.
        call: how the user writes the call: "EarlyStopping.attach(trainer, evaluator=evaluator)".
    """
    if not isinstance(engine, Engine):
        kind = type(engine)
        ignites = kind.__module__.partition(".")[0] == "ignite"
        other = ", which is pytorch-ignite's" if ignites else f", of the class {kind.__qualname__}"
        raise TypeError(f"{call} takes an Engine of aengine's first, got {engine!r}{other}")
