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
and what `setup_tb_logging` and its kin take as their one evaluator.

Order is ours, which is ignite's: inline, in order of registration, where the step runs, before the loop goes on. What
cannot work or is different, and what says so:

- The launcher of `ignite.distributed` calls plain functions, and awaits nothing: have the function call `anyio.run` or
  `run_sync`. Metrics over its processes are those of all the data, as they are there.
- HandlersTimeProfiler and BasicTimeProfiler exchange handlers in a table of ignite's engine while it runs: an
  AttributeError says to use `engine.statistics()` and `aengine.handlers.Profiler`.
- The inside of ignite's engine, but for `_allowed_events`: an AttributeError says so.
- `run` of the view blocks, as that of ignite's engine does, and refuses where an event loop runs: there, write
  `await engine.run(data)`, of the engine itself.
- Loggers attach to ignite's own events only: they look in a table of ignite's State class, which is not ours to change,
  and raise "Unknown event name". For an event of one's own, `engine.add_event_handler(event, log_handler, logger,
  event)` is what their `attach` does.
- Our Checkpoint saves what has state among the handlers of its engine. ignite 0.5.5 itself cannot save IoU, mIoU and
  DiceCoefficient (a TypeError of theirs fails the run), nor load, in mid-epoch, EpochMetric and what is made of it, as
  ROC_AUC and AveragePrecision (a CheckpointMismatch names it): attach these to an evaluator.
- Its metrics begin anew at EPOCH_STARTED, which is fired for the rest of a resumed epoch too: see `ResumableEpochWise`.
- Handlers of EXCEPTION_RAISED observe, ignite's too: the error is raised all the same.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast
from weakref import ref

from aengine.bus.emitter import RemovableEventHandle
from aengine.callables import check_function, is_async_callable, name_of
from aengine.engine import Engine
from aengine.events import EventLike

try:
    import ignite.engine
    import ignite.metrics.metric
except ModuleNotFoundError as _error:
    raise ModuleNotFoundError(
        "aengine.interop.ignite attaches pytorch-ignite's metrics and handlers, and it is not installed: "
        'pip install "pytorch-ignite>=0.5", which is what aengine\'s extra "ignite" brings'
    ) from _error

__all__ = ["ResumableEpochWise", "as_ignite"]

Handler = TypeVar("Handler", bound=Callable[..., Any])


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
    if not isinstance(engine, Engine):  # pyright: ignore[reportUnnecessaryIsInstance]  # not every caller checks types
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


_NO_TABLE = (
    "HandlersTimeProfiler and BasicTimeProfiler are not supported: they exchange the handlers in the table of ignite's"
    " engine while it runs, and aengine has no such table. engine.statistics() says where the time went, handler by"
    " handler; aengine.handlers.Profiler(folder).attach(engine, event) records chosen iterations with torch.profiler"
)


class _View:
    """Looks like ignite's Engine, and does what ours does."""

    __slots__ = ("__weakref__", "_engine")

    _engine: Engine[Any, Any]

    def __init__(self, engine: Engine[Any, Any]) -> None:
        object.__setattr__(self, "_engine", engine)

    __class__: Any = property(lambda _: ignite.engine.Engine)  # what isinstance() asks for

    def __getattr__(self, name: str) -> Any:
        if name == "_event_handlers":
            raise AttributeError(_NO_TABLE, name=name, obj=self)
        if name.startswith("_"):
            raise AttributeError(
                f"{name!r} is inside of ignite's engine. as_ignite() shows what is public, and _allowed_events",
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

    def on(self, event_name: EventLike, *args: Any, **kwargs: Any) -> Callable[[Handler], Handler]:
        """Return a decorator that adds an inline handler, which is given the view."""

        def add(handler: Handler) -> Handler:
            self.add_event_handler(event_name, handler, *args, **kwargs)
            return handler

        return add

    def add_event_handler(
        self, event_name: EventLike, handler: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> RemovableEventHandle:
        """Add an inline handler, which is given the view. Otherwise as `Engine.add_event_handler`."""
        check_function(handler, "a handler")
        kind = _AsyncHandlerOfView if is_async_callable(handler) else _HandlerOfView
        return self._engine.add_event_handler(event_name, kind(handler, self._engine), *args, **kwargs)

    @property
    def _allowed_events(self) -> "_AllowedEvents":
        return _AllowedEvents(self._engine)


class _AllowedEvents:
    """The events that can be listened to, as ignite's ProgressBar asks for them."""

    def __init__(self, engine: Engine[Any, Any]) -> None:
        self._engine = engine

    def __contains__(self, event: Any) -> bool:
        return self._engine.has_registered_events(event)


class _HandlerOfView:
    """Calls a handler with a view in the place of the engine.

    It has the handler's signature and name, and is equal to it, so that it is found and removed by it. Its `__self__`
    is the object whose state a checkpoint saves.
    """

    def __init__(self, handler: Callable[..., Any], engine: Engine[Any, Any]) -> None:
        self.__wrapped__ = handler
        self.__qualname__ = name_of(handler)
        self.__self__ = getattr(handler, "__self__", handler)
        self._engine = ref(engine)  # weak: the engine holds this, and is freed by reference count

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is (engine := self._engine()):  # a handler may take no engine, or the arguments be others
            args = (_View(cast("Engine[Any, Any]", engine)), *args[1:])
        return self.__wrapped__(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return bool(self.__wrapped__ == (other.__wrapped__ if isinstance(other, _HandlerOfView) else other))

    def __hash__(self) -> int:
        return hash(self.__wrapped__)


class _AsyncHandlerOfView(_HandlerOfView):
    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return await super().__call__(*args, **kwargs)
