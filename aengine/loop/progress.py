"""Progress: what an engine has completed, where it is to end, and so where to go on. The rules of resuming.

There is one: counters go on, the epoch under way is finished, and the data goes on after the last batch whose step
completed; in memory as from a `state_dict`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aengine.arguments import check_whole
from aengine.data.adapt import Adapted
from aengine.events import NEVER
from aengine.state import State


@dataclass(frozen=True, slots=True)
class Progress:
    """What is completed.

    Attributes:
        iteration: iterations whose step has returned.
        epoch: epochs begun.
        epoch_start: iterations completed when that epoch began.
        epoch_is_complete: whether that epoch's end was reported.
        position: where the data stands, as `DataPosition.after` returns it; None for its beginning.
        is_loaded: whether this comes from a `state_dict`. A run that is done then has nothing left but its last event;
            in memory the engine begins anew.
    """

    iteration: int = 0
    epoch: int = 0
    epoch_start: int = 0
    epoch_is_complete: bool = True
    position: Mapping[str, Any] | None = None
    is_loaded: bool = False

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
        progress = Progress()
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
    state.iteration, state.epoch, state.epoch_start = progress.iteration, progress.epoch, progress.epoch_start
    state.set_progress(None)
    return progress


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


def last_iteration(state: State) -> int:
    """Return the number of the last iteration of a run, NEVER if that is not known."""
    if state.max_iters is not None:
        return state.max_iters
    if state.max_epochs is None or state.epoch_length is None:
        return NEVER
    return state.epoch_start + state.epoch_length * (state.max_epochs - state.epoch + 1)


def to_state_dict(
    progress: Progress, state: State, fired: Mapping[str, int], user_keys: Sequence[str]
) -> dict[str, Any]:
    """Return what `from_state_dict` takes: plain values, and what the data and the user have put there."""
    limit = "max_epochs" if state.max_iters is None else "max_iters"
    saved: dict[str, Any] = {
        "epoch_length": state.epoch_length,
        "iteration": progress.iteration,
        limit: getattr(state, limit),
        "progress": {
            "epoch": progress.epoch,
            "epoch_start": progress.epoch_start,
            "epoch_is_complete": progress.epoch_is_complete,
        },
        "data": None if progress.position is None else dict(progress.position),
        "fired": dict(fired),
    }
    for key in user_keys:
        if not hasattr(state, key):
            raise ValueError(f"state_dict_user_keys names {key!r}, but engine.state has no such attribute")
        saved[key] = getattr(state, key)
    return saved


def from_state_dict(saved: Mapping[str, Any], state: State, user_keys: Sequence[str]) -> Progress:
    """Set the state's limits and counters from a `state_dict`, ours or pytorch-ignite's. Returns the progress.

    Raises:
        ValueError: a key is missing, or two contradict each other. Nothing has been changed then.
    """
    limits = [name for name in ("max_epochs", "max_iters") if name in saved]
    counters = [name for name in ("iteration", "epoch") if name in saved]
    if "epoch_length" not in saved or len(limits) != 1 or len(counters) != 1:
        raise ValueError(
            'the state_dict of an engine has "epoch_length", either "iteration" or "epoch", and either "max_epochs" or'
            f' "max_iters"; this one has {sorted(saved)}'
        )
    absent = [key for key in user_keys if key not in saved]
    if absent:
        raise ValueError(f"state_dict_user_keys names {absent}, which the state_dict has not: it has {sorted(saved)}")
    if "progress" in saved:
        progress = Progress(iteration=saved["iteration"], position=saved["data"], is_loaded=True, **saved["progress"])
    else:
        progress = _progress_of_ignite(saved)
    state.epoch_length = saved["epoch_length"]
    state.max_epochs, state.max_iters = saved.get("max_epochs"), saved.get("max_iters")
    state.iteration, state.epoch, state.epoch_start = progress.iteration, progress.epoch, progress.epoch_start
    for key in user_keys:
        setattr(state, key, saved[key])
    state.set_progress(progress)
    return progress


def _progress_of_ignite(saved: Mapping[str, Any]) -> Progress:
    """Read ignite's, which counts epochs from 0 and takes a multiple of the epoch's length for its end."""
    length = saved["epoch_length"]
    if not length:
        if saved.get("iteration", 0) or saved.get("epoch", 0):
            raise ValueError(
                '"epoch_length" must be a positive number to tell epochs from iterations in this state_dict'
            )
        return Progress()
    iteration = saved["iteration"] if "iteration" in saved else saved["epoch"] * length
    complete, under_way = divmod(iteration, length)
    return Progress(
        iteration=iteration,
        epoch=complete + (under_way > 0),
        epoch_start=complete * length,
        epoch_is_complete=not under_way,
        position={"batches": under_way, "length": length, "state": None},
        is_loaded=True,
    )
