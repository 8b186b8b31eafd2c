"""Whatever a server answers ends in a verdict of its own, in time and in bounded memory, and harms no other row."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datapipe.schema import Reason, Sample
from datapipe.stages.fetch import FetchSettings, FetchStage
from datapipe.stages.urls import BadUrlError, normal_url, redirected, target
from tests.stages.hostile import CASES, IMAGE, MAX_BYTES, OK, Case, Handler, hostile_server

DEADLINE_S = 0.6
SLACK_S = 1.5
IN_SOCKETS = 16_000_000
"""Bytes that the buffers of a connection may hold, beside what was read."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with hostile_server() as url:
        yield url


def stage(**changes: object) -> FetchStage:
    usual = {"deadline_s": DEADLINE_S, "retries": 0, "max_bytes": MAX_BYTES, "allow_private_addresses": True}
    return FetchStage(FetchSettings.model_validate({**usual, **changes}))


def outcome(sample: Sample) -> tuple[Reason | None, int | None]:
    return (sample.verdict.reason if sample.verdict else None), sample.http_status


def test_the_table_is_long_enough_and_its_names_differ() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 60


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_hostile_answer_has_its_verdict_in_time(server: str, case: Case) -> None:
    Handler.sent.clear()
    start = time.monotonic()
    # A neighbor at the same address under another name, because a host that asks for a pause gets it.
    beside = f"{server}/whole".replace("127.0.0.1", "localhost")
    hostile, neighbor = stage()([Sample(row=0, url=f"{server}/{case.name}"), Sample(row=1, url=beside)])
    assert time.monotonic() - start < DEADLINE_S + SLACK_S
    assert outcome(hostile) == (case.reason, case.status)
    assert (hostile.image is None) == (case.reason is not None)
    assert hostile.verdict is None or hostile.verdict.detail.isprintable()
    assert neighbor.image == IMAGE
    assert Handler.sent[case.name] < 2 * MAX_BYTES + IN_SOCKETS


def test_all_at_once_have_the_same_verdicts_as_alone(server: str) -> None:
    names = [name for case in CASES for name in (case.name, "whole")]
    start = time.monotonic()
    # A host that asks for a pause gets it, so those cases come alone.
    rows = [Sample(row=i, url=f"{server}/{name}") for i, name in enumerate(names) if not name.startswith("after-")]
    found = stage(per_host=64, deadline_s=5)(rows)
    assert time.monotonic() - start < 20
    wanted = {case.name: case.reason for case in CASES}
    for sample in found:
        name = sample.url.rpartition("/")[2]
        assert (sample.verdict and sample.verdict.reason) == wanted.get(name), name


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(st.binary(max_size=300), st.binary(max_size=300).map(OK.__add__), st.text(max_size=99).map(str.encode))
)
def test_any_bytes_are_an_image_or_a_verdict(server: str, answer: bytes) -> None:
    Handler.answers["fuzz"] = answer
    (sample,) = stage()([Sample(row=0, url=f"{server}/fuzz")])
    assert (sample.image is None) == (sample.verdict is not None)
    assert sample.verdict is None or sample.verdict.reason is not Reason.ERROR


HEADERS = st.sampled_from(
    ["Content-Length", "Transfer-Encoding", "Content-Encoding", "Location", "Retry-After", "X-Robots-Tag"]
)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([200, 204, 206, 302, 304, 404, 429, 503]),
    st.lists(st.tuples(HEADERS, st.one_of(st.text(max_size=30), st.integers().map(str))), max_size=4),
)
def test_any_headers_are_an_image_or_a_verdict(server: str, status: int, headers: list[tuple[str, str]]) -> None:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
    Handler.answers["fuzz"] = f"HTTP/1.1 {status} x\r\n{lines}\r\n".encode("utf-8", "surrogatepass") + IMAGE
    (sample,) = stage()([Sample(row=0, url=f"{server}/fuzz")])
    assert (sample.image is None) == (sample.verdict is not None)
    assert sample.verdict is None or sample.verdict.reason is not Reason.ERROR


@given(st.one_of(st.text(), st.text().map("//".__add__), st.text().map("http://h/".__add__)))
def test_any_location_is_a_url_or_a_bad_url(location: str) -> None:
    try:
        url = redirected("http://example.com/a?b", location)
    except BadUrlError:
        return
    assert normal_url(url) == url
    assert target(url).path.startswith("/")
    assert 0 <= target(url).port < 65536
