"""A process that writes, so that the step keeps its core and the GIL to itself.

It is this interpreter, started afresh: not forked, since threads, locks and GPUs do not survive that; and not by
multiprocessing, which would import the user's script again. One socket carries pickled calls and the descriptor of the
shared memory that staged tensors are in: they are not copied.
"""

import io
import json
import mmap
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch

from aengine.checkpoint.capture.memory import Arena, SharedMemory
from aengine.errors import CheckpointNotWritten

# Of a message: the bytes that follow, and the size of the memory whose descriptor comes along; 0 if none does.
_HEADER = struct.Struct("!QQ")

# How often the process checks that its parent still lives, in seconds. The end of the socket shows that at once, unless
# a worker that the parent forked still has it open.
_PARENT_CHECK = 1.0

# How long `close()` waits for an idle process, in seconds.
_CLOSE_TIMEOUT = 10.0

_START = """\
import json, sys
descriptor, parent, sys.path[:] = json.loads(sys.argv[1])
from aengine.checkpoint.formats.writer_process import serve
serve(descriptor, parent)
"""


class WriterProcess:
    """Calls functions in one other process, which is started when it is first needed and kept from call to call.

        process = WriterProcess()
        staging = Staging(process.memory)
        process.call(write, path, staging.stage(state))  # `write` of some module: scripts are not imported there
        process.close()

    Ctrl-C does not reach it. It ends with this process, however that ends.

    Attributes:
        memory: what is staged here is passed without being copied. Anything else in a call is pickled.
    """

    def __init__(self) -> None:
        self.memory: SharedMemory = SharedMemory()
        self._calling = threading.Lock()
        self._child: _Child | None = None

    def start(self) -> None:
        """Start the process if there is none, and return before it has imported torch, which takes two seconds."""
        with self._calling:
            self._started()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what `function(*arguments)` returns there. Blocks; one call at a time.

        What the function raises is raised here, with its traceback as a note.

        Raises:
            CheckpointNotWritten: the process died or was terminated, or could not make the call. The next call is made
                in a new one.
        """
        with self._calling:
            request = io.BytesIO()
            _Pickler(request, self.memory).dump((function, arguments))
            child = self._started()
            try:
                child.send(request.getvalue(), self.memory)
                succeeded, outcome = child.receive()
            except (ConnectionError, EOFError):
                self._child = None
                raise CheckpointNotWritten(child.reap()) from None
            except BaseException:  # its answer is still to come, and would be taken for that of the next call
                self._child = None
                child.terminate()
                child.reap()
                raise
        if not succeeded:
            raise outcome
        return outcome

    def terminate(self) -> None:
        """End the process now, from any thread; a call that it is busy with fails."""
        child = self._child
        if child is not None:
            child.terminate()

    def close(self) -> None:
        """Let the process end, wait until it has, and give the shared memory up. Waits for a call to end, too."""
        with self._calling:
            if self._child is not None:
                self._child.close()
                self._child = None
            self.memory.close()

    def _started(self) -> "_Child":
        if self._child is not None and self._child.is_dead():  # between two calls, so none is lost
            self._child.reap()
            self._child = None
        if self._child is None:
            self._child = _Child()
        return self._child


class _Child:
    """The process as its parent sees it."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._arena: weakref.ref[Arena] | None = None  # the memory that it has; weak: it must be freed when replaced
        self._was_terminated = False
        setting = json.dumps([theirs.fileno(), os.getpid(), sys.path])
        try:
            self._process = subprocess.Popen(  # noqa: S603 -- our own interpreter, with our own code
                [sys.executable, "-c", _START, setting],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                # torch warns of itself as it pickles: no error there because it would be one here.
                env={name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"},
                process_group=0,  # Ctrl-C goes to the whole group of the terminal
            )
        except BaseException:
            self._socket.close()
            raise
        finally:
            theirs.close()
        # No __del__: where garbage is collected, the socket or the Popen could be finalized first, which both warn.
        weakref.finalize(self, _end, self._socket, self._process)

    def send(self, request: bytes, memory: SharedMemory) -> None:
        arena = memory.arena
        if arena is None or (self._arena is not None and arena is self._arena()):
            self._socket.sendall(_HEADER.pack(len(request), 0))
        else:
            socket.send_fds(self._socket, [_HEADER.pack(len(request), arena.size)], [arena.descriptor])
            self._arena = weakref.ref(arena)
        self._socket.sendall(request)

    def receive(self) -> tuple[bool, Any]:
        length, _ = _HEADER.unpack(_receive(self._socket, _HEADER.size))
        answer: tuple[bool, Any] = pickle.loads(_receive(self._socket, length))  # noqa: S301 -- from our own process
        return answer

    def is_dead(self) -> bool:
        return self._process.poll() is not None

    def terminate(self) -> None:
        self._was_terminated = True
        self._process.kill()

    def close(self) -> None:
        self._socket.close()
        try:
            self._process.wait(_CLOSE_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def reap(self) -> str:
        """Wait for the end of a process that is dead or dying, and return why it ended."""
        self.close()
        status = self._process.returncode
        if self._was_terminated:
            return "the process that wrote the checkpoint was stopped in the middle of it"
        if status == -signal.SIGKILL:
            return "the process that wrote the checkpoint was killed (SIGKILL), as Linux does when memory runs out"
        if status < 0:
            return f"the process that wrote the checkpoint was ended by {signal.Signals(-status).name}"
        return f"the process that wrote the checkpoint ended with status {status}: its last words are on stderr"


def _end(connection: socket.socket, process: "subprocess.Popen[bytes]") -> None:
    """End what was dropped without a close(): it has nothing to do, for a thread that waits for an answer holds it."""
    connection.close()
    if process.returncode is None:
        process.kill()
        process.wait()


class _Region(NamedTuple):
    """A stretch of the shared memory, in bytes."""

    start: int
    size: int


class _Pickler(pickle.Pickler):
    """Says of tensors in shared memory where they are."""

    def __init__(self, file: io.BytesIO, memory: SharedMemory) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._memory = memory

    def reducer_override(self, value: Any) -> Any:
        kind = type(value)
        if (kind is not torch.Tensor and kind is not torch.nn.Parameter) or value.layout is not torch.strided:
            return NotImplemented
        if value.is_quantized or value.is_nested:
            return NotImplemented
        place = self._memory.find(value.untyped_storage())
        if place is None:
            return NotImplemented
        layout = (value.storage_offset(), value.size(), value.stride())
        return _attach, (_Region(*place), value.dtype, layout, kind, value.requires_grad)

    def persistent_id(self, value: Any) -> Any:
        return value if type(value) is _Region else None


class _Unpickler(pickle.Unpickler):
    """Finds them there. Tensors that shared a region share it here."""

    def __init__(self, file: io.BytesIO, buffer: mmap.mmap | None) -> None:
        super().__init__(file)
        self._buffer = buffer
        self._storages: dict[_Region, torch.UntypedStorage] = {}

    def persistent_load(self, region: Any) -> torch.UntypedStorage:
        assert self._buffer is not None, "its descriptor came with the call"  # noqa: S101
        if region not in self._storages:
            flat = torch.frombuffer(self._buffer, dtype=torch.uint8, offset=region.start, count=region.size)
            self._storages[region] = flat.untyped_storage()
        return self._storages[region]


def _attach(
    storage: torch.UntypedStorage,
    dtype: torch.dtype,
    layout: tuple[Any, ...],
    kind: type[torch.Tensor],
    requires_grad: bool,  # noqa: FBT001 -- called by pickle
) -> torch.Tensor:
    tensor = torch.empty(0, dtype=dtype).set_(storage, *layout)
    if kind is torch.nn.Parameter:
        return torch.nn.Parameter(tensor, requires_grad)
    return tensor.requires_grad_(requires_grad)


def serve(descriptor: int, parent: int) -> None:
    """Be the process: make the calls that come, until the parent closes the socket or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)  # the cores are for the step
    with socket.socket(fileno=descriptor) as connection:
        _Server(connection, parent).serve()


class _Server:
    def __init__(self, connection: socket.socket, parent: int) -> None:
        self._connection = connection
        self._parent = parent
        self._requests: SimpleQueue[tuple[bytearray, mmap.mmap | None] | None] = SimpleQueue()
        self._is_busy = False
        self._buffer: mmap.mmap | None = None

    def serve(self) -> None:
        # A thread of its own, so that the end of the parent is noticed during a call, too: what is being written then
        # would never be committed, and the process ends at once.
        threading.Thread(target=self._listen, name="aengine writer: receive", daemon=True).start()
        while (request := self._requests.get()) is not None:
            answer = _perform(*request)
            del request
            self._is_busy = False  # before the answer, upon which the next call may come
            with suppress(ConnectionError):
                self._connection.sendall(_HEADER.pack(len(answer), 0) + answer)

    def _listen(self) -> None:
        try:
            while True:
                self._requests.put(self._next())
        except (ConnectionError, EOFError):
            if self._is_busy:
                os._exit(1)
            self._requests.put(None)

    def _next(self) -> tuple[bytearray, mmap.mmap | None]:
        while not select.select([self._connection], [], [], _PARENT_CHECK)[0]:
            if os.getppid() != self._parent:
                raise EOFError
        header, descriptors, _, _ = socket.recv_fds(self._connection, _HEADER.size, 1)
        if not header:
            raise EOFError
        length, size = _HEADER.unpack(header + _receive(self._connection, _HEADER.size - len(header)))
        for descriptor in descriptors:
            self._buffer = mmap.mmap(descriptor, size)
            os.close(descriptor)
        request = _receive(self._connection, length)
        self._is_busy = True
        return request, self._buffer


def _perform(request: bytearray, buffer: mmap.mmap | None) -> bytes:
    """Make a call, and return its outcome as the parent can read it."""
    try:
        function, arguments = _Unpickler(io.BytesIO(request), buffer).load()
    except Exception as error:  # noqa: BLE001 -- raised in the parent, by the call
        refusal = CheckpointNotWritten(
            f"the process that writes checkpoints cannot import what it is to call: {type(error).__name__}: {error}. "
            "Functions and classes that it is given must be in a module, not in the script that is run."
        )
        return pickle.dumps((False, refusal))
    try:
        return pickle.dumps((True, function(*arguments)))
    except BaseException as error:  # noqa: BLE001 -- likewise
        error.add_note("In the process that writes checkpoints:\n" + traceback.format_exc())
        try:
            answer = pickle.dumps((False, error))
            pickle.loads(answer)  # noqa: S301 -- not every exception can be made again from its arguments
        except Exception:  # noqa: BLE001 -- likewise
            return pickle.dumps((False, CheckpointNotWritten(traceback.format_exc())))
        return answer


def _receive(connection: socket.socket, length: int) -> bytearray:
    data = bytearray(length)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if count == 0:
            raise EOFError
        view = view[count:]
    return data
