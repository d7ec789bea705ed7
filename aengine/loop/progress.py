"""Progress: what an engine has completed, where it is to end, and so where to go on. The rules of resuming.

There is one: counters go on, the epoch under way is finished, and the data goes on after the last batch whose step
completed; in memory as from a `state_dict`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aengine.data.adapt import length_of
from aengine.data.source import Source
from aengine.events import NEVER
from aengine.state import State


@dataclass(frozen=True, slots=True)
class Progress:
    """What is completed.

    Attributes:
        iteration: iterations whose step has returned.
        epoch: epochs begun.
        epoch_start: iterations completed when that epoch began.
        epoch_is_complete: whether that epoch's end was told.
        position: where the data stands, as `Source.position` gives it; None for its beginning.
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
        """Say whether a run with these limits is done."""
        if max_iters is not None:
            lacks_its_end = not self.epoch_is_complete and self.iteration - self.epoch_start == epoch_length
            return self.iteration >= max_iters and not lacks_its_end
        return max_epochs is not None and self.epoch >= max_epochs and self.epoch_is_complete


def begin(
    state: State, progress: Progress, data: Any, max_epochs: int | None, max_iters: int | None, epoch_length: int | None
) -> Progress:
    """Set the limits of a run that begins, or goes on. Returns where it begins.

    Raises:
        ValueError: the arguments contradict each other, or what the engine is in the middle of.
    """
    _check_positive(max_epochs=max_epochs, max_iters=max_iters, epoch_length=epoch_length)
    if max_epochs is not None and max_iters is not None:
        raise ValueError("max_epochs= and max_iters= exclude each other: give the one by which the run is to end")
    _check_limit(
        "max_epochs", max_epochs, state.max_epochs, other="max_iters", other_set=state.max_iters, done=progress.epoch
    )
    _check_limit(
        "max_iters", max_iters, state.max_iters, other="max_epochs", other_set=state.max_epochs, done=progress.iteration
    )
    length = length_of(data)
    if length == 0:
        raise ValueError(f"the data has length 0 ({type(data).__qualname__}): pass data that has batches")
    if state.max_epochs is None and state.max_iters is None:
        return _begin_anew(state, data, max_epochs, max_iters, epoch_length or length)
    limits = max_epochs or state.max_epochs, max_iters or state.max_iters
    if progress.reaches(*limits, state.epoch_length) and not progress.is_loaded:
        return _begin_anew(state, data, max_epochs, max_iters, epoch_length or length)
    if epoch_length is not None and state.epoch_length not in (None, epoch_length):
        raise ValueError(
            f"epoch_length={epoch_length} was given, but the run to be resumed has epochs of {state.epoch_length}"
            " iterations: leave it out, or set engine.state.max_epochs = engine.state.max_iters = None to begin anew"
        )
    epoch_length = state.epoch_length or epoch_length or length
    _check_length(epoch_length, data)
    state.max_epochs, state.max_iters = limits
    state.epoch_length = epoch_length
    state.iteration, state.epoch, state.epoch_start = progress.iteration, progress.epoch, progress.epoch_start
    state.set_progress(None)
    return progress


def _begin_anew(
    state: State, data: Any, max_epochs: int | None, max_iters: int | None, epoch_length: int | None
) -> Progress:
    if data is None:
        epoch_length = epoch_length or state.epoch_length
    _check_length(epoch_length, data)
    state.max_epochs = 1 if max_epochs is None and max_iters is None else max_epochs
    state.max_iters = max_iters
    state.epoch_length = epoch_length
    state.iteration = state.epoch = state.epoch_start = 0
    state.set_progress(None)
    return Progress()


def _check_positive(**limits: Any) -> None:
    for name, value in limits.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name}= must be a whole number from 1 on, got {value!r}")


def _check_limit(
    name: str, given: int | None, now: int | None, *, other: str, other_set: int | None, done: int
) -> None:
    if given is None:
        return
    if other_set is not None:
        raise ValueError(
            f"{name}={given} was given, but the engine counts by {other}={other_set}: set engine.state.{other} = None"
            " first, which begins anew"
        )
    if now is not None and given < done:
        raise ValueError(
            f"{name}={given} was given, but the engine has done {done} already: give more, or set engine.state.{name} ="
            " None first, which begins anew"
        )


def _check_length(epoch_length: int | None, data: Any) -> None:
    if data is None and epoch_length is None:
        raise ValueError(
            "epoch_length= is needed where there is no data to count: run(epoch_length=..., max_epochs=...)"
        )


def last_iteration(state: State) -> int:
    """Return the number of the last iteration of a run, NEVER if that is not known."""
    if state.max_iters is not None:
        return state.max_iters
    if state.max_epochs is None or state.epoch_length is None:
        return NEVER
    return state.epoch_start + state.epoch_length * (state.max_epochs - state.epoch + 1)


def tell_exhaustion(state: State, source: Source, done: int, began_with: int) -> str:
    """Return the sentence that says that the data has ended too early, and what to pass instead."""
    if source.is_one_shot:
        why, what = f"it is a one-shot iterator ({source.data!r})", "the function itself, or a fresh iterator"
    else:
        why, what = f"begun again, it gave nothing ({source.name})", "data that can be iterated again"
    if not done or (source.is_one_shot and done == began_with):
        return f"the data is empty, or was used up before: {why}. Pass {what}"
    length, epochs, iterations = state.epoch_length, state.max_epochs, state.max_iters
    if iterations is not None:
        total, enough = str(iterations), f", or max_iters={done}"
    else:
        total = str(length * epochs) if length and epochs else "an unknown number of"
        enough = f", or epoch_length={done // epochs}" if epochs and done >= epochs else ""
    return f"the data ended after {done} of {total} iterations and cannot be restarted: {why}. Pass {what}{enough}"


def to_state_dict(
    progress: Progress, state: State, fired: Mapping[str, int], user_keys: Sequence[str]
) -> dict[str, Any]:
    """Return what `from_state_dict` takes. Nothing in it but plain values, and what the data and the user put there."""
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
    progress = _progress_of_ours(saved) if "progress" in saved else _progress_of_ignite(saved)
    state.epoch_length = saved["epoch_length"]
    state.max_epochs, state.max_iters = saved.get("max_epochs"), saved.get("max_iters")
    state.iteration, state.epoch, state.epoch_start = progress.iteration, progress.epoch, progress.epoch_start
    for key in user_keys:
        setattr(state, key, saved[key])
    state.set_progress(progress)
    return progress


def _progress_of_ours(saved: Mapping[str, Any]) -> Progress:
    return Progress(iteration=saved["iteration"], position=saved["data"], is_loaded=True, **saved["progress"])


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
