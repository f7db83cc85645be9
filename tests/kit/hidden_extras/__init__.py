"""A pack that does on import what none should, so that one sees that it would be seen."""

import contextlib
import socket
from typing import Any

import torch

NODE_CLASS_MAPPINGS: dict[str, Any] = {}

torch.cuda.is_available()
with contextlib.suppress(OSError), socket.socket() as probe:
    probe.connect(("127.0.0.1", 9))
