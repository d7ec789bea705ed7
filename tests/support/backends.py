"""The event loops that every async test runs on.

The `anyio_backend` fixture is parametrized with them. A test that opens a loop of its own requests it too, and calls
`anyio.run(main, backend=anyio_backend[0], backend_options=anyio_backend[1])`.
"""

import sys
from typing import Any, TypeAlias

import pytest

Backend: TypeAlias = tuple[str, dict[str, Any]]

BACKENDS = [
    pytest.param(("asyncio", {}), id="asyncio"),
    pytest.param(("trio", {}), id="trio"),
]
if sys.platform != "win32":  # uvloop has no build for it
    BACKENDS.insert(1, pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"))
