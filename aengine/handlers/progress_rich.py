"""Progress by rich: what is printed during a run appears above the bars."""

import threading

from aengine.extras import missing_package
from aengine.handlers.progress import Bar
from aengine.keywords import explain_wrong_call

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


@explain_wrong_call
class RichBars:
    """A table of bars by rich. Engines that run at the same time must share it: rich draws only one table at a time.

    The bar of a run that is over stays until its engine runs again, or no engine runs any more: then all stay for good.

    Args:
        console: where to draw; by default stderr. Quiet unless that is a terminal or a notebook.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.lock = threading.Lock()
        self._console = console or Console(stderr=True)
        self._table = _Table(self._console)

    @property
    def is_quiet(self) -> bool:
        """Whether it would not be seen."""
        return not (self._console.is_terminal or self._console.is_jupyter)

    def bar(self, unit: str) -> Bar:  # noqa: ARG002 -- no column shows it
        """Return a new bar."""
        return _Bar(self._table)


class _Table:
    """The table of a display."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None  # while there is an open bar
        self._open: set[_Bar] = set()

    def open(self, bar: "_Bar") -> Progress:
        """Return the table, for a bar to be added to it."""
        self._open.add(bar)
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                console=self._console,
                auto_refresh=False,  # which takes a thread: each bar asks for a refresh
            )
            self._progress.start()
        return self._progress

    def close(self, bar: "_Bar") -> None:
        """Leave a bar as it is; with the last one, the whole table."""
        self._open.discard(bar)
        if not self._open and self._progress is not None:
            self._progress.stop()
            self._progress = None


class _Bar:
    def __init__(self, table: _Table) -> None:
        self._table = table
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def begin(self, name: str, count: int, total: int | None) -> None:
        progress = self._table.open(self)
        if self._task is None or progress is not self._progress:
            self._progress, self._task = progress, progress.add_task(name, total=total, completed=count, text="")
        else:
            progress.reset(self._task, description=name, total=total, completed=count)

    def show(self, count: int, text: str) -> None:
        assert self._progress is not None, "it has begun"  # noqa: S101
        assert self._task is not None, "likewise"  # noqa: S101
        self._progress.update(self._task, completed=count, text=text, refresh=True)

    def close(self) -> None:
        self._table.close(self)
