"""pytorch-ignite's own metrics, handlers and loggers on our engine, unmodified.

from ignite.handlers import EarlyStopping, ProgressBar
from ignite.metrics import Accuracy
from aengine.interop.ignite import as_ignite

Accuracy().attach(evaluator, "accuracy")                   # as it is: it asks for methods and events
ProgressBar().attach(as_ignite(trainer))                   # it looks into the engine
evaluator.add_event_handler(Events.COMPLETED, EarlyStopping(3, score, as_ignite(trainer)))  # it asks for the type

Most of them attach to our engine as it is: all metrics with all their usages, Checkpoint, ModelCheckpoint, the
schedulers of parameters and of the state, EMAHandler, FastaiLRFinder, Timer, TerminateOnNan, TimeLimit,
EpochOutputStore, TensorboardLogger and its kin. Through `as_ignite` attach EarlyStopping (its trainer), ProgressBar,
BasicTimeProfiler, HandlersTimeProfiler, and what `setup_tb_logging` and its kin take as their one evaluator.

Order is ours, which is ignite's: inline, in order of registration, where the step runs, before the loop goes on. What
cannot work or is different, and what says so:

- The launcher of `ignite.distributed` calls plain functions, and awaits nothing: have the function call `anyio.run` or
  `run_sync`. Metrics over its processes are those of all the data, as they are there.
- The inside of ignite's engine, but for `_event_handlers` and `_allowed_events`: an AttributeError says so.
- `run` of the view blocks, as that of ignite's engine does, and refuses where an event loop runs: there, write
  `await engine.run(data)`, of the engine itself.
- Loggers attach to ignite's own events only: they look in a table of ignite's State class, which is not ours to change,
  and raise "Unknown event name". For an event of one's own, `engine.add_event_handler(event, log_handler, logger,
  event)` is what their `attach` does.
- HandlersTimeProfiler times an async handler up to its first await, and a filtered one only when it is called.
- Our Checkpoint saves what has state among the handlers of its engine. ignite 0.5.5 itself cannot save IoU, mIoU and
  DiceCoefficient (a TypeError of theirs fails the run), nor load, in mid-epoch, EpochMetric and what is made of it, as
  ROC_AUC and AveragePrecision (a CheckpointMismatch names it): attach these to an evaluator.
- Its metrics begin anew at EPOCH_STARTED, which is fired for the rest of a resumed epoch too: see `ResumableEpochWise`.
- Handlers of EXCEPTION_RAISED observe, ignite's too: the error is raised all the same.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias, TypeVar, cast, overload

from aengine.bus.bus import Bus
from aengine.bus.emitter import RemovableEventHandle
from aengine.bus.listeners import InlineHandler
from aengine.bus.topic import Topic
from aengine.callables import bind_handler
from aengine.engine import Engine
from aengine.events import AnyEvent, Selector, event_name, selectors

try:
    import ignite.engine
    import ignite.metrics.metric
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "aengine.interop.ignite attaches pytorch-ignite's metrics and handlers, and it is not installed: "
        'pip install "pytorch-ignite>=0.5", which is what aengine\'s extra "ignite" brings'
    ) from error

Handler = TypeVar("Handler", bound=Callable[..., Any])
Entry: TypeAlias = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
"""A handler as ignite keeps it: what is called, and with what."""


def as_ignite(engine: Engine[Any, Any] | ignite.engine.Engine) -> ignite.engine.Engine:
    """Return our engine, seen as one of ignite's: for what asks for that type, or looks into it.

    It is a view, and keeps nothing of its own: the state is the very same, and what is attached through it runs in our
    engine, in our order, and is given the view. Two views of one engine are equal. What is a view already, or ignite's
    own engine, is returned as it is.

    ignite's `RemovableEventHandle`, which its loggers return for several events at once, holds the view weakly: keep
    the view for as long as the handle.

    Raises:
        TypeError: this is no engine.
    """
    if isinstance(engine, ignite.engine.Engine):
        return engine
    if not isinstance(engine, Engine):  # pyright: ignore[reportUnnecessaryIsInstance]  # not everybody checks types
        raise TypeError(f"as_ignite() shows an aengine.Engine as one of pytorch-ignite's, got {engine!r}")
    return cast(ignite.engine.Engine, _View(engine))


class ResumableEpochWise(ignite.metrics.metric.MetricUsage):
    """Epoch by epoch, like ignite's EpochWise, but an epoch that is resumed in its middle goes on where it was.

        Accuracy().attach(trainer, "accuracy", usage=ResumableEpochWise())

    Our engine finishes the epoch under way when it is resumed, after `terminate()` or from a checkpoint, and fires
    EPOCH_STARTED for the rest of it. There EpochWise resets the metric, so that its result is that of the rest.
    """

    usage_name = "resumable_epoch_wise"

    def __init__(self) -> None:
        events = ignite.engine.Events
        super().__init__(
            started=cast(Any, events.EPOCH_STARTED(event_filter=_begins)),
            completed=events.EPOCH_COMPLETED,
            iteration_completed=events.ITERATION_COMPLETED,
        )


def _begins(engine: Any, event: int) -> bool:  # noqa: ARG001 -- a filter's signature, by name, as ignite checks it
    return bool(engine.state.iteration == engine.state.epoch_start)


class _View:
    """Looks like ignite's Engine, and does what ours does."""

    __slots__ = ("__weakref__", "_engine")

    _engine: Engine[Any, Any]

    def __init__(self, engine: Engine[Any, Any]) -> None:
        object.__setattr__(self, "_engine", engine)

    __class__: Any = property(lambda _: ignite.engine.Engine)  # what isinstance() asks for

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(
                f"{name!r} is inside of ignite's engine. as_ignite() shows, of its inside, _event_handlers and"
                " _allowed_events, and all that is public",
                name=name,
                obj=self,
            )
        return getattr(self._engine, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._engine, name, value)

    def __eq__(self, other: object) -> bool:
        return type(other) is _View and other._engine is self._engine

    def __hash__(self) -> int:
        return hash(self._engine)

    def __repr__(self) -> str:
        return f"<{self._engine!r} as pytorch-ignite's>"

    def run(
        self,
        data: Any = None,
        max_epochs: int | None = None,
        max_iters: int | None = None,
        epoch_length: int | None = None,
    ) -> Any:
        """Run as ignite's engine does: the caller waits. Raises RuntimeError where an event loop runs."""
        return self._engine.run_sync(data, max_epochs, max_iters, epoch_length)

    def on(self, event_name: AnyEvent, *args: Any, **kwargs: Any) -> Callable[[Handler], Handler]:
        """Return a decorator that adds an inline handler, which is given the view."""

        def add(handler: Handler) -> Handler:
            self.add_event_handler(event_name, handler, *args, **kwargs)
            return handler

        return add

    def add_event_handler(
        self, event_name: AnyEvent, handler: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> RemovableEventHandle:
        """Add an inline handler, which is given the view. Otherwise as `Engine.add_event_handler`."""
        if not self._engine.has_registered_events(event_name):
            return self._engine.add_event_handler(event_name, handler)  # refuses, and says what there is
        bus = _bus_of(self._engine)
        added: list[InlineHandler] = [
            _HandlerOfViews(selector, handler, args, kwargs) for selector in selectors(event_name)
        ]
        for one in added:
            topic = bus.topic(one.selector.name)
            topic.listen(one, bus.count_of(topic))
        return RemovableEventHandle(partial(bus.remove_these, added))

    @property
    def _allowed_events(self) -> list[Any]:
        """The events that can be listened to: ignite's in its order, then ours and the user's own."""
        theirs = list(ignite.engine.Events)
        return theirs + [event for event in _registered_with(self._engine) if event not in theirs]

    @property
    def _event_handlers(self) -> "_EventHandlers":
        return _EventHandlers(self._engine, self._allowed_events)


class _HandlerOfViews(InlineHandler):
    """An inline handler that is given a view of the engine."""

    __slots__ = ()

    def __init__(
        self, selector: Selector, handler: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        super().__init__(selector, handler, args, kwargs)
        call = self.call

        def call_with_view(engine: Any, *payload: Any) -> Any:
            return call(_View(engine), *payload)

        self.call = call_with_view


# The table of handlers, as ignite keeps it


class _EventHandlers(Mapping[Any, "_Handlers"]):
    """What ignite's profilers take for its engine's table of handlers."""

    def __init__(self, engine: Engine[Any, Any], events: list[Any]) -> None:
        self._engine = engine
        self._events = events

    def __getitem__(self, event: Any) -> "_Handlers":
        if event not in self._events:
            raise KeyError(event)
        return _Handlers(self._engine, cast(str, event_name(event)))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._events)

    def __len__(self) -> int:
        return len(self._events)


class _Handlers(Sequence[Entry]):
    """The inline handlers of one event, live: what changes here changes at once, in a dispatch under way too.

    A handler that is exchanged in its place keeps its filter, and is found and removed under its own name all the same.
    """

    def __init__(self, engine: Engine[Any, Any], name: str) -> None:
        self._topic: Topic = _bus_of(engine).topic(name)

    def __len__(self) -> int:
        return len(self._topic.inline)

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> list[Entry]: ...
    def __getitem__(self, index: int | slice) -> Entry | list[Entry]:
        entries = [_entry_of(one) for one in self._topic.inline]
        return entries[index]

    def __setitem__(self, index: int, entry: Entry) -> None:
        one = self._topic.inline[index]
        one.call = _Exchanged(entry, one.selector.name)
        self._topic.arrange(self._topic.inline)

    def insert(self, index: int, entry: Entry) -> None:
        inline = list(self._topic.inline)
        inline.insert(index, _HandlerOfViews(Selector(self._topic.name), *entry))
        self._topic.arrange(inline)

    def append(self, entry: Entry) -> None:
        self.insert(len(self), entry)


class _StandIn:
    """A handler of our engine, shown under its own name; called with the engine, it does what the handler does."""

    def __init__(self, one: InlineHandler) -> None:
        self._call = one.call
        self.result: Any = None
        self._handler = one.handler
        self.__qualname__ = getattr(one.handler, "__qualname__", type(one.handler).__name__)

    def __call__(self, *args: Any) -> None:
        self.result = self._call(*args)

    def __repr__(self) -> str:
        return repr(self._handler)


class _Exchanged:
    """What is called in the place of a handler: something around it, which drops what it returns, or something else."""

    def __init__(self, entry: Entry, name: str) -> None:
        self.entry = entry
        function, args, kwargs = entry
        inside = inspect.unwrap(function, stop=lambda one: isinstance(one, _StandIn))
        self._inside = inside if isinstance(inside, _StandIn) else None
        self._call = bind_handler(function, name, args, kwargs) if self._inside is None else function

    def __call__(self, engine: Any, *payload: Any) -> Any:
        result = self._call(engine, *payload)
        if self._inside is not None:  # what an async handler has given is yet to be awaited
            result, self._inside.result = self._inside.result, None
        return result


def _entry_of(one: InlineHandler) -> Entry:
    return one.call.entry if isinstance(one.call, _Exchanged) else (_StandIn(one), (), {})


# The one door into our engine


def _bus_of(engine: Engine[Any, Any]) -> Bus:
    return engine._bus  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  # order is nobody else's to change


def _registered_with(engine: Engine[Any, Any]) -> Iterable[Any]:
    return engine._emitter.registered.values()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  # likewise
