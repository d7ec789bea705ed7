"""Going back to the middle of a pass over the data: the random numbers of that pass, and whether the same batches come.

The data is opened once more while the generators stand as they did when that pass was opened, and batches are fetched
and dropped. Then the process's generators are put back to where they stood before: nothing else draws other numbers.
"""

import sys
import warnings
from collections.abc import Awaitable, Generator, Mapping
from types import coroutine
from typing import Any

from aengine.data.adapt import Adapted, length_of
from aengine.data.digest import Digest, differing, digest_of, is_of_real_numbers
from aengine.data.generators import (
    Opening,
    capture_process,
    plain,
    restore,
    restore_own,
    restore_process,
    walk,
)
from aengine.errors import DataOrderWarning

END: Any = object()
"""In place of a batch: there is none."""

_NO_CHECK: Mapping[str, Any] = {"length": None, "first": {}, "number": 0, "digest": {}}


class Rewind:
    """One return to a position, from before the data is opened until its next batch is taken.

    Attributes:
        position: where to, as `DataPosition.after` returns it.
        check: what is compared, as `DataPosition.with_check` returns it.
        opening: where the generators stood as that pass was opened; None where nothing that is drawn changes it.
        looks_for_end: whether the pass seems to have ended, so that it may do so at any batch.
        to_fetch: batches that are still to be fetched again.
        first: of a pass of which nothing is completed, its first batch: it is the next to be taken, and was drawn with
            the random numbers of that pass. END where there is none.
    """

    def __init__(
        self, data: Adapted, position: Mapping[str, Any], opening: Opening | None, *, may_have_other_length: bool
    ) -> None:
        self.position = position
        self.opening = opening
        self.looks_for_end = False
        self.to_fetch: int = 0
        self.first: Any = END
        self._data = data
        self._to_skip = 0
        self._is_warned = False
        self._number = 0  # of the batch fetched last, in its pass
        self.check: Mapping[str, Any] = position.get("check") or _NO_CHECK
        self._may_have_other_length = may_have_other_length
        self._outside: dict[str, Any] | None = None  # where the process's generators stood, while they are in the pass
        self._inside: dict[str, Any] | None = None  # and where they stand in the pass, between two of its fetches
        self._after_first: dict[str, Any] = {}  # and where, after the first fetch
        self._left: dict[str, Any] = {}  # where the process's stood when they were put back

    # The generators

    def enter(self) -> None:
        """Before the data is opened, or opened further: put the generators back to where they stand in that pass.

        Raises:
            ValueError: the data lacks a generator, or a sampler, that it had.
        """
        if self._inside is not None:
            self._outside = capture_process()
            restore_process(self._inside)
        elif self.opening is not None:
            self._outside = capture_process()
            restore(self.opening, self._data.data)

    def leave(self) -> None:
        """Put those of the process back to where they stood before. A second time does nothing."""
        outside, self._outside = self._outside, None
        if outside is not None:
            self._inside = capture_process()
            restore_process(outside)
            self._left = outside

    @coroutine
    def within(self, batch: Awaitable[Any]) -> Generator[Any, Any, Any]:
        """Await a batch of that pass. While it waits, other tasks draw the process's own numbers."""
        waiting: Any = batch.__await__()
        resume, value = waiting.send, None
        while True:
            if self._inside is not None:
                self.enter()
            try:
                wanted = resume(value)
            except StopIteration as end:
                return end.value
            finally:
                self.leave()
            try:
                resume, value = waiting.send, (yield wanted)
            except BaseException as error:  # noqa: BLE001 -- thrown into what is awaited, as `yield from` does it
                resume, value = waiting.throw, error

    # The batches

    def skip(self, batches: int) -> None:
        """Have so many batches fetched again; of a pass of which nothing is completed, its first, which is kept."""
        self._to_skip = batches
        self.to_fetch = batches or int(self.opening is not None)

    def fetched(self, batch: Any) -> bool:
        """Count a batch that was fetched again, END at the end. Returns whether to open the data once more.

        Raises:
            ValueError: the data is shorter than it was, or its length is another.
        """
        if batch is END:
            if self._number == 0 and self._begin_again():
                return True
            if self._to_skip and not self.looks_for_end:
                raise self._too_short(self._number)
            self.to_fetch = 0
            return False
        self._number += 1
        self.to_fetch -= 1
        if self._number == 1 and self._to_skip and not self.looks_for_end:
            self._refuse_other_length()
        if self._number == 1:
            self._compare(batch, self.check["first"], {}, {})
        if self._number == self.check["number"]:
            self._compare(batch, self.check["digest"], self._after_first, self._in_pass)
        elif self._number == 1:
            self._after_first = self._in_pass
        if not self._to_skip:
            self.first = batch
        return False

    def _begin_again(self) -> bool:
        """A sampler was put back to the end of the pass before: from there it begins the one that is looked for."""
        opening = self.opening
        if opening is None or all(kind != "sampler" for kind, _ in opening.own.values()):
            return False
        self.opening = None  # only once
        restore_own(opening, self._data.data, with_samplers=False)
        if self._outside is None:
            self._inside = opening.process
        else:
            restore_process(opening.process)
        return True

    @property
    def _in_pass(self) -> dict[str, Any]:
        """Where the process's generators stand in that pass."""
        return capture_process() if self._outside is not None or self._inside is None else self._inside

    def took_first(self, batch: Any) -> None:
        """Compare the batch that is taken first, after those that were skipped or where the data's own state led to.

        Raises:
            ValueError: the length of the data is another than it was.
        """
        has_skipped, self._number = self._number > 0, self.position["batches"] + 1
        if not has_skipped and self.position["batches"]:
            self._refuse_other_length()
        if self.check["number"] == self._number > int(has_skipped):
            self._compare(batch, self.check["digest"], self._left, capture_process())

    def _compare(self, batch: Any, then: Digest, before: dict[str, Any], after: dict[str, Any]) -> None:
        """`before` and `after` the last fetches, the process's generators stood there."""
        now = digest_of(batch)
        paths = differing(then, now)
        if not paths or self._is_warned:
            return
        # What is drawn at each fetch, as augmentation does it, came between the numbers that the steps drew, and does
        # not come again. It is real numbers; what a batch is chosen by is seen in the others.
        if before and plain(before) != plain(after):
            paths = [path for path in paths if not is_of_real_numbers(path, then)]
        for path in paths[:1]:
            self._is_warned = True
            warnings.warn(
                f"the data ({self._data.name}) comes in another order than in the run that is resumed: batch"
                f" {self._number} of the pass under way{f', at {path},' if path else ''} was {_shown(then[path])}, and"
                f" is {_shown(now[path])}. Some samples of this pass come twice, and others never. Draw the order from"
                " generators that are attributes of the data (torch.Generator, numpy.random.Generator, random.Random)"
                " or from the global ones, or give the data state_dict and load_state_dict",
                DataOrderWarning,
                stacklevel=2,
            )

    def _refuse_other_length(self) -> None:
        then, now, batches = self.check["length"], length_of(self._data.data), self.position["batches"]
        if then is None or now is None or then == now or self._may_have_other_length:
            return
        if now < batches:
            raise self._too_short(now)
        raise ValueError(
            f"the data ({self._data.name}) has {now} batches, and had {then} in the run that is resumed, in the middle"
            f" of a pass: after {batches} of them it would go on elsewhere. Pass the same data and batch size;"
            " or give epoch_length=, the iterations of an epoch in the run that is resumed, to go on all the same"
        )

    def _too_short(self, length: int) -> ValueError:
        return ValueError(
            f"cannot resume after {self.position['batches']} batches of the data ({self._data.name}): it has only"
            f" {length}. Pass the same data"
        )


def _shown(leaf: list[Any]) -> str:
    return f"{leaf[2]} (#{leaf[0]})"


def begin_anew(made: Any) -> None:
    """Have data that was put back to its own state begin its next pass at the beginning.

    Hugging Face's go back to the state that they were given at each pass, until they are given another. So do their
    copies in workers that are kept: those are replaced.
    """
    if getattr(made, "persistent_workers", False) and hasattr(made, "_iterator"):
        made._iterator = None  # noqa: SLF001 -- it has no public name
    if "datasets" not in sys.modules:
        return
    for _, one in walk(made):
        kind = type(one)
        if kind.__module__.partition(".")[0] == "datasets" and hasattr(kind, "load_state_dict"):
            one.load_state_dict({})
