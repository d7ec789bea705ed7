"""Report: where the time of a run went, as a table to print.

print(format_statistics(trainer.statistics()))
"""

from collections.abc import Sequence

from aengine.statistics import EngineStatistics


def format_statistics(statistics: EngineStatistics) -> str:
    """Return the statistics of a run, of one that is over or goes on, as lines of text.

    What the loop did comes first, and adds up to the whole: "the rest" is the loop itself, and its wait for the
    subscribers at the end of the run. The handlers of events that were fired come next: by a step or a handler, whose
    time includes theirs, or beside the loop. The subscribers and streams come last; their time is their own.
    """
    s = statistics
    title = f"{s.name}: {s.iteration} iterations, {s.epoch} epochs, {_seconds(s.total)}"
    spent = {
        "step": s.step,
        "data": s.data,
        **{f"handler {name}": seconds for name, seconds in s.handlers.items()},
        "back-pressure": s.back_pressure,
        "event loop": s.event_loop,
    }
    rest = max(0.0, s.total - sum(spent.values()))
    loop = [
        [name, _seconds(seconds), _share(seconds, s.total)] for name, seconds in {**spent, "the rest": rest}.items()
    ]
    parts = [title, *_rows(["in the loop", "seconds", "of all"], loop)]
    if s.fired_handlers:
        fired = [[name, _seconds(seconds)] for name, seconds in s.fired_handlers.items()]
        parts += ["", *_rows(["of events that were fired", "seconds"], fired)]
    if s.listeners:
        beside = [
            [one.name, _seconds(one.busy), _share(one.busy, s.total)]
            + [str(count) for count in (one.handled, one.depth, one.dropped, one.discarded, one.errors)]
            for one in s.listeners
        ]
        columns = ["beside it", "busy", "of all", "handled", "waiting", "dropped", "discarded", "errors"]
        parts += ["", *_rows(columns, beside)]
    return "\n".join(parts)


def _rows(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines: list[str] = []
    for name, *cells in (columns, *rows):
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *aligned]))
    return lines


def _seconds(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 1e-6:.0f} µs" if seconds else "0"


def _share(seconds: float, total: float) -> str:
    return f"{seconds / total:.1%}" if total else ""
