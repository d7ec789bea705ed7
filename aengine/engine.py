"""Engine: the face of the package. What users construct, listen to, run and stop."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from functools import partial
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Generic,
    Literal,
    NoReturn,
    ParamSpec,
    TypeVar,
    TypeVarTuple,
    overload,
)

from aengine.arguments import check_seconds
from aengine.bus.decorators import InlineDecorator, SubscriberDecorator, WithDefault
from aengine.bus.emitter import EventEmitter, RemovableEventHandle
from aengine.bus.inbox import Overflow
from aengine.bus.stream import Stream
from aengine.bus.subscriber import Subscriber
from aengine.callables import check_callable, is_async_callable, name_of
from aengine.data.adapt import Data
from aengine.drivers.iterate import IterationStream
from aengine.drivers.services import Service
from aengine.drivers.session import Session
from aengine.events import Event, EventEnum, EventLike
from aengine.keywords import explain_wrong_call
from aengine.loop.requests import Request, Requests
from aengine.state import State
from aengine.statistics import EngineStatistics, ListenerInfo
from aengine.type_variables import Batch, Output, Taken, with_defaults

Arguments = ParamSpec("Arguments")
Positional = TypeVarTuple("Positional")
Handler = TypeVar("Handler", bound=Callable[..., Any])


class InsideOfIgnite:
    """A name from the inside of pytorch-ignite's engine, which ours does not have: getting it says what to do."""

    _name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, engine: Any, owner: type | None = None) -> NoReturn:
        raise AttributeError(
            f"{self._name!r} is inside of pytorch-ignite's engine, and this is aengine's: what looks for it takes"
            " as_ignite(engine), of aengine.interop.ignite, in place of the engine",
            name=self._name,
            obj=engine,
        )


@explain_wrong_call
class Engine(Generic[Batch, Output]):
    """Loops over data, runs a step for each batch, and publishes what happens.

    Args:
        step: `step(engine, batch)` returns the output, or an awaitable of it. A plain `def` runs on the engine's own
            worker thread, an `async def` on the event loop.
        name: shown in logs, notes, events and statistics; by default the step's name.
        thread: whether a plain step runs on the worker, unless a mode or profiler of torch is on where the engine is
            run, which sees that thread only; with False it runs on the event loop's own thread, as an async one always
            does.
        grace: seconds, or a timedelta, that clean-up may take: handlers of CANCELLED and EXCEPTION_RAISED, subscribers
            that are behind, services, closing the data.

    Attributes:
        state: what the loop knows. Another `State` can be assigned between runs: the next one begins anew.
        state_dict_user_keys: the attributes of the state that are saved and loaded with the engine.

    Raises:
        TypeError, ValueError: the step cannot be called as `step(engine, batch)`, `thread` is no bool, or `grace` is no
            duration, 0 or more.

    Example:
        >>> engine = Engine(lambda engine, batch: batch * 2)
        >>> engine.run_sync([1, 2, 3]).output
        6
    """

    @overload  # of an async step, whose result mypy does not find in a union
    def __init__(
        self,
        step: Callable[["Engine[Any, Any]", Batch], Coroutine[Any, Any, Output]],
        *,
        name: str | None = None,
        thread: bool = True,
        grace: float | timedelta = 30.0,
    ) -> None: ...
    @overload
    def __init__(
        self,
        step: Callable[["Engine[Any, Any]", Batch], Output],
        *,
        name: str | None = None,
        thread: bool = True,
        grace: float | timedelta = 30.0,
    ) -> None: ...
    def __init__(
        self,
        step: Callable[["Engine[Any, Any]", Any], Any],
        *,
        name: str | None = None,
        thread: bool = True,
        grace: float | timedelta = 30.0,
    ) -> None:
        check_callable(step, "the step", "step", "engine", "batch")
        is_async = is_async_callable(step)
        if not isinstance(thread, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"thread= is True, for the worker, or False, for the event loop's thread; got {thread!r}")
        self.name: str = name or name_of(step).rpartition("<locals>.")[2]
        self.state: State[Batch, Output] = State()
        self.logger: logging.Logger = logging.getLogger("aengine.engine")
        self.state_dict_user_keys: list[str] = []
        self._requests = Requests()
        self._emitter = EventEmitter(self.name, self.logger, self.state)
        self._session = Session(
            step,
            self._emitter,
            self._requests,
            is_async=is_async,
            threaded=not is_async and thread,
            grace=check_seconds(grace, "grace=", 30.0),
        )

    def __class_getitem__(cls, parameters: Any) -> Any:
        return with_defaults(cls, parameters)

    # What looks into pytorch-ignite's engine gets an error that says what to write. Not by __getattr__: each access
    # would be slower by it.
    _allowed_events = InsideOfIgnite()
    _assert_allowed_event = InsideOfIgnite()
    _dataloader_iter = InsideOfIgnite()
    _event_handlers = InsideOfIgnite()
    _fire_event = InsideOfIgnite()
    _handler_wrapper = InsideOfIgnite()
    _init_iter = InsideOfIgnite()
    _internal_run = InsideOfIgnite()
    _internal_run_generator = InsideOfIgnite()
    _is_done = InsideOfIgnite()
    _process_function = InsideOfIgnite()
    _setup_engine = InsideOfIgnite()
    _state_dict_user_keys = InsideOfIgnite()

    # By name, and not as a property: reading the state, as every handler does, would take several times as long.
    if not TYPE_CHECKING:  # for which any attribute could be assigned then

        def __setattr__(self, name: str, value: Any) -> None:
            if name == "state" and (session := getattr(self, "_session", None)) is not None:
                session.replace_state(value)
            super().__setattr__(name, value)

    # Running

    @explain_wrong_call
    async def run(
        self,
        data: Data[Batch] | None = None,
        max_epochs: int | None = None,
        max_iters: int | None = None,
        epoch_length: int | None = None,
        *,
        prefetch: int = 0,
    ) -> State[Batch, Output]:
        """Run the loop over `data` until `max_epochs` or `max_iters`, and return the state.

        An engine that is done begins anew, by default for one epoch; one that was stopped goes on where it
        was; one that was interrupted goes on with its very next event.

        Args:
            data: an iterable or async iterable of batches, a callable that makes one, an async context manager that is
                one, or None, for a step that needs none.
            max_epochs: epochs in all, those of earlier runs that this one resumes included; 1 if nothing is given.
            max_iters: iterations in all, instead of epochs.
            epoch_length: iterations in an epoch; by default `len(data)`, or what the first epoch finds.
            prefetch: how many batches to pull ahead of the step, in a task or, for plain data, in a thread.

        Raises:
            EngineBusy: this engine is running.
            ValueError, TypeError: an argument is wrong, or contradicts the run to be gone on with.
            DataExhausted: the data gave not a single batch.
            HandlerTimeout: subscribers were busy for longer than `grace` seconds at the end.
            BaseException: what a step, a handler or the data raised, as the very object; several as an ExceptionGroup.

        Cancellation waits for the step in flight, fires CANCELLED within `grace` seconds, and goes on. The run can then
        be resumed.
        """
        await self._session.run(self, data, (max_epochs, max_iters, epoch_length), prefetch)
        return self.state

    @explain_wrong_call
    def run_sync(
        self,
        data: Data[Batch] | None = None,
        max_epochs: int | None = None,
        max_iters: int | None = None,
        epoch_length: int | None = None,
        *,
        prefetch: int = 0,
    ) -> State[Batch, Output]:
        """Run the same loop where no event loop runs, and without one as long as nothing must be awaited.

        Subscribers, async steps, handlers and data, and `prefetch` have it open one, on asyncio.

        Raises:
            RuntimeError: an event loop runs in this thread.
            BaseException: as `run` does.
        """
        self._session.run_sync(self, data, (max_epochs, max_iters, epoch_length), prefetch)
        return self.state

    @explain_wrong_call
    def iterate(
        self,
        data: Data[Batch] | None = None,
        max_epochs: int | None = None,
        max_iters: int | None = None,
        epoch_length: int | None = None,
        *,
        prefetch: int = 0,
    ) -> AbstractAsyncContextManager[AsyncIterator[Event[Output]], None]:
        """Run the same loop for a `for` of one's own: an event for each completed iteration; the loop waits meanwhile.

            async with engine.iterate(data, max_epochs=3) as iterations:
                async for event in iterations:
                    print(event.iteration, event.output)

        The body is part of the run: its exception fails the run, and leaving the block early terminates it. Raises and
        cancels as `run` does.
        """
        run = partial(self.run, data, max_epochs, max_iters, epoch_length, prefetch=prefetch)
        return IterationStream(self, run, self._session)

    # Listening

    @overload
    def on(self, event: EventLike, *args: *Positional) -> InlineDecorator[*Positional]: ...
    @overload  # by keyword, which is not checked
    def on(  # pyright: ignore[reportOverlappingOverload]  # it does not look at keywords
        self, event: EventLike, *args: Any, **kwargs: Any
    ) -> Callable[[Handler], Handler]: ...
    @explain_wrong_call  # type: ignore[misc]  # mypy: *Any is no *Positional
    def on(self, event: EventLike, *args: Any, **kwargs: Any) -> Any:
        """Return a decorator that adds an inline handler, and returns it as it was. See `add_event_handler`.

        Raises:
            TypeError: this is no event, such as the handler itself, by `@engine.on` without parentheses.
            ValueError: the event is not registered with this engine.
        """
        self._emitter.select(event)

        def add(handler: Handler) -> Handler:
            self.add_event_handler(event, handler, *args, **kwargs)
            return handler

        return add

    @overload
    def add_event_handler(
        self, event: EventLike, handler: WithDefault["Engine[Batch, Output]"]
    ) -> RemovableEventHandle: ...
    @overload
    def add_event_handler(
        self, event: EventLike, handler: Callable[["Engine[Batch, Output]"], Any]
    ) -> RemovableEventHandle: ...
    @overload
    def add_event_handler(
        self,
        event: EventLike,
        handler: Callable[Concatenate["Engine[Batch, Output]", Arguments], Any],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> RemovableEventHandle: ...
    @overload
    def add_event_handler(
        self,
        event: EventLike,
        handler: Callable[Arguments, Any],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> RemovableEventHandle: ...
    @overload
    def add_event_handler(
        self,
        event: EventLike,
        handler: Callable[Concatenate["Engine[Batch, Output]", Any, Arguments], Any],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> RemovableEventHandle: ...
    @overload
    def add_event_handler(
        self,
        event: EventLike,
        handler: Callable[Concatenate[BaseException, Arguments], Any],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> RemovableEventHandle: ...
    @explain_wrong_call
    def add_event_handler(
        self, event: EventLike, handler: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> RemovableEventHandle:
        """Add an inline handler: it runs between two steps, in order of registration, and the loop waits for it.

        It is called as `handler(engine, *args, **kwargs)`, without the engine if it does not take it; and as
        `handler(engine, payload, *args, **kwargs)` if the event may have a payload, as events of one's own and
        EXCEPTION_RAISED, and the handler takes it: by a second parameter that has no default, or the default None.
        TERMINATE_SINGLE_EPOCH gives its payload as `iter_counter=`. A plain `def` runs where the step runs, an `async
        def` is awaited on the event loop; so is whatever else it returns that can be awaited, such as the handle of a
        task. What it raises fails the run. Inline handlers run before the event is sent to subscribers and streams.

        Raises:
            TypeError: the handler cannot be called so.
            ValueError: the event is not registered with this engine.
        """
        return self._emitter.add_inline(event, handler, args, kwargs)

    @explain_wrong_call
    def remove_event_handler(self, handler: Callable[..., Any], event: EventLike) -> None:
        """Remove an inline handler from the very event, with its filter, that it was added with.

        Raises:
            ValueError: it does not listen to that.
        """
        self._emitter.remove_inline(handler, event)

    @explain_wrong_call
    def has_event_handler(self, handler: Callable[..., Any], event: EventLike | None = None) -> bool:
        """Say whether an inline handler listens: to anything; to an event, or, filtered, with that very filter.

        Raises:
            TypeError: this is no event.
        """
        return self._emitter.has_inline(handler, event)

    @overload
    def subscribe(
        self,
        event: EventLike,
        handler: None = None,
        *,
        buffer: int = 64,
        overflow: Overflow = "wait",
        on_error: Literal["raise", "log"] = "raise",
        snapshot: None = None,
        name: str | None = None,
    ) -> SubscriberDecorator[Output, None]: ...
    @overload
    def subscribe(
        self,
        event: EventLike,
        handler: None = None,
        *,
        buffer: int = 64,
        overflow: Overflow = "wait",
        on_error: Literal["raise", "log"] = "raise",
        snapshot: Callable[["Engine[Batch, Output]"], Awaitable[Taken] | Taken],
        name: str | None = None,
    ) -> SubscriberDecorator[Output, Taken]: ...
    @overload
    def subscribe(
        self,
        event: EventLike,
        handler: Callable[[Event[Output]], Any],
        *,
        buffer: int = 64,
        overflow: Overflow = "wait",
        on_error: Literal["raise", "log"] = "raise",
        snapshot: None = None,
        name: str | None = None,
    ) -> RemovableEventHandle: ...
    @overload
    def subscribe(
        self,
        event: EventLike,
        handler: Callable[[Event[Output, Taken]], Any],
        *,
        buffer: int = 64,
        overflow: Overflow = "wait",
        on_error: Literal["raise", "log"] = "raise",
        snapshot: Callable[["Engine[Batch, Output]"], Awaitable[Taken] | Taken],
        name: str | None = None,
    ) -> RemovableEventHandle: ...
    @explain_wrong_call
    def subscribe(
        self,
        event: EventLike,
        handler: Callable[[Event[Any, Any]], Any] | None = None,
        *,
        buffer: int = 64,
        overflow: Overflow = "wait",
        on_error: Literal["raise", "log"] = "raise",
        snapshot: Callable[["Engine[Batch, Output]"], Any] | None = None,
        name: str | None = None,
    ) -> Any:
        """Add a handler beside the step: while a run lasts, in a task of its own, one `Event` at a time, in order.

        Without a handler, returns a decorator. `run()` ends when every subscriber has handled what it was sent.

        Args:
            event: what to listen to; several with `|` share one inbox.
            handler: `handler(event)`; a plain `def` runs in a thread.
            buffer: how many events may wait in its inbox.
            overflow: what happens when more come: "wait" (the loop does), "latest", "drop_oldest", "drop_new", "error".
            on_error: "raise" fails the run with what the handler raised; "log" logs and counts it, and goes on.
            snapshot: `snapshot(engine)` is called inline, between steps, once for all that share it; what it returns
                travels in `event.snapshot`.
            name: shown in notes and statistics; by default the handler's.

        Raises:
            TypeError: the handler or the snapshot cannot be called so; or this is no event.
            ValueError: the event is not registered with this engine, or an argument is wrong.
        """
        make = partial(
            Subscriber,
            self._emitter.bus,
            self._emitter.select(event),
            buffer=buffer,
            overflow=overflow,
            on_error=on_error,
            snapshot=snapshot,
            name=name,
        )
        if handler is not None:
            return self._emitter.subscribe(make(handler))

        def decorate(function: Handler) -> Handler:
            self._emitter.subscribe(make(function))
            return function

        return decorate

    @overload
    def stream(
        self,
        event: EventLike,
        *,
        buffer: int = 64,
        overflow: Overflow = "drop_oldest",
        snapshot: None = None,
        wait_for_run: bool = True,
    ) -> Stream[Output, None]: ...
    @overload
    def stream(
        self,
        event: EventLike,
        *,
        buffer: int = 64,
        overflow: Overflow = "drop_oldest",
        snapshot: Callable[["Engine[Batch, Output]"], Awaitable[Taken] | Taken],
        wait_for_run: bool = True,
    ) -> Stream[Output, Taken]: ...
    @explain_wrong_call
    def stream(
        self,
        event: EventLike,
        *,
        buffer: int = 64,
        overflow: Overflow = "drop_oldest",
        snapshot: Callable[["Engine[Batch, Output]"], Any] | None = None,
        wait_for_run: bool = True,
    ) -> Stream[Any, Any]:
        """Return events to be read, as in the class `Stream`.

        It ends with the run under way, or else with the next one, however that ends. `state.stop_reason` and
        `state.error` say how. The arguments are those of `subscribe`. A slow reader loses the oldest events, which are
        counted, and never slows the loop, unless it asks for that by `overflow="wait"`.

        Args:
            event: what to read; several with `|` share one stream.
            buffer: how many events may wait.
            overflow: what happens when more come.
            snapshot: what travels in `event.snapshot`.
            wait_for_run: False has the stream be over at once where no run is under way, as the reader of an engine
                that may be done needs it.

        Raises:
            TypeError, ValueError: this is no event, or not one of this engine; or an argument is wrong.
        """
        bus, selected = self._emitter.bus, self._emitter.select(event)
        return Stream(bus, selected, None, buffer, overflow, snapshot, wait_for_run=wait_for_run)

    @explain_wrong_call
    def add_service(
        self, service: Service, *, on_error: Literal["raise", "log"] = "raise", name: str | None = None
    ) -> RemovableEventHandle:
        """Have a service live beside the runs of this engine, also one that is under way. See `Service`.

        Args:
            service: an object of a subclass of `Service`. One that several engines are given has to know them apart.
            on_error: "raise" fails the run with what the service raised, or for being late; "log" logs and counts it.
            name: shown in notes, logs and statistics; by default its class.

        Raises:
            TypeError, ValueError: this is no Service, or one that the engine has; `on_error` is neither of the two.
        """
        return self._session.add_service(service, on_error, name)

    # Events of the user's own

    @explain_wrong_call
    def register_events(self, *events: str | EventEnum, event_to_attr: Mapping[Any, str] | None = None) -> None:
        """Register events of one's own, to listen to and to fire.

        Args:
            events: names, or members of a subclass of EventEnum.
            event_to_attr: the attribute of the state that counts an event, for its filters. It is made, as 0, if it is
                not there. An event without one counts its firings.

        Raises:
            TypeError: something that is no event.
            ValueError: the engine has another event of this name. pytorch-ignite's of the same name will do.
        """
        self._emitter.register(events, event_to_attr)

    def has_registered_events(self, event: EventLike) -> bool:
        """Say whether all of these can be listened to here.

        Raises:
            TypeError: this is no event.
        """
        return self._emitter.has_registered(event)

    def fire_event(self, event: EventLike, payload: Any = None) -> None:
        """Fire an event, from a step or a plain handler: inline handlers run at once, then the inboxes are filled.

        On the worker thread it waits for async handlers and for room in inboxes. Elsewhere it never waits: events over
        an inbox's bound are accepted, and the loop waits for room before its next step.

        Args:
            event: the event.
            payload: what it is about: `event.payload` of subscribers and streams, the argument after the engine of
                inline handlers that take it. Not copied. None for nothing.

        Raises:
            RuntimeError: the event has an async inline handler, which cannot be awaited here; or an inbox is full, and
                no run is under way in which it could be emptied.
            TypeError, ValueError: this is no event, or not a registered one.
        """
        self._emitter.fire(self, event, payload)

    def fire_event_soon(self, event: EventLike, payload: Any = None) -> bool:
        """Have the loop fire an event before its next step, where the state is that of a completed one.

        From any thread or task, without waiting. Where the loop is paused, it is fired there. Returns False, and does
        nothing, if no run is under way. What was accepted is also fired in a run that fails; one that was cancelled
        before its first event, or given up by a second Ctrl-C, fires nothing any more, and a warning is logged. To be
        notified of the end of a run, however it came, add a `Service`.

        Args:
            event: the event.
            payload: what it is about, as for `fire_event`.

        Raises:
            TypeError, ValueError: this is no event, or not a registered one.
        """
        return self._requests.fire(self._emitter.name_to_fire(event), payload)

    async def emit(self, event: EventLike, payload: Any = None) -> None:
        """Fire an event from async code: awaits its inline handlers, and room in the inboxes of its subscribers.

        Cancellable; an event that has been sent stays sent. From a subscriber's own handler it never deadlocks: where
        waiting for room would be waiting for itself, the event is accepted over the inbox's bound.

        Args:
            event: the event.
            payload: what it is about, as for `fire_event`.

        Raises:
            RuntimeError: an inbox is full, and no run is under way that could empty it.
            TypeError, ValueError: this is no event, or not a registered one.
        """
        await self._emitter.emit(self, event, payload)

    @explain_wrong_call
    async def wait_completed(self, iterations: int) -> int:
        """Wait until so many iterations are completed, in all, and return how many are.

        That is less where the run ended first: the one under way, or, if there is none, the next. From any task, also
        of another event loop. Cancellable. It costs the run nothing until then.

        Raises:
            ValueError: `iterations` is no whole number.
            RuntimeError: the loop waits for the caller, and so would never get there: its step, an inline handler, or
                data that is not prefetched.
        """
        return await self._session.wait_completed(iterations)

    async def flush(self) -> None:
        """Wait until every event fired before this call has been handled, and all services are flushed. Cancellable.

        Raises:
            RuntimeError: called by a subscriber's handler or a service, which would wait for itself; or events wait,
                and no run is under way to handle them.
        """
        await self._emitter.flush()

    @property
    def last_event_name(self) -> Any:
        """The event, or its name, that was fired last; None before the first.

        The events of an iteration, which are not fired where nothing listens, count if something does.
        """
        return self._emitter.last_event

    # Stopping

    @explain_wrong_call
    def terminate(self, *, skip_completed: bool = False) -> bool:
        """End the run before its next step: TERMINATE and COMPLETED are fired, and `run()` returns.

        From any thread or task. A later `run()` resumes. Returns whether a run is under way that ends by this. Without
        one only `should_terminate` is set, until the next run begins: a job that is not running yet is stopped by
        whatever is about to call `run()`, which looks at `should_terminate` first, or by cancelling the scope or task
        around it.

        Args:
            skip_completed: fire no COMPLETED.
        """
        return self._session.requests.terminate(skip_completed=skip_completed)

    @explain_wrong_call
    def terminate_epoch(self, *, skip_epoch_completed: bool = False) -> bool:
        """End the epoch before its next step: the data begins again with the next epoch. From any thread or task.

        Returns whether an epoch is under way that ends by this. Without a run only `should_terminate_single_epoch` is
        set, until the next run begins.

        Args:
            skip_epoch_completed: fire no EPOCH_COMPLETED.

        Raises:
            RuntimeError: called at STARTED or EPOCH_STARTED, where no iteration has begun.
        """
        return self._session.requests.terminate_epoch(skip_epoch_completed=skip_epoch_completed)

    def interrupt(self) -> bool:
        """Leave the run before its next step, to go on with the very next event at the next `run()`.

        Returns whether a run is under way that is left by this. Without one only `should_interrupt` is set, until the
        next run begins.
        """
        return self._session.requests.interrupt()

    def pause(self) -> None:
        """Have the loop wait before its next step, inside `run()`, until `resume()`. From any thread or task."""
        self._requests.request(Request.PAUSE)

    def resume(self) -> None:
        """End a pause. From any thread or task."""
        self._requests.cancel(Request.PAUSE)

    @explain_wrong_call
    def set_data(self, data: Data[Batch]) -> None:
        """Have the next batch come from other data. The length of the epoch stays. From any thread or task.

        Raises:
            RuntimeError, TypeError: no run is under way, or this cannot be data.
        """
        self._session.set_data(data)

    @property
    def is_running(self) -> bool:
        """Whether a run is under way."""
        return self._session.is_running

    @property
    def is_paused(self) -> bool:
        """Whether `pause()` was called, and not `resume()` since: the loop waits before its next step."""
        return self._requests.is_requested(Request.PAUSE)

    @property
    def should_terminate(self) -> bool:
        """Whether `terminate()` was called since the last run began. The next one clears it."""
        return self._requests.is_requested(Request.TERMINATE)

    @property
    def should_terminate_single_epoch(self) -> bool:
        """Whether `terminate_epoch()` was called and is yet to take effect. The next run clears it."""
        return self._requests.is_requested(Request.TERMINATE_EPOCH)

    @property
    def should_interrupt(self) -> bool:
        """Whether `interrupt()` was called and is yet to take effect. The next run clears it."""
        return self._requests.is_requested(Request.INTERRUPT)

    # Saving and looking

    def state_dict(self) -> dict[str, Any]:
        """Return where the engine stands, after the last step that completed: plain values, to be saved.

        Holds the counters and limits, the position of the data (and the data's own `state_dict`, where it has one),
        the counts of events that count their firings, and the state's attributes that `state_dict_user_keys` names;
        where a Checkpoint is attached, also the states of random number generators, as tensors.
        """
        return self._session.state_dict(self)

    @explain_wrong_call
    def load_state_dict(self, state_dict: Mapping[str, Any], *, restart_if_done: bool = False) -> None:
        """Go on, at the next `run()`, where a `state_dict` was taken, by this engine or by pytorch-ignite's.

        Args:
            state_dict: what was taken.
            restart_if_done: whether an engine that was done begins anew, as it does in memory: for one that is run
                again and again, as an evaluator. By default it has nothing left but its last event.

        Raises:
            EngineBusy: a run is under way.
            ValueError: a key is missing, or two contradict each other.
        """
        self._session.load_state_dict(self, state_dict, restart_if_done=restart_if_done)

    def statistics(self) -> EngineStatistics:
        """Return where the time goes, and what becomes of the events. Cheap; at any time, from any thread."""
        return self._session.statistics()

    def listeners(self) -> tuple[ListenerInfo, ...]:
        """Return what listens, and to what: inline handlers event by event, then subscribers, then open streams."""
        return self._emitter.listeners()

    def __repr__(self) -> str:
        at = self.state
        return f"<Engine {self.name!r} epoch={at.epoch}/{at.max_epochs} iteration={at.iteration}>"


def session_of(engine: Engine[Any, Any]) -> Session:
    """Return what runs an engine, for what is built on engines inside this package."""
    return engine._session  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  # the only access from outside, in this very module


def stateful_listeners(engine: Engine[Any, Any]) -> list[Any]:
    """Return the listeners (of a bound method: its object) that have a state to save, each once, event by event."""
    return engine._emitter.stateful_listeners(engine)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  # likewise
