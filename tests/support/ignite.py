"""pytorch-ignite's engine and ours, behind one interface, for tests that run both."""

import warnings
from collections.abc import Callable
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch deprecates, when they are imported, modules that ignite imports
    import ignite.engine
    import ignite.handlers
    import ignite.handlers.logger_utils
    import ignite.metrics
    import ignite.metrics.metric

import aengine
from aengine import StopReason

__all__ = ["EngineRunner", "EngineRunnerWithIgniteEvents", "IgniteRunner", "ignite"]


class IgniteRunner:
    """Runs pytorch-ignite's engine with its events; goes on after an interruption until the run is over."""

    def __init__(self, step: Callable[[Any, Any], Any]) -> None:
        self.engine: Any = ignite.engine.Engine(step)
        self.events: Any = ignite.engine.Events

    def run(self, data: Any, **limits: int) -> None:
        self.engine.run(data, **limits)
        while self.engine._internal_run_generator is not None:
            self.engine.run(data, **limits)


class EngineRunner:
    """Runs our engine with our events; goes on after an interruption until the run is over."""

    events: Any = aengine.Events

    def __init__(self, step: Callable[[Any, Any], Any]) -> None:
        self.engine: Any = aengine.Engine(step)

    def run(self, data: Any, **limits: int) -> None:
        self.engine.run_sync(data, **limits)
        while self.engine.state.stop_reason is StopReason.INTERRUPTED:
            self.engine.run_sync(data, **limits)


class EngineRunnerWithIgniteEvents(EngineRunner):
    """Runs our engine with pytorch-ignite's events and filters."""

    events = ignite.engine.Events
