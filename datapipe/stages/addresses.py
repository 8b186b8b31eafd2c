"""Which addresses are on the open internet, and looking them up without waiting for a name server longer than allowed.

The tables are IANA's registries of special-purpose addresses for IPv4 and IPv6 (iana.org/assignments), and what clouds
answer at besides: an address is public if it is global unicast and in none of them.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from concurrent.futures import Future
from typing import Any, NamedTuple

CACHE_S = 300.0
"""How long a look-up is good for."""

CACHED_NAMES = 50_000

_SPECIAL_IPV4 = [
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # shared by carriers; Alibaba Cloud's metadata are at 100.100.100.200
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # Azure's host, reachable from every machine
        "169.254.0.0/16",  # link-local, with most clouds' metadata
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # relays of 6to4, withdrawn
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
    )
]
_GLOBAL_IPV6 = ipaddress.IPv6Network("2000::/3")
_SPECIAL_IPV6 = [
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments: Teredo, benchmarks, ORCHID
        "2001:db8::/32",  # documentation
        "3fff::/20",  # documentation
    )
]
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""How hosts of IPv4 look in a network that has only IPv6; global, if the address inside is."""


class Address(NamedTuple):
    """An address to connect to. `sockaddr`: as `socket.connect` wants it."""

    family: socket.AddressFamily
    sockaddr: tuple[Any, ...]

    @property
    def key(self) -> str:
        """One for all spellings, and for all ports."""
        ip = ipaddress.ip_address(str(self.sockaddr[0]))
        return str(_ipv4_inside(ip) or ip)


def is_public(address: str) -> bool:
    """Whether an address is on the open internet; one that carries an IPv4 address is if that is."""
    ip = ipaddress.ip_address(address)
    ip = _ipv4_inside(ip) or ip
    if isinstance(ip, ipaddress.IPv4Address):
        return not any(ip in network for network in _SPECIAL_IPV4)
    return ip in _GLOBAL_IPV6 and not any(ip in network for network in _SPECIAL_IPV6)


def _ipv4_inside(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    if isinstance(ip, ipaddress.IPv4Address):
        return None
    if ip in _NAT64:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour


class Resolver:
    """Looks host names up, each once in `CACHE_S`, however many ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[tuple[str, int], tuple[float, Future[list[Address]]]] = {}

    def addresses(self, host: str, port: int, seconds: float) -> list[Address]:
        """Raises what `socket.getaddrinfo` raises, or TimeoutError. `getaddrinfo` knows no timeout: past ours, its
        thread is left alone, and its answer serves whoever asks next."""
        now = time.monotonic()
        with self._lock:
            expires, found = self._known.get((host, port), (0.0, Future[list[Address]]()))
            if expires < now:
                if len(self._known) >= CACHED_NAMES:
                    self._known = {key: entry for key, entry in self._known.items() if entry[0] >= now}
                found = Future()
                self._known[host, port] = (now + CACHE_S, found)
                threading.Thread(target=self._look_up, args=(host, port, found), daemon=True).start()
        return found.result(timeout=seconds)

    def _look_up(self, host: str, port: int, found: Future[list[Address]]) -> None:
        try:
            answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.set_result([Address(family, sockaddr) for family, _, _, _, sockaddr in answers])
        except Exception as error:
            # A later attempt asks the name server again.
            with self._lock:
                self._known.pop((host, port), None)
            found.set_exception(error)
