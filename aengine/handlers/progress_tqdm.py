"""Progress by tqdm: on a terminal, and as widgets in a notebook."""

import sys
import threading
from typing import Any, TextIO

from aengine.errors import missing_package

try:
    from tqdm.auto import tqdm  # type: ignore[import-untyped]  # comes without types
except ImportError as error:
    raise missing_package(__name__, "tqdm>=4.66", "progress") from error

_IS_NOTEBOOK = any(one.__module__ == "tqdm.notebook" for one in tqdm.__mro__)


class TqdmBars:
    """Bars by tqdm, one below the other. What is printed meanwhile should be by `tqdm.write`.

    Engines that run at once must share one, so that lines do not move. A bar stays until its engine runs again; when no
    engine runs any more, all stay as they are.

    Args:
        file: where to; by default stderr. Quiet unless that is a terminal, or this is a notebook.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self.file = file or sys.stderr
        self.lock = threading.Lock()
        self._shown: list[_Bar] = []  # from the top
        self._open: set[_Bar] = set()

    @property
    def is_quiet(self) -> bool:
        """Whether nobody would see it."""
        return not _IS_NOTEBOOK and not self.file.isatty()

    def bar(self, unit: str) -> "_Bar":
        """Return a new bar."""
        return _Bar(self, unit)

    def open(self, bar: "_Bar") -> None:
        """Have a bar in the next free line, or in the one that it has."""
        self._open.add(bar)
        if bar not in self._shown:
            self._shown.append(bar)
            bar.add()

    def close(self, bar: "_Bar") -> None:
        """Leave a bar as it is; after the last one, leave all lines to those who print next."""
        self._open.discard(bar)
        if not self._open:
            for one in self._shown:
                one.leave()
            self._shown.clear()


class _Tqdm(tqdm):  # type: ignore[misc]  # comes without types
    monitor_interval = 0  # no thread that looks after bars: these are drawn as often as is asked for
    ended: Any = None

    @property
    def format_dict(self) -> Any:
        """What is shown: of a run that is over, no time that has passed since."""
        return self.ended or super().format_dict


class _Bar:
    def __init__(self, bars: TqdmBars, unit: str) -> None:
        self._bars = bars
        self._unit = unit
        self._bar: Any = None

    def begin(self, name: str, count: int, total: int | None) -> None:
        self._bars.open(self)
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
        self._bars.close(self)

    def add(self) -> None:
        self._bar = _Tqdm(unit=self._unit, file=self._bars.file, leave=True, dynamic_ncols=True)

    def leave(self) -> None:
        self._bar.close()  # draws it once more where the cursor is, at its own line, and steps to the next
        self._bar = None
