"""Ports for servers that tests start."""

from __future__ import annotations

import random
import socket

NOBODYS = range(30_000, 32_768)
"""Ports that the system gives to nobody by itself, as it would to a Ray cluster's other servers at any moment; above
those of Ray's workers and of the toy webs."""


def free_port() -> int:
    for port in random.sample(NOBODYS, len(NOBODYS)):
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no free port")
