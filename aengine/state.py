"""State: what the loop knows, and whatever users put beside it."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from traceback import format_exception
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Protocol, runtime_checkable

from aengine.type_variables import Batch, Output, with_defaults

if TYPE_CHECKING:
    from aengine.loop.progress import Progress


class StopReason(Enum):
    """Why the last `run()` ended."""

    COMPLETED = "completed"
    TERMINATED = "terminated"
    INTERRUPTED = "interrupted"
    DATA_EXHAUSTED = "data exhausted"
    CANCELLED = "cancelled"
    FAILED = "failed"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """What ended a run, as three texts. It holds no frame, and so neither the engine nor a tensor.

    Attributes:
        type: the name of the exception's class.
        message: what `str()` says of it.
        traceback: as Python prints it, with its notes and causes.
    """

    type: str
    message: str
    traceback: str


def describe_error(error: BaseException) -> ErrorInfo:
    """Describe an exception. What the exception cannot say of itself is left out."""
    try:
        message = str(error)
    except Exception:  # noqa: BLE001 -- a user's own `__str__`: the end of the run is told all the same
        message = ""
    return ErrorInfo(type(error).__name__, message, "".join(format_exception(error)))


_SHOWN = (int, float, str, Enum, type(None))
"""The types of values that are shown as they are."""

# The counters that filters of these events look at. Any other event counts its own firings.
COUNTERS: Mapping[str, str] = {
    "GET_BATCH_STARTED": "iteration",
    "GET_BATCH_COMPLETED": "iteration",
    "ITERATION_STARTED": "iteration",
    "ITERATION_COMPLETED": "iteration",
    "STARTED": "epoch",
    "EPOCH_STARTED": "epoch",
    "EPOCH_COMPLETED": "epoch",
    "COMPLETED": "epoch",
}


class State(Generic[Batch, Output]):
    """What the loop knows: its counters, the batch in hand, the last output; and users' own attributes.

    Attributes:
        iteration: iterations begun so far; while one runs, its number, from 1.
        epoch: epochs begun so far; while one runs, its number, from 1.
        iterations_completed: iterations whose step has returned: one less than `iteration` during a step, and after one
            that failed.
        epochs_completed: epochs whose end was met. At EPOCH_COMPLETED that epoch is one of them.
        epoch_start: the value of `iteration` when the epoch under way began. At EPOCH_STARTED of an epoch
            that is resumed in its middle, `iteration` is larger than this.
        epoch_length: iterations in an epoch; None until it is known.
        max_epochs: where the run ends, in epochs; None if it ends by iterations.
        max_iters: where the run ends, in iterations; None if it ends by epochs.
        batch: what the step is given; None between steps. A handler of ITERATION_STARTED may replace it.
        output: what the last step returned.
        metrics: results by name; kept from run to run.
        dataloader: the data as it was given to `run()` or `set_data()`. Read only.
        seed: free for users, as in pytorch-ignite; the loop does not read it.
        times: seconds the last epoch and the last run took, under "EPOCH_COMPLETED" and "COMPLETED".
        stop_reason: why the last call of `run()` ended, also one that was refused; None before the first end and while
            running.
        error: what the last call of `run()` raised, as text; None while running, and where it raised nothing or a
            cancellation.
        event_to_attr: which attribute counts which event (by name), for filters.

    Any other attribute can be set; it survives from run to run. Those named in `engine.state_dict_user_keys`
    are saved and loaded with the engine.
    """

    def __init__(self, **attributes: Any) -> None:
        self.iteration: int = 0
        self.epoch: int = 0
        self.iterations_completed: int = 0
        self.epochs_completed: int = 0
        self.epoch_start: int = 0
        self.epoch_length: int | None = None
        self.max_epochs: int | None = None
        self.max_iters: int | None = None
        self.batch: Batch | Any = None
        self.output: Output | Any = None
        self.metrics: dict[str, Any] = {}
        set_dataloader(self, attributes.pop("dataloader", None))
        self.seed: int | None = None
        self.times: dict[str, float | None] = {"EPOCH_COMPLETED": None, "COMPLETED": None}
        self.stop_reason: StopReason | None = None
        self.error: ErrorInfo | None = None
        self.event_to_attr: dict[str, str] = dict(COUNTERS)
        # Set by the loop and the engine: what is completed where no run is under way; None while one is.
        self.last_progress: Progress | None = None
        for name, value in attributes.items():
            setattr(self, name, value)

    @property
    def dataloader(self) -> Any:
        """The data of the run."""
        return self._dataloader

    @dataloader.setter
    def dataloader(self, _: Any) -> NoReturn:
        raise AttributeError(
            "engine.state.dataloader says what the data is, and does not change it: call engine.set_data(data), or pass"
            " it to run()"
        )

    if TYPE_CHECKING:
        # Users put what they like on the state. For type checkers only: defined for real, either of the two
        # would make every access of the loop several times slower.
        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    def __class_getitem__(cls, parameters: Any) -> Any:
        return with_defaults(cls, parameters)

    def get_event_attrib_value(self, event_name: Any) -> int:
        """Return the counter of an event, given by name or as the event itself.

        Raises:
            RuntimeError: the event counts its own firings, so no attribute holds its counter.
        """
        name = getattr(event_name, "name", event_name)
        if name not in self.event_to_attr:
            raise RuntimeError(
                f"event {name!r} has no attribute that counts it; those that have one: {', '.join(self.event_to_attr)}"
            )
        value: int = getattr(self, self.event_to_attr[name])
        return value

    @property
    def is_done(self) -> bool:
        """Whether a run has completed, from its COMPLETED on, by reaching the limits; False while one is under way."""
        progress = self.last_progress
        return progress is not None and progress.reaches(self.max_epochs, self.max_iters, self.epoch_length)

    @property
    def iterations_left(self) -> int | None:
        """How many iterations are to be completed until the limit of the run; None while that is not known.

        Where the length of an epoch changes from pass to pass, the epochs to come count as long as the present one.
        """
        if self.max_iters is not None:
            return max(0, self.max_iters - self.iterations_completed)
        if self.max_epochs is None or self.epoch_length is None:
            return None
        is_in_epoch = self.epoch > self.epochs_completed
        done = self.iterations_completed - self.epoch_start if is_in_epoch else 0
        return max(0, self.epoch_length * (self.max_epochs - self.epochs_completed) - done)

    def __repr__(self) -> str:
        shown = {
            name.removeprefix("_"): value if isinstance(value, _SHOWN) else f"<{type(value).__name__}>"
            for name, value in vars(self).items()
            if not name.startswith("__")  # as typing has them, of a State[int, float]()
        }
        return f"State({', '.join(f'{name}={value}' for name, value in shown.items())})"


def set_dataloader(state: State, data: Any) -> None:
    """Set which data a run has. Users cannot: in pytorch-ignite, assigning it has the run go on with other data."""
    # As any attribute: to write into its dictionary would make each access of the loop to the state slower, for good.
    setattr(state, "_dataloader", data)  # noqa: B010 -- the name is private to this module


@runtime_checkable
class Stateful(Protocol):
    """An object that can return its state, and be put back to it."""

    def state_dict(self) -> Any:
        """Return its state: a value that does not change when the object goes on."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Go back to that state."""


class Randomness(Protocol):
    """Captures and restores the states of the random number generators that all code of the process shares."""

    def capture(self) -> Any:
        """Return the states of the generators."""

    def restore(self, captured: Any) -> None:
        """Put them back to those states."""
