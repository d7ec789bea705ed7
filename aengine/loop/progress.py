"""Progress: what an engine has completed, where it is to end, and so where to go on. The rules of resuming.

There is one: counters go on, the epoch under way is finished, and the data goes on after the last batch whose step
completed; in memory as from a `state_dict`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from aengine.arguments import check_whole
from aengine.data.adapt import Adapted
from aengine.state import State

Limits: TypeAlias = tuple[int | None, int | None, int | None]
"""max_epochs, max_iters, epoch_length, as they were given to `run()`."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What is completed.

    Attributes:
        iteration: iterations whose step has returned.
        epoch: epochs begun.
        epoch_start: iterations completed when that epoch began.
        epoch_is_complete: whether that epoch's end was reported.
        is_of_passes: whether an epoch is a pass over the data, since no `epoch_length` was given.
        position: where the data stands, as `DataPosition.after` returns it; None for its beginning.
        is_loaded: whether this comes from a `state_dict`. A run that is done then has nothing left but its last event;
            in memory the engine begins anew.
    """

    iteration: int = 0
    epoch: int = 0
    epoch_start: int = 0
    epoch_is_complete: bool = True
    is_of_passes: bool = False
    position: Mapping[str, Any] | None = None
    is_loaded: bool = False

    def show_in(self, state: State) -> None:
        """Set the counters of a state."""
        state.iteration = state.iterations_completed = self.iteration
        state.epoch, state.epoch_start = self.epoch, self.epoch_start
        state.epochs_completed = self.epoch - (not self.epoch_is_complete)

    def reaches(self, max_epochs: int | None, max_iters: int | None, epoch_length: int | None) -> bool:
        """Say whether a run with these limits is done. This is the only place that decides it."""
        if max_iters is not None:
            # Reached inside an epoch, that epoch fires no EPOCH_COMPLETED; reached with its last iteration, it does.
            lacks_its_end = not self.epoch_is_complete and self.iteration - self.epoch_start == epoch_length
            return self.iteration >= max_iters and not lacks_its_end
        return max_epochs is not None and self.epoch >= max_epochs and self.epoch_is_complete


def begin(
    state: State,
    progress: Progress,
    data: Adapted,
    max_epochs: int | None,
    max_iters: int | None,
    epoch_length: int | None,
) -> Progress:
    """Set the limits of a run that begins, or goes on. Returns where it begins.

    Without `epoch_length` an epoch is a pass over the data, and its length may be another each time.

    Raises:
        ValueError: the arguments contradict each other, or the run that is to go on. Nothing has been changed then.
    """
    for name, value in (("max_epochs=", max_epochs), ("max_iters=", max_iters), ("epoch_length=", epoch_length)):
        if value is not None:
            check_whole(value, name, minimum=1)
    if max_epochs is not None and max_iters is not None:
        raise ValueError("max_epochs= and max_iters= exclude each other: give the one by which the run is to end")
    _check_limit("max_epochs", max_epochs, state, "max_iters", progress.epoch)
    _check_limit("max_iters", max_iters, state, "max_epochs", progress.iteration)
    if data.length == 0:
        raise ValueError(f"the data has length 0 ({data.name}): pass data that has batches")
    length = epoch_length or data.length
    limits = max_epochs or state.max_epochs, max_iters or state.max_iters
    is_done = progress.reaches(*limits, state.epoch_length) and not progress.is_loaded
    if is_done or (state.max_epochs is None and state.max_iters is None):  # begin anew
        progress = Progress(is_of_passes=True)
        limits = 1 if max_epochs is None and max_iters is None else max_epochs, max_iters
        if data.data is None:
            length = length or state.epoch_length
    else:
        if epoch_length is not None and state.epoch_length not in (None, epoch_length):
            raise ValueError(
                f"epoch_length={epoch_length} was given, but the run to be resumed has epochs of {state.epoch_length}"
                " iterations: leave it out, or set engine.state.max_epochs = engine.state.max_iters = None to begin"
                " anew"
            )
        length = state.epoch_length or length
    if data.data is None and length is None:
        raise ValueError(
            "epoch_length= is needed where there is no data to count: run(epoch_length=..., max_epochs=...)"
        )
    state.max_epochs, state.max_iters = limits
    state.epoch_length = length
    progress.show_in(state)
    state.last_progress = None
    is_of_passes = progress.is_of_passes and epoch_length is None and data.data is not None
    return progress if progress.is_of_passes == is_of_passes else replace(progress, is_of_passes=is_of_passes)


def refuse_other_arguments(state: State, name: str, data: Any, limits: Limits) -> None:
    """Raise ValueError where a run that was interrupted is to go on with other arguments than it began with."""
    given = zip(("max_epochs", "max_iters", "epoch_length"), limits, strict=True)
    other = [
        f"{argument}={value} (it has {getattr(state, argument)})"
        for argument, value in given
        if value not in (None, getattr(state, argument))
    ]
    if data is not None and data is not state.dataloader:
        other.append("other data")
    if other:
        raise ValueError(
            f"engine {name!r} was interrupted and goes on where it was, so it cannot take {', '.join(other)}: call"
            " run() with what it was called with, or without arguments; set_data() changes the data"
        )


def _check_limit(name: str, given: int | None, state: State, other: str, done: int) -> None:
    now, counted_by = getattr(state, name), getattr(state, other)
    if given is not None and counted_by is not None:
        raise ValueError(
            f"{name}={given} was given, but the engine counts by {other}={counted_by}: set engine.state.{other} = None"
            " first, which begins anew"
        )
    if given is not None and now is not None and given < done:
        raise ValueError(
            f"{name}={given} was given, but the engine has done {done} already: give more, or set engine.state.{name} ="
            " None first, which begins anew"
        )
