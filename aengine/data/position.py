"""Where a run stands in its data, how data is put back there, and what was fetched and not stepped on.

The position is that of the last completed step. Data with a `state_dict` is put back to its own state; data of known
length is fast-forwarded: opened again, with the random numbers of that pass, and batches are fetched and dropped.
"""

import logging
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from aengine.data.adapt import Adapted, is_stateful
from aengine.data.prefetch import DataState, Fetched
from aengine.state import Randomness, Stateful

_MAY_REPEAT = (
    "goes on where it is, and is not fast-forwarded by {} batches: without a length it may be a stream. If it gives the"
    " same batches each time, those come again: give it __len__, or state_dict and load_state_dict"
)


class DataPosition:
    """The position in one pass after another over the data.

    Attributes:
        length: batches in a pass; None while that is not known.
        unread: fetched and not stepped on, in an earlier run or ahead of the step: the next to be taken.
        stateful: what was opened, where it has a `state_dict` of its own.
        to_skip: batches that are to be fetched and dropped before the first that is taken.
    """

    def __init__(
        self,
        data: Adapted,
        logger: logging.Logger,
        randomness: Randomness | None,
        unread: Iterable[Fetched],
        completed: int,
    ) -> None:
        self.length = data.length
        self.unread: deque[Fetched] = deque(unread)
        self.to_skip = 0
        self._data = data
        self._logger = logger
        self.stateful: Stateful | None = None
        self._origin = completed  # the count of completed iterations at which this pass over the data began
        self._taken = 0  # batches of this pass
        self._before: DataState = None  # the data's own state before and after the batch last taken
        self._after: DataState = None
        self._resume_at: Mapping[str, Any] | None = None
        self._was_put_back = False
        self._randomness = randomness
        self._rng_at_start: Any = None  # RNG states at the start of this pass
        self._rng_before_rewind: Any = None  # RNG states to return to after the rewind

    # What is completed

    def after(self, completed: int) -> dict[str, Any]:
        """Return the position after the last completed step: what `resume_at` takes."""
        batches = completed - self._origin
        state = self._after if self._taken <= batches else self._before  # a batch in hand is not stepped on
        position = {"batches": batches, "length": self.length, "state": state}
        return position if self._randomness is None else {**position, "opening": self._rng_at_start}

    def end(self, completed: int) -> None:
        """The end of this pass was met, so that its length is known."""
        self.length = completed - self._origin

    def restart(self, completed: int) -> None:
        """The next pass begins."""
        self.unread.clear()
        self._origin = completed
        self._resume_at = None
        self._taken = 0
        self._before = self._after = None

    # Taking

    def took(self, batch: Any, state: DataState) -> Any:
        """Count a batch that is taken, after which the data has this state, and return the batch."""
        self._taken += 1
        self._before, self._after = self._after, state
        return batch

    def unread_batch(self, batch: Any) -> None:
        """The batch last taken was not stepped on: it is the next one."""
        self.unread.appendleft(Fetched(batch, self._after))
        self._taken -= 1
        self._after = self._before

    @property
    def fetched(self) -> int:
        """For how many iterations batches were fetched, since the first run."""
        return self._origin + self._taken + len(self.unread)

    def state(self) -> DataState:
        """Return the data's own state, None if it has none."""
        return None if self.stateful is None else self.stateful.state_dict()

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
        self._resume_at = position
        self._origin = completed - position["batches"]
        self._taken = position["batches"]
        self._after = position["state"]
        self._rng_at_start = position.get("opening")
        self.length = self.length or position["length"]
        is_at_end = position["state"] is None and position["batches"] == self.length and not self._data.is_one_shot
        # A sampler with its own generator draws from it again when it is exhausted, so its iterator must really be run
        # to StopIteration.
        if is_at_end and not (self._randomness is not None and self._randomness.has_own(self._data.data)):
            self._resume_at = None
            return True
        return False

    def rewind(self, made: Any) -> None:
        """Put back what was opened to the position to be resumed at, before it is iterated; `to_skip` says the rest.

        Data may draw random numbers when it is opened. It has done so in the run that is resumed, and is to draw the
        same ones now and none of the process's: call `end_rewind()` once the batches are skipped.
        """
        self.stateful = made if is_stateful(made) else None
        if self._was_put_back and type(made).__module__.partition(".")[0] == "datasets":
            # Hugging Face's go back to the state that they were given at each pass, until they are given another.
            made.load_state_dict({})
        position, self._resume_at = self._resume_at, None
        self.to_skip, randomness, level = 0, self._randomness, logging.INFO
        if position is None or not (position["batches"] or position["state"]):
            if randomness is not None:
                self._rng_at_start = randomness.capture(self._data.data)
            return
        if randomness is not None:
            self._rng_before_rewind = randomness.capture(None)
        if self.stateful is not None and position["state"] is not None:
            self.unread.clear()
            self.stateful.load_state_dict(position["state"])
            self._was_put_back = True
            how = "was put back to its own state"
        elif self._can_skip:
            self.unread.clear()
            self.to_skip = int(position["batches"])
            if randomness is not None and self._rng_at_start is not None:
                randomness.restore(self._rng_at_start, self._data.data)
            how = f"is fast-forwarded: {self.to_skip} batches are fetched and dropped"
        else:
            self._origin += position["batches"]
            self._taken = 0
            how = "goes on where it is: it cannot be fast-forwarded"
            if not self._data.is_one_shot and not self._data.is_manager:  # only the user knows whether that is right
                level, how = logging.WARNING, _MAY_REPEAT.format(position["batches"])
        self._logger.log(level, "resuming: the data (%s) %s", self._data.name, how)

    def end_rewind(self) -> None:
        """The batches are skipped: have the process draw the random numbers that it would have drawn without that."""
        self.to_skip = 0
        before, self._rng_before_rewind = self._rng_before_rewind, None
        if before is not None and self._randomness is not None:
            self._randomness.restore(before, None)

    def too_short(self, length: int) -> ValueError:
        """Return the error for data that ended while batches of it were skipped."""
        return ValueError(
            f"cannot resume after {self.to_skip} batches of the data ({self._data.name}): it has only {length}. Pass"
            " the same data"
        )
