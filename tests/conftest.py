"""What holds for every test: which event loops it runs on, which cases run by default, and nothing left behind."""

import gc
import logging
import multiprocessing
import os
import signal
import threading
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from support.backends import BACKENDS, Backend
from support.covering_array import covering

# OpenMP's threads wait for their next part of an operation by spinning, on cores that the other workers of pytest need.
# Set here, before torch is imported, and inherited by the workers: tests of small models take half the time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A worker of a DataLoader that the fork server starts has torch then, instead of taking seconds to import it.
multiprocessing.set_forkserver_preload(["torch.utils.data"])

MODULES_TESTED = pytest.StashKey[list[Path]]()

# No deadline, since other work on the machine makes an example slow too. And always the same examples, so that a change
# fails only by its own faults. To look for new ones: --hypothesis-profile=explore.
NO_DEADLINE: dict[str, Any] = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("explore", max_examples=1000, print_blob=True, **NO_DEADLINE)
hypothesis.settings.register_profile("aengine", derandomize=True, database=None, **NO_DEADLINE)
hypothesis.settings.load_profile("aengine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--one-in", type=int, default=1, metavar="N", help="of the selected variants run one in N")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Mark what varies other tests before pytest selects by marker; then take one in N of the selected variants."""
    mark_variants([item for item in items if isinstance(item, pytest.Function) and hasattr(item, "callspec")])
    yield
    one_in: int = config.getoption("--one-in")
    # By name, not by chance or position: all workers must select the same, and a new test must not change the others.
    left_out = {
        item
        for item in items
        if item.get_closest_marker("variant") is not None and zlib.crc32(item.nodeid.encode()) % one_in
    }
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


def mark_variants(items: list[pytest.Function]) -> None:
    """Mark as `slow` and `variant` what repeats other cases in circumstances that should make no difference.

    Those are runs on uvloop: the package has no line that only uvloop runs, and what may differ is the timing, so
    that tests that cross threads or cancel keep theirs, by `every_event_loop`. And the cases of a test marked
    `covering(strength)` that its parameters' values do not need in order to meet.
    """
    products: defaultdict[Any, list[pytest.Function]] = defaultdict(list)
    variants: list[pytest.Function] = []
    for item in items:
        backend: Any = item.callspec.params.get("anyio_backend")
        if item.get_closest_marker("slow") is not None:
            continue
        if backend and backend[1].get("use_uvloop") and item.get_closest_marker("every_event_loop") is None:
            variants.append(item)
        elif item.get_closest_marker("covering") is not None:
            products[item.function].append(item)
    for cases in products.values():
        mark = cases[0].get_closest_marker("covering")
        assert mark is not None
        # By identity, since a value need not be hashable: it is one object in all the cases that it is combined into.
        values = [{name: id(value) for name, value in case.callspec.params.items()} for case in cases]
        chosen = covering(values, *mark.args)
        variants += (case for position, case in enumerate(cases) if position not in chosen)
    for item in variants:
        item.add_marker("slow")
        item.add_marker("variant")


def pytest_configure() -> None:
    """Have Ctrl-C raise also where this was started in the background of a script, which has it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Exclude what was imported from every later collection of garbage: torch's modules alone take 0.1 s."""
    gc.collect()
    gc.freeze()
    # Development mode is for this process: in one that a test starts, asyncio would warn on stderr of each callback
    # that took 0.1 s, as any may on a busy machine. Removed only now, since pytest's workers must inherit it.
    os.environ.pop("PYTHONDEVMODE", None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Have the last test of each fourth module collect all garbage: what an earlier one dropped too late is reported.

    Not of each, since it takes half a second when all that the tests need is imported.
    """
    if nextitem is None or nextitem.path != item.path:
        modules = item.config.stash.setdefault(MODULES_TESTED, [])
        modules.append(item.path)
        if nextitem is None or len(modules) % 4 == 0:
            gc.unfreeze()


@pytest.fixture(scope="module", params=BACKENDS)
def anyio_backend(request: pytest.FixtureRequest) -> Backend:
    backend: Backend = request.param
    return backend


@pytest.fixture(autouse=True)
def nothing_left_behind(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail the test that leaves a thread, a coroutine never awaited, or an exception never retrieved."""
    before = threading.enumerate()
    yield
    # Collected here, so that the right test fails: pytest makes an error of what a finalizer raises or warns of, while
    # asyncio only logs it.
    gc.collect()
    gc.freeze()  # what is still alive outlives the test, and need not be looked at again after each of the next ones
    records = [*caplog.get_records("call"), *caplog.get_records("teardown")]
    complaints = [r.getMessage() for r in records if r.name == "asyncio" and r.levelno >= logging.ERROR]
    assert not complaints

    threads = [each for each in threading.enumerate() if each.name.startswith("aengine") and each not in before]
    for thread in threads:
        thread.join(timeout=60)  # one may be about to end
    assert not [thread.name for thread in threads if thread.is_alive()]
