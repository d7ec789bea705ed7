"""Outcome: what went wrong in a run, and what of it `run()` raises."""

import logging
from typing import cast

from aengine.errors import StrayCancellation, raise_failures


class Outcome:
    """Collects the failures and the cancellation of one run, where each of them is noticed.

    Failures are recorded as they happen, not taken out of the task group's exception later: trio copies the groups that
    pass through it, and the user is to get the very object that was raised.

    Attributes:
        error: what the loop ended with, if that is no cancellation.
        failures: the loop's and those of what runs beside it, in order.
    """

    def __init__(self, name: str, logger: logging.Logger) -> None:
        self.error: BaseException | None = None
        self.failures: list[BaseException] = []
        self.cancellation: BaseException | None = None
        self._name = name
        self._logger = logger
        self._failures_before: int | None = None  # how many there were when a cancellation came

    def add(self, error: BaseException) -> None:
        """Add a failure, unless it is there already."""
        if not any(error is one for one in self.failures):
            self.failures.append(error)

    def add_cancellation(self, error: BaseException) -> None:
        """Add a cancellation. Ctrl-C is no cancellation but the cause of one, so it is a failure."""
        if isinstance(error, KeyboardInterrupt | SystemExit):
            self.add(error)
        else:
            self.cancellation = error

    def mark_cancelled(self) -> None:
        """A cancellation has come: what fails from now on may be its consequence."""
        if self._failures_before is None:
            self._failures_before = len(self.failures)

    def end_loop_with(self, error: BaseException, *, is_cancellation: bool) -> None:
        """The loop has raised this, and is over."""
        if is_cancellation and not isinstance(error, KeyboardInterrupt | SystemExit):
            self.cancellation = error
        else:
            self.error = error
            self.add(error)

    @property
    def first_error(self) -> BaseException | None:
        """What failed the run, as far as is known: what the loop ended with, or what failed first beside it."""
        return self.error or next(iter(self.failures), None)

    def raise_all(self, ending: BaseException | None, also_raised: list[BaseException]) -> None:
        """Raise what is to come out of `run()`: a single failure as it is, several as a group, or the cancellation.

        Args:
            ending: what came out of the run's task group.
            also_raised: errors of handlers while the first one was being reported to them.
        """
        failures = [*self.failures, *also_raised]
        if isinstance(ending, BaseExceptionGroup):  # an error of this package's, in a task: not to be hidden
            failures += cast(BaseExceptionGroup[BaseException], ending).exceptions
            ending = None
        cancellation = ending or self.cancellation
        before = len(failures) if self._failures_before is None else self._failures_before
        raised: list[BaseException] = []
        for index, error in enumerate(failures):
            # A cancellation always goes on, so what failed because of it is only logged. Ctrl-C, wherever it was
            # raised, is its cause, and is raised in its place.
            if cancellation is None or isinstance(error, KeyboardInterrupt | SystemExit):
                raised.append(error)
            elif isinstance(error, StrayCancellation):  # the same cancellation, in another task of the run
                continue
            elif index < before or error is self.error:
                raised.append(error)
            else:
                self._logger.error("engine %r failed while it was cancelled", self._name, exc_info=error)
            del error
        try:
            raise_failures(self._name, raised, cancellation)
        finally:
            failures.clear()  # the traceback holds this frame: no cycle may hold the engine
            raised.clear()
            del cancellation, ending

    def clear(self) -> None:
        """Let go of all errors: their tracebacks hold the frames of the run, and so the engine."""
        self.failures.clear()
        self.error = self.cancellation = None
