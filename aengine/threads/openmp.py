"""OpenMP: the threads that torch's kernels keep, released where they would be in the way."""

import sys
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from typing import Any


def release_idle_threads() -> None:
    """Let go of the OpenMP threads that the calling thread keeps, if it keeps any.

    GNU's OpenMP stops spinning as soon as it manages more threads than there are processors; torch steps on another
    thread then run 3 to 5 times slower. `omp_pause_resource` is OpenMP 5.0, section 3.2.43; soft: settings stay.
    """
    if "torch" in sys.modules and (openmp := _openmp()) is not None:
        openmp.omp_pause_resource(_SOFT, openmp.omp_get_initial_device())


@contextmanager
def on_one_thread() -> Generator[None]:
    """Have the calling thread, and no other, do torch's work without help: where waiting for that takes longer."""
    openmp = _openmp() if "torch" in sys.modules else None
    before = 0 if openmp is None else openmp.omp_get_max_threads()
    if openmp is not None:
        openmp.omp_set_num_threads(1)
    try:
        yield
    finally:
        if openmp is not None:
            openmp.omp_set_num_threads(before)


@cache
def _openmp() -> Any:
    """Find the OpenMP library that torch has loaded. Another one, scikit-learn's say, has threads of its own."""
    import ctypes  # noqa: PLC0415 -- with pathlib, a fifth of the time of `import aengine`
    from pathlib import Path  # noqa: PLC0415

    try:
        loaded = {
            line.split()[-1] for line in Path("/proc/self/maps").read_text("utf-8").splitlines() if "libgomp" in line
        }
        ours = [path for path in loaded if "torch" in path] or [path for path in loaded if path.startswith("/usr/lib")]
        openmp = ctypes.CDLL(ours[0], mode=_RTLD_NOLOAD)
    except (OSError, IndexError):  # pragma: no cover -- another system, or another OpenMP
        return None
    return openmp if hasattr(openmp, "omp_pause_resource") else None  # which is OpenMP 5.0


_RTLD_NOLOAD = 4  # of dlopen(3), where os.RTLD_NOLOAD is not defined


_SOFT = 1  # omp_pause_soft
