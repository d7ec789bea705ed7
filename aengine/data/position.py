"""Where a run stands in its data, how data is put back there, and what was fetched and not stepped on.

The position is that of the last completed step. Data with a `state_dict` is put back to its own state; data of known
length is fast-forwarded: opened again, with the random numbers of that pass, and batches are fetched and dropped.
"""

import logging
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from types import FunctionType
from typing import Any

from aengine.data.adapt import Adapted, has, is_stateful, length_of
from aengine.data.digest import Digest, digest_of
from aengine.data.generators import Opening, capture, has_workers, start_workers
from aengine.data.prefetch import DataState, Fetched
from aengine.data.rewind import END, Rewind, begin_anew
from aengine.state import Stateful

_MAY_REPEAT = (
    "goes on where it is, and is not fast-forwarded by {} batches: without a length it may be a stream. If it gives the"
    " same batches each time, those come again: give it __len__, or state_dict and load_state_dict"
)


def plain_position(position: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return a position as plain values, for a `state_dict`; the data's own state is as the data made it."""
    if position is None:
        return None
    opening = position.get("opening")
    return {**position, "opening": opening.plain() if isinstance(opening, Opening) else opening}


class DataPosition:
    """The position in one pass after another over the data.

    Attributes:
        length: batches in a pass, as the data says or as a pass was found to have; None while that is not known.
        said: what `len(data)` was when it was last asked for; None where the data does not say.
        origin: the count of completed iterations at which this pass over the data began.
        unread: fetched and not stepped on, in an earlier run or ahead of the step: the next to be taken.
        stateful: what was opened, where it has a `state_dict` of its own.
        rewind: the return to a position that is under way, if there is one.
    """

    said: Any

    def __init__(
        self,
        data: Adapted,
        logger: logging.Logger,
        unread: Iterable[Fetched],
        completed: int,
        *,
        may_have_other_length: bool,
    ) -> None:
        self.length = self.said = data.length
        self.origin: int = completed
        self.unread: deque[Fetched] = deque(unread)
        self.stateful: Stateful | None = None
        self.rewind: Rewind | None = None
        self._data = data
        self._logger = logger
        self._may_have_other_length = may_have_other_length
        self._is_exact = _has_exact_length(data.data)  # whether a pass is known to have as many batches as that
        self._taken = 0  # batches of this pass
        self._before: DataState = None  # the data's own state before and after the batch last taken
        self._after: DataState = None
        self._ended_after: int | None = None  # batches of this pass, once its end was met
        self._opening: Opening | None = None  # where the generators stood as this pass was opened
        self._first: Digest = {}  # of the first batch of this pass, if its order may be another each time
        self._is_opened = False
        self._was_put_back = False
        self._is_mixed = False
        self._had_workers: bool | None = None  # in the run that is resumed, until the data is opened

    # What is completed

    def after(self, completed: int) -> dict[str, Any]:
        """Return the position after the last completed step: what `resume_at` takes."""
        batches = completed - self.origin
        return {
            "batches": batches,
            "length": self.length,
            "state": self._after if self._taken <= batches else self._before,  # a batch in hand is not stepped on
            "is_at_end": batches > 0 and (batches == self._ended_after or (batches == self.said and self._is_exact)),
            "opening": self._opening,
            "has_workers": has_workers(self._data.data),
        }

    def with_check(self, position: Mapping[str, Any], consumed: Any, following: Any) -> dict[str, Any]:
        """Return a position with what is compared when the data is put back there: its length, and one of its batches.

        That is the batch consumed last, if it is not None, or the one that follows it, if it is not END.
        """
        if self.rewind is not None:  # not opened since
            return {**position, "check": self.rewind.check}
        number, digest = position["batches"], {}
        if self._data.is_one_shot or position["is_at_end"] or number == self.length:  # no more of this pass is to come
            return {**position, "check": {"length": self.said, "first": {}, "number": 0, "digest": {}}}
        if consumed is not None and number:
            digest = digest_of(consumed)
        elif following is not END:
            number, digest = number + 1, digest_of(following)
        else:
            number = 0
        check = {"length": self.said, "first": self._first, "number": number, "digest": digest}
        return {**position, "check": check}

    def end(self, completed: int) -> None:
        """The end of this pass was met, so that its length is known."""
        self._ended_after = batches = completed - self.origin
        if batches and not self._is_mixed:
            self.length = batches
        self._is_exact = batches == self.said

    def restart(self, completed: int) -> None:
        """The next pass begins."""
        self.unread.clear()
        self.origin = completed
        self.rewind = self._opening = None
        self._first = {}
        self._ended_after = None
        self._is_opened = False
        self._taken = 0
        self._before = self._after = None

    # Taking

    def took(self, batch: Any, state: DataState) -> Any:
        """Count a batch that is taken, after which the data has this state, and return the batch."""
        self._taken += 1
        self._before, self._after = self._after, state
        return batch

    def took_first(self, batch: Any) -> None:
        """A batch is the first that is taken since the data was opened."""
        rewind, self.rewind = self.rewind, None
        if rewind is not None:
            self._first = rewind.check["first"]
            rewind.took_first(batch)
        elif self._opening is not None and self.stateful is None:
            self._first = digest_of(batch)

    def unread_batch(self, batch: Any) -> None:
        """The batch last taken was not stepped on: it is the next one."""
        self.unread.appendleft(Fetched(batch, self._after))
        self._taken -= 1
        self._after = self._before

    @property
    def fetched(self) -> int:
        """For how many iterations batches were fetched, since the first run."""
        return self.origin + self._taken + len(self.unread)

    def state(self) -> DataState:
        """Return the data's own state, None if it has none."""
        return None if self.stateful is None else self.stateful.state_dict()

    def ask_length(self) -> int | None:
        """Ask the data how many batches a pass has: it may be another number for each. None if it does not say."""
        said = length_of(self._data.data)
        if said is not None and said != self.said:
            self.said = self.length = said
        return said

    @property
    def may_be_at_end(self) -> bool:
        """Whether the pass to be gone on with seems to have ended, so that only its end is left to be looked for."""
        position = None if self.rewind is None else self.rewind.position
        if position is None or not position["batches"] or position["state"] is not None:
            return False
        return bool(position.get("is_at_end")) or position["batches"] == self.length

    def look_for_end(self) -> bool:
        """Have no more than the end of that pass looked for. Returns whether that is over, as the data has changed."""
        if self.rewind is not None and length_of(self._data.data) == self.said:
            self.rewind.looks_for_end = True
            return False
        self.rewind = None
        return True

    @property
    def can_return(self) -> bool:
        """Whether the data, opened again, can be put back to where it stands."""
        return self._can_skip or self.stateful is not None

    @property
    def _can_skip(self) -> bool:
        return not self._data.is_one_shot and self.length is not None

    # Going back there

    def resume_at(self, position: Mapping[str, Any], completed: int) -> bool:
        """Have the data put back to a position when it is opened. Returns whether that is its end, with no need to."""
        self.origin = completed - position["batches"]
        self._taken = position["batches"]
        self._after = position["state"]
        self._opening = opening = Opening.from_plain(position.get("opening"))
        self._had_workers = position.get("has_workers")
        self.length = position["length"] or self.length
        self.said = position.get("check", {"length": self.said})["length"]  # in this pass; each may have another
        is_at_end = position["state"] is None and position.get("is_at_end", False) and not self._data.is_one_shot
        # A sampler with its own generator draws from it again when it is exhausted, so its iterator must really be run
        # to StopIteration.
        if is_at_end and not (opening is not None and opening.own):
            self._ended_after = position["batches"]
            return True
        if position["batches"] or position["state"] or opening is not None:
            self.rewind = Rewind(self._data, position, opening, may_have_other_length=self._may_have_other_length)
        return False

    def open(self) -> None:
        """Before the data is opened: keep where the generators stand, or put them back for a pass to be gone on with.

        It may be opened in several parts. After each, `leave()` puts those of the process back to where they stood.

        Raises:
            ValueError: the data lacks a generator, or a sampler, that it had.
        """
        if self.rewind is not None:
            self.rewind.enter()
        elif not self._is_opened and not self._data.is_one_shot:
            if self._had_workers:
                start_workers(self._data.data)
            self._opening = capture(self._data.data)
        self._is_opened, self._had_workers = True, None

    def leave(self) -> None:
        """Put the generators of the process back to where they stood before `open()`."""
        if self.rewind is not None:
            self.rewind.leave()

    def put_back(self, made: Any) -> None:
        """Put back what was opened, before it is iterated, to the position to be resumed at, if there is one."""
        self.stateful = made if is_stateful(made) else None
        if self._was_put_back:
            self._was_put_back = False
            begin_anew(made)
        if self.rewind is None:
            self._forget_if_mixed()
            return
        position, level = self.rewind.position, logging.INFO
        if self.stateful is not None and position["state"] is not None:
            self.unread.clear()
            self.stateful.load_state_dict(position["state"])
            self._was_put_back = True
            how = "was put back to its own state"
        elif self._can_skip or not (position["batches"] or self._goes_on_after_unread(made)):
            self.unread.clear()
            self.rewind.skip(position["batches"])
            how = f"is fast-forwarded: {position['batches']} batches are fetched and dropped"
        else:
            self.origin += position["batches"]
            self._taken = 0
            self.rewind.leave()
            self.rewind = None
            self._forget_if_mixed()
            how = "goes on where it is: it cannot be fast-forwarded"
            if not self._data.is_one_shot and not self._data.is_manager:  # only the user knows whether that is right
                level, how = logging.WARNING, _MAY_REPEAT.format(position["batches"] + len(self.unread))
        self._logger.log(level, "resuming: the data (%s) %s", self._data.name, how)

    def _goes_on_after_unread(self, made: Any) -> bool:
        """Say whether what was fetched and not stepped on would be lost: its own iterator may not give that again."""
        return bool(self.unread) and (has(made, "__next__") or has(made, "__anext__"))

    def _forget_if_mixed(self) -> None:
        """A pass that goes on with what an earlier one had fetched is none that could be gone back to, or counted."""
        self._is_mixed = bool(self.unread)
        if self._is_mixed:
            self._opening = None

    def end_rewind(self) -> None:
        """Those that were to be fetched again have been; the first of a pass is the next to be taken."""
        rewind = self.rewind
        if rewind is not None and rewind.first is not END:
            self.unread.append(Fetched(rewind.first, self.state()))
            rewind.first = END


def _has_exact_length(data: Any) -> bool:
    """Say whether `len()` of this is surely the number of batches in a pass: of lists, and torch's own DataLoaders."""
    parts = (getattr(data, name, None) for name in ("dataset", "sampler", "batch_sampler"))
    return _have_exact_length(type(data), *map(type, parts))


def _compare_types(kind: type, dataset: type, *samplers: type) -> bool:
    if issubclass(kind, list | tuple | range | dict | str | bytes):
        return not isinstance(getattr(kind, "__iter__", None), FunctionType)
    torch = sys.modules.get("torch.utils.data")
    if torch is None or kind is not torch.DataLoader or issubclass(dataset, torch.IterableDataset):
        return False
    return all(one is type(None) or one.__module__.startswith("torch.utils.data") for one in samplers)


_have_exact_length: Callable[..., bool] = lru_cache(maxsize=1_024)(_compare_types)  # one of torch's takes 5 us
