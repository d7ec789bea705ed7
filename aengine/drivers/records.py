"""Records of an engine at one moment: its statistics, and the event of the iteration that was completed last."""

from time import perf_counter

from aengine.bus.bus import Bus
from aengine.events import Event
from aengine.statistics import EngineStatistics, ServiceStatistics


def statistics_of(bus: Bus, services: tuple[ServiceStatistics, ...], *, is_running: bool) -> EngineStatistics:
    """Return where the time of the run goes. From any thread."""
    watch, state = bus.stopwatch, bus.state
    handlers: dict[str, float] = {}
    of_fired: dict[str, float] = {}
    for topic in bus.topics:
        seconds = handlers if topic.is_fired_by_loop else of_fired
        for handler in topic.inline:
            if handler.is_internal:
                continue
            seconds[handler.name] = seconds.get(handler.name, 0.0) + handler.seconds
    return EngineStatistics(
        name=bus.name,
        is_running=is_running,
        epoch=state.epoch,
        iteration=state.iteration,
        total=watch.total,
        data=watch.data,
        step=watch.step,
        handlers=handlers,
        fired_handlers=of_fired,
        back_pressure=watch.back_pressure,
        event_loop=watch.event_loop,
        lag=watch.lag,
        event_loop_lag=watch.event_loop_lag(),
        listeners=tuple(one.statistics() for one in (*bus.subscribers, *bus.streams)),
        services=services,
    )


def iteration_of(bus: Bus) -> Event:
    """Return the event of the iteration that was completed last, as a subscriber would get it."""
    state = bus.state
    return Event(
        "ITERATION_COMPLETED",
        bus.name,
        bus.sequence,
        state.iteration,
        state.epoch,
        state.epoch_length,
        state.max_epochs,
        state.max_iters,
        state.output,
        dict(state.metrics),
        perf_counter(),
        None,
        None,
    )
