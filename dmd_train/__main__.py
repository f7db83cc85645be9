"""`python -m dmd_train`."""

import os
import signal
import sys
from types import FrameType

STOPPED = 128 + signal.SIGINT


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(STOPPED)  # an exception might be taken for a broken library by who imports it


signal.signal(signal.SIGINT, _leave)
from .terminal.commands import main  # noqa: E402  (seconds, in which Ctrl-C may come)

try:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
except KeyboardInterrupt:
    sys.exit(STOPPED)
