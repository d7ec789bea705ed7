"""Progress by tqdm: on a terminal, and as widgets in a notebook."""

import sys
import threading
from typing import Any, TextIO

from aengine.extras import missing_package
from aengine.handlers.progress import Bar
from aengine.keywords import explain_wrong_call

try:
    from tqdm.auto import tqdm  # type: ignore[import-untyped]  # comes without types
except ImportError as error:
    raise missing_package(__name__, "tqdm>=4.66", "progress") from error

_IS_NOTEBOOK = any(one.__module__ == "tqdm.notebook" for one in tqdm.__mro__)


@explain_wrong_call
class TqdmBars:
    """Bars by tqdm, one below the other. Print by `tqdm.write` during a run.

    Engines that run at the same time must share it, so that each has its own lines. The bar of a run that is over stays
    until its engine runs again, or no engine runs any more: then all stay for good.

    Args:
        file: where to draw; by default stderr. Quiet unless that is a terminal or a notebook.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self.lock = threading.Lock()
        self._lines = _Lines(file)

    @property
    def is_quiet(self) -> bool:
        """Whether it would not be seen."""
        return not _IS_NOTEBOOK and not self._lines.file.isatty()

    def bar(self, unit: str) -> Bar:
        """Return a new bar."""
        return _Bar(self._lines, unit)


class _Lines:
    """The lines of a display."""

    def __init__(self, file: TextIO | None) -> None:
        self._file = file
        self._shown: list[_Bar] = []  # from the top
        self._open: set[_Bar] = set()

    @property
    def file(self) -> TextIO:
        """Where to draw: stderr as it is now, since that may be replaced, as notebooks do."""
        return self._file or sys.stderr

    def open(self, bar: "_Bar") -> None:
        """Show a bar, on the next free line unless it has one."""
        self._open.add(bar)
        if bar not in self._shown:
            self._shown.append(bar)

    def close(self, bar: "_Bar") -> None:
        """Leave a bar as it is; with the last one, all of them, so that what is printed next is below."""
        self._open.discard(bar)
        if not self._open:
            for one in self._shown:
                one.leave()
            self._shown.clear()


class _Tqdm(tqdm):  # type: ignore[misc]  # comes without types
    monitor_interval = 0  # no thread that refreshes the bars: each show() does
    ended: Any = None

    @property
    def format_dict(self) -> Any:
        """What is shown. For a run that is over it stays as it was then: no more time passes."""
        return self.ended or super().format_dict


class _Bar:
    def __init__(self, lines: _Lines, unit: str) -> None:
        self._lines = lines
        self._unit = unit
        self._bar: Any = None

    def begin(self, name: str, count: int, total: int | None) -> None:
        self._lines.open(self)
        if self._bar is None:
            self._bar = _Tqdm(unit=self._unit, file=self._lines.file, leave=True, dynamic_ncols=True)
        bar = self._bar
        bar.ended = None
        bar.set_description(name, refresh=False)
        bar.total = None
        bar.reset(total)
        bar.initial = bar.n = bar.last_print_n = count

    def show(self, count: int, text: str) -> None:
        bar = self._bar
        bar.set_postfix_str(text, refresh=False)
        bar.update(count - bar.n)
        bar.refresh()

    def close(self) -> None:
        self._bar.ended = self._bar.format_dict
        self._bar.refresh()
        self._lines.close(self)

    def leave(self) -> None:
        self._bar.close()  # draws it once more, on its own line, where the cursor is, and moves to the next line
        self._bar = None
