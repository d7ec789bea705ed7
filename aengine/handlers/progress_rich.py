"""Progress by rich: what is printed meanwhile appears above the bars."""

import threading

from aengine.errors import missing_package

try:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
except ImportError as error:
    raise missing_package(__name__, "rich>=13", "progress") from error


class RichBars:
    """Bars by rich, a table of them. Engines that run at once must share one: rich draws one table at a time.

    A bar stays until its engine runs again; when no engine runs any more, all stay as they are.

    Args:
        console: where to; by default stderr. Quiet unless that is a terminal, or this is a notebook.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self.lock = threading.Lock()
        self._table: Progress | None = None  # while there is an open bar
        self._open: set[_Bar] = set()

    @property
    def is_quiet(self) -> bool:
        """Whether nobody would see it."""
        return not (self._console.is_terminal or self._console.is_jupyter)

    def bar(self, unit: str) -> "_Bar":  # noqa: ARG002 -- its columns do without
        """Return a new bar."""
        return _Bar(self)

    def open(self, bar: "_Bar") -> Progress:
        """Return the table, for a bar that is to be in it."""
        self._open.add(bar)
        if self._table is None:
            self._table = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                console=self._console,
                auto_refresh=False,  # no thread: it is drawn as often as is asked for
            )
            self._table.start()
        return self._table

    def close(self, bar: "_Bar") -> None:
        """Leave a bar as it is; after the last one, leave the whole table."""
        self._open.discard(bar)
        if not self._open and self._table is not None:
            self._table.stop()
            self._table = None


class _Bar:
    def __init__(self, bars: RichBars) -> None:
        self._bars = bars
        self._table: Progress | None = None
        self._task: TaskID | None = None

    def begin(self, name: str, count: int, total: int | None) -> None:
        table = self._bars.open(self)
        if self._task is None or table is not self._table:
            self._table, self._task = table, table.add_task(name, total=total, completed=count, text="")
        else:
            table.reset(self._task, description=name, total=total, completed=count)

    def show(self, count: int, text: str) -> None:
        assert self._table is not None, "it has begun"  # noqa: S101
        assert self._task is not None, "likewise"  # noqa: S101
        self._table.update(self._task, completed=count, text=text, refresh=True)

    def close(self) -> None:
        self._bars.close(self)
