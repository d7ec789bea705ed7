"""The state_dict of an engine: how its progress is saved and loaded, this package's form and pytorch-ignite's."""

from collections.abc import Mapping, Sequence
from typing import Any

from aengine.arguments import check_whole
from aengine.data.position import plain_position
from aengine.loop.progress import Progress
from aengine.state import State


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
            "is_of_passes": progress.is_of_passes,
        },
        "data": plain_position(progress.position),
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
        TypeError: this is no state_dict.
        ValueError: a key is missing, a value is none of its kind, or two contradict each other. Nothing has been
            changed then.
    """
    if not isinstance(saved, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"load_state_dict() takes what an engine's state_dict() returned, a dictionary; got {saved!r}")
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
    for key in ("epoch_length", *limits, *counters):
        if saved[key] is not None or key in counters:
            check_whole(saved[key], f'"{key}" in the state_dict', minimum=0)
    if "progress" in saved:
        progress = Progress(iteration=saved["iteration"], position=saved["data"], is_loaded=True, **saved["progress"])
    else:
        progress = _progress_of_ignite(saved)
    _refuse_past_its_end(progress, saved)
    state.epoch_length = saved["epoch_length"]
    state.max_epochs, state.max_iters = saved.get("max_epochs"), saved.get("max_iters")
    progress.show_in(state)
    for key in user_keys:
        setattr(state, key, saved[key])
    state.last_progress = progress
    return progress


def _refuse_past_its_end(progress: Progress, saved: Mapping[str, Any]) -> None:
    for limit, done in (("max_epochs", progress.epoch), ("max_iters", progress.iteration)):
        if saved.get(limit) is not None and done > saved[limit]:
            counted = "epochs" if limit == "max_epochs" else "iterations"
            raise ValueError(
                f"the state_dict lies past its own end: {done} {counted}, and {limit} is {saved[limit]}. Set"
                f' state_dict["{limit}"] to where the run is to end'
            )


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
