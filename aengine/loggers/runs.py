"""What the sinks of tracking servers share: runs that several engines write into, records that came twice, servers."""

import socket
import threading
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from aengine.loggers.sink import Record
from aengine.state import StopReason

BAD = frozenset({StopReason.FAILED, StopReason.CANCELLED})
"""The stop reasons of a run that did not end well."""

_REMEMBERED = 4000
"""Records to remember: a call of a sink brings a thousand at most, and those come again if it fails."""

_CONNECT_TIMEOUT = 5.0
"""Seconds that a server may take to accept a connection."""


class SharedRun:
    """The engines' runs that write into one run of a tracking server.

    The server's run lasts from the first begin to the last end. Its outcome is that of the engine's run that began
    first: the trainer's, and not that of an evaluator beside it. Once that one has failed, a run of another engine does
    not change the outcome, even if it begins after all others have ended: it may be the trainer's last evaluation.

    Thread-safe, with a lock of its own that is held for an instant only: begins and ends are reported on event loops,
    which must not wait for a sink's thread that holds the lock of the sink while a server takes its time.

    Attributes:
        began: when the first of them began, in seconds since 1970; None if none has.
        ended: when the last of them ended.
        reason: why the first of them ended.
        has_news: whether one has ended since `take_news` was called.
    """

    def __init__(self) -> None:
        self.began: float | None = None
        self.ended: float | None = None
        self.reason: StopReason = StopReason.COMPLETED
        self.has_news: bool = False
        self._first = ""
        self._open_runs = 0
        self._lock = threading.Lock()

    @property
    def is_over(self) -> bool:
        """Whether none of them is under way."""
        return self._open_runs == 0

    def begin(self, engine: str, time: float) -> None:
        """Take note that a run of an engine began."""
        with self._lock:
            if self._open_runs == 0:
                if engine == self._first or self.reason not in BAD:
                    self._first, self.reason = engine, StopReason.COMPLETED
                self.began, self.ended = time, None
            elif self.began is None or time < self.began:  # two threads report begins, and not always in order
                self._first, self.began = engine, time
            self._open_runs += 1

    def end(self, engine: str, time: float, reason: StopReason) -> None:
        """Take note that a run of an engine ended."""
        with self._lock:
            if engine == self._first:
                self.reason = reason
            self.ended, self.has_news = time, True
            self._open_runs -= 1  # last: another thread looks at `is_over` first, and then at the rest

    def take_news(self) -> bool:
        """Say whether one has ended since this was called before."""
        with self._lock:
            has_news, self.has_news = self.has_news, False
            return has_news


class RecentRecords:
    """The last records that were written. A call that fails in the middle brings all of its records again."""

    def __init__(self) -> None:
        self._keys: dict[tuple[Any, ...], None] = {}

    def unwritten(self, records: Sequence[Record]) -> list[Record]:
        """Return the records that have not been written."""
        return [record for record in records if _key(record) not in self._keys]

    def add(self, record: Record) -> None:
        """Take note of a record that has been written."""
        self._keys[_key(record)] = None
        if len(self._keys) > _REMEMBERED:
            del self._keys[next(iter(self._keys))]


def check_texts(sink: str, **texts: Any) -> None:
    """Raise TypeError for an argument of a sink that is given, and is no text, or an empty one."""
    for name, text in texts.items():
        if text is not None and (not isinstance(text, str) or not text):
            raise TypeError(f"{sink}({name}=) is a text that is not empty, got {text!r}")


def check_mappings(sink: str, **mappings: Any) -> None:
    """Raise TypeError for an argument of a sink that is given, and is no mapping."""
    for name, mapping in mappings.items():
        if mapping is not None and not isinstance(mapping, Mapping):
            raise TypeError(f"{sink}({name}=) is a mapping of names to values, got {mapping!r}")


def check_reachable(uri: str) -> None:
    """Connect to a server, if the URI names one: the libraries of tracking servers try for minutes before they fail.

    Raises:
        OSError: no server accepts a connection there.
    """
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return
    proxies = urllib.request.getproxies()
    if (parts.scheme in proxies or "all" in proxies) and not urllib.request.proxy_bypass(parts.hostname):
        return  # the connection is the proxy's to make
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname, port), _CONNECT_TIMEOUT).close()
    except OSError as error:
        error.add_note(f"no server answers at {uri}")
        raise


def _key(record: Record) -> tuple[Any, ...]:
    return record.engine_name, record.event, record.step, record.time, tuple(record.values)
