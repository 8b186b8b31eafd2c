from __future__ import annotations

import ipaddress
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapipe.schema import Reason, Sample
from datapipe.stages import fetch
from datapipe.stages.addresses import Address, Resolver, is_public
from datapipe.stages.fetch import FetchSettings, FetchStage

REFUSED = {
    "this network": ["0.0.0.0", "0.1.2.3", "::"],
    "private": ["10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.0.1", "fc00::1", "fd00::1", "fd00:ec2::254"],
    "loopback": ["127.0.0.1", "127.255.255.254", "::1"],
    "link-local": ["169.254.0.1", "169.254.169.254", "fe80::1", "fe80::1%eth0", "febf::1"],
    "site-local": ["fec0::1", "feff::1"],
    "carriers": ["100.64.0.1", "100.127.255.255"],
    "clouds": ["168.63.129.16", "100.100.100.200", "169.254.170.2"],
    "protocol assignments": ["192.0.0.1", "192.0.0.8", "192.0.0.170", "2001:1::1", "2001:20::1"],
    "documentation": ["192.0.2.1", "198.51.100.1", "203.0.113.1", "2001:db8::1", "3fff::1", "3fff:fff::1"],
    "benchmarks": ["198.18.0.1", "198.19.255.255", "2001:2::1"],
    "withdrawn": ["192.88.99.1", "192.88.99.2"],
    "multicast": ["224.0.0.1", "239.255.255.250", "ff02::1", "ff0e::1", "ff05::2"],
    "reserved": ["240.0.0.1", "255.255.255.255", "100::1", "4000::1", "5f00::1", "8000::1"],
    "IPv4-compatible": ["::8.8.8.8", "::127.0.0.1", "::10.0.0.1"],
    "IPv4-mapped": ["::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:168.63.129.16"],
    "IPv4-translated": ["::ffff:0:8.8.8.8", "::ffff:0:127.0.0.1"],
    "NAT64": ["64:ff9b::10.0.0.1", "64:ff9b::169.254.169.254", "64:ff9b:1::1", "64:ff9b:1::8.8.8.8"],
    "6to4": ["2002:7f00:1::", "2002:a00:1::1", "2002:a9fe:a9fe::1"],
    "Teredo": ["2001::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2"],
}
PUBLIC = [
    "1.1.1.1", "8.8.8.8", "93.184.216.34", "100.63.255.255", "100.128.0.1", "172.15.0.1", "172.32.0.1", "168.63.129.15",
    "192.0.1.1", "192.88.98.1", "198.17.0.1", "198.20.0.1", "223.255.255.255",
    "2001:200::1", "2001:4860:4860::8888", "2606:2800:220:1:248:1893:25c8:1946", "2a00:1450:4001::1", "2620:fe::fe",
    "3ffe::1", "::ffff:93.184.216.34", "64:ff9b::8.8.8.8", "2002:808:808::1",
]  # fmt: skip


@pytest.mark.parametrize(("kind", "address"), [(kind, address) for kind, found in REFUSED.items() for address in found])
def test_an_address_for_a_special_purpose_is_refused(kind: str, address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_an_ordinary_global_address_passes(address: str) -> None:
    assert is_public(address)


@given(st.ip_addresses())
def test_nothing_passes_that_pythons_own_tables_call_private(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    if is_public(str(ip)) and not (isinstance(ip, ipaddress.IPv6Address) and (ip.sixtofour or ip.ipv4_mapped)):
        assert ip.is_global and not ip.is_multicast


def test_all_spellings_of_an_address_have_one_key() -> None:
    spellings = ["127.0.0.1", "::ffff:127.0.0.1", "::ffff:7f00:1", "64:ff9b::7f00:1"]
    assert {Address(socket.AF_INET6, (spelling, port)).key for spelling in spellings for port in (80, 443)} == {
        "127.0.0.1"
    }


def test_a_name_is_looked_up_once_however_many_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def slow(host: str, port: int, **_: object) -> list[object]:
        asked.append(host)
        time.sleep(0.2)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", port))]

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    resolver = Resolver()
    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(lambda _: resolver.addresses("example.com", 80, 5), range(40)))
    assert asked == ["example.com"]
    assert {addresses[0].sockaddr for addresses in found} == {("93.184.216.34", 80)}


def test_a_slow_name_server_holds_nobody_past_the_time_and_its_answer_still_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = threading.Event()
    asked = []

    def slow(host: str, port: int, **_: object) -> list[object]:
        asked.append(host)
        answers.wait(20)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", port))]

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    resolver = Resolver()
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        resolver.addresses("slow.example", 80, 0.1)
    assert time.monotonic() - start < 1
    answers.set()
    assert resolver.addresses("slow.example", 80, 5)
    assert asked == ["slow.example"]


def test_a_name_that_was_not_found_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[object] = [socket.gaierror(socket.EAI_AGAIN, "later"), []]

    def flaky(*_: object, **__: object) -> object:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(socket, "getaddrinfo", flaky)
    resolver = Resolver()
    with pytest.raises(socket.gaierror):
        resolver.addresses("flaky.example", 80, 5)
    assert resolver.addresses("flaky.example", 80, 5) == []


def test_only_the_address_that_was_checked_is_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([["93.184.216.34", "10.0.0.1"], ["127.0.0.1"]])  # as of an attacker's own name server
    asked: list[str] = []

    def found(host: str, port: int, **_: object) -> list[object]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in next(answers)]

    def refused(address: Address, deadline: object) -> socket.socket:
        asked.append(address.sockaddr[0])
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", found)
    monkeypatch.setattr(fetch, "connected", refused)
    (sample,) = FetchStage(FetchSettings(backoff_s=0))([Sample(row=0, url="http://rebinds.example/")])
    assert sample.verdict
    assert sample.verdict.reason == Reason.UNREACHABLE
    assert set(asked) == {"93.184.216.34"}
