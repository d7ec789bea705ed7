"""Run a program of `tests/cases/`: what its `main` does must hold.

    PYTHONPATH=tests python -m support.programs tests/cases/reliability/lost_cancellation.py trio

`main` is async, or plain; a plain one that starts event loops of its own takes the name of the backend. The program may
write into the current folder.
"""

import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

import anyio

BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "asyncio": ("asyncio", {}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}


def run_program(path: Path, backend: tuple[str, dict[str, Any]]) -> None:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    name, options = backend
    if inspect.iscoroutinefunction(module.main):
        anyio.run(module.main, backend=name, backend_options=options)
    elif inspect.signature(module.main).parameters:
        module.main(name)
    else:
        module.main()


if __name__ == "__main__":
    run_program(Path(sys.argv[1]), BACKENDS[sys.argv[2] if len(sys.argv) > 2 else "asyncio"])
