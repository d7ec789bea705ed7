"""The bus of one engine: its topics, the subscribers beside its step, and the streams that are being read."""

import logging
from collections.abc import Iterable, Mapping
from threading import RLock

from aengine.bus.completions import Completions
from aengine.bus.subscriber import Subscriber, Subscription
from aengine.bus.topic import Topic
from aengine.events import ALWAYS
from aengine.state import State
from aengine.statistics import Stopwatch
from aengine.threads.event_loop import EventLoopHandle


class Bus:
    """Topics, subscribers and streams of one engine, and what all its topics share.

    The topics write `sequence`, `last_event_name` and `next_count`, the loop `next_count` too: at each event or
    iteration, where a call more would be felt. All else is changed by the methods here.

    Attributes:
        lock: held while listeners come and go, and while an event is sent: so all inboxes see one order of events.
            Re-entrant, since a signal handler may emit while its own thread does.
        sequence: the number of the last event that was sent.
        last_of_subscribers: `sequence` when a subscriber's handler last fired. Written by the emitter.
        own_counts: how often each event was fired that no attribute of the state counts. Written by the topics.
        next_count: the least count of iterations at which the loop has to look closer; found anew by the loop.
        completions: what waits for iterations to be completed.
        loop_handle: the event loop of the run under way, None where none is.
        has_company: whether a run on an event loop has, or had, tasks beside the loop, for which its end has to wait.
        has_run: whether a run is under way, with or without an event loop.
    """

    __slots__ = (
        "_are_waits_over", "_reported", "_subscriptions", "_topics", "completions", "has_company", "has_run",
        "last_event_name", "last_of_subscribers", "lock", "logger", "loop_handle", "name", "next_count", "own_counts",
        "sequence", "state", "stopwatch",
    )  # fmt: skip

    last_of_subscribers: int
    sequence: int

    def __init__(self, name: str, logger: logging.Logger, state: State) -> None:
        self.name: str = name
        self.logger: logging.Logger = logger
        self.state: State = state
        self.lock: RLock = RLock()
        self.sequence = self.last_of_subscribers = 0
        self.completions: Completions = Completions()
        self.own_counts: dict[str, int] = {}
        self.last_event_name: str | None = None
        self.next_count: int = ALWAYS
        self.stopwatch: Stopwatch = Stopwatch()
        self.loop_handle: EventLoopHandle | None = None
        self.has_company: bool = False
        self.has_run: bool = False
        self._reported: BaseException | None = None
        self._are_waits_over = False
        self._subscriptions: tuple[Subscription, ...] = ()
        self._topics: dict[str, Topic] = {}

    def topic(self, name: str) -> Topic:
        """Return the topic of this name, the same each time."""
        topic = self._topics.get(name)
        if topic is None:
            topic = self._topics.setdefault(name, Topic(name, self))
        return topic

    @property
    def topics(self) -> Iterable[Topic]:
        """All topics that were asked for so far."""
        return tuple(self._topics.values())

    def restore_own_counts(self, counts: Mapping[str, int]) -> None:
        """Have the events that count their own firings go on from here; from 0, if they are not named."""
        self.own_counts = dict(counts)

    # Subscribers and streams

    def add(self, subscription: Subscription) -> None:
        """Add a subscriber, whose task is started by the caller or by the next run, or a stream that is entered."""
        with self.lock:
            self._subscriptions += (subscription,)
        subscription.subscribe()

    def remove(self, subscription: Subscription) -> None:
        """Remove a subscriber, which still handles what it has accepted, or a stream, which discards that."""
        with self.lock:
            is_there = subscription in self._subscriptions
            self._subscriptions = tuple(one for one in self._subscriptions if one is not subscription)
        if is_there:  # else it was removed before, or its engine is gone
            subscription.unsubscribe()
        subscription.inbox.close_nowait(discard=not isinstance(subscription, Subscriber))

    @property
    def subscribers(self) -> list[Subscriber]:
        """The subscribers, in order of registration."""
        return [one for one in self._subscriptions if isinstance(one, Subscriber)]

    @property
    def streams(self) -> list[Subscription]:
        """Those of the streams that are being read."""
        return [one for one in self._subscriptions if not isinstance(one, Subscriber)]

    @property
    def must_await(self) -> bool:
        """Whether something listens that needs an event loop."""
        return bool(self.subscribers) or any(one.is_async for topic in self.topics for one in topic.inline)

    def close(self) -> None:
        """The engine is gone: refer to nothing any more that refers to this. Streams that are still read end."""
        topics, subscriptions, self._topics, self._subscriptions = self._topics, self._subscriptions, {}, ()
        for topic in topics.values():
            topic.close()
        for subscription in subscriptions:
            subscription.inbox.close_nowait()

    # Runs

    def begin_run(self) -> None:
        """`run()` was called. What refuses it now ends the streams, too."""
        self.has_run = True

    def end_run(self, *, is_suspended: bool) -> None:
        """`run()` is about to return or raise. Unless the run is suspended, the streams end after what waits in them.

        In this order: a stream that is entered at the same time, by another thread, looks after it was added.
        """
        self.has_run = False
        self.completions.end()  # also where the loop has not come to its end, or never began
        if not is_suspended:
            for stream in self.streams:
                stream.inbox.close_nowait()

    def reset(self) -> None:
        """A run begins: the clock starts, and filters look ahead from where the counters stand."""
        self.start_clock()
        for topic in self.topics:
            topic.reset()

    def attach(self, loop_handle: EventLoopHandle | None) -> None:
        """A run begins on an event loop, where what waits for room in an inbox waits; None when it is over."""
        self.loop_handle, self._reported, self._are_waits_over = loop_handle, None, False

    def end_waits(self) -> None:
        """The run is about to end: nothing waits for room in an inbox any more. The events are accepted over its bound.

        Otherwise a subscriber that is stuck, or events that something else fires steadily, could keep it from its end.
        """
        self._are_waits_over = True
        for one in self._subscriptions:
            one.inbox.wake_emitters()

    def are_waits_over(self) -> bool:
        """Whether nothing is to wait for room in an inbox."""
        return self._are_waits_over

    def report(self, error: BaseException | None) -> None:
        """An error from beside the loop, which was noted where it was raised, is about to be raised in it."""
        self._reported = error

    def note(self, error: BaseException, where: str) -> None:
        """Note on an error where it was raised, unless it came from beside the loop."""
        if error is not self._reported:
            state = self.state
            error.add_note(f"in {where}, engine {self.name!r}, epoch {state.epoch}, iteration {state.iteration}")

    def start_clock(self) -> None:
        """A run begins, or goes on."""
        self.stopwatch = Stopwatch()
        self.next_count = ALWAYS
