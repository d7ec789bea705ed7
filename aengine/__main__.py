"""The command line: `python -m aengine checkpoints DIR`. What belongs to the process is in here, and nothing else."""

import io
import signal
import sys

from aengine.checkpoint.cli.command import main

if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it as it ends any command, without a traceback
    for _stream in (sys.stdout, sys.stderr):
        if isinstance(_stream, io.TextIOWrapper):
            _stream.reconfigure(errors="backslashreplace")  # an old terminal must not keep a checkpoint from being seen
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
