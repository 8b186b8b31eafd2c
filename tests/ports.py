"""Ports for servers that tests start."""

from __future__ import annotations

import random
import socket

BELOW_EPHEMERAL = range(10_000, 20_000)
"""Ports that the system gives to nobody by itself, as it would to a Ray cluster's other servers at any moment."""


def free_port() -> int:
    for port in random.sample(BELOW_EPHEMERAL, len(BELOW_EPHEMERAL)):
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no free port")
