from __future__ import annotations

import contextlib
import datetime
import hashlib
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapipe.schema import Outcome, Reason, Sample, StageName
from datapipe.stages import fetch, http_get
from datapipe.stages.byte_budget import ByteBudget, Take
from datapipe.stages.fetch import FetchSettings, FetchStage
from datapipe.stages.opt_outs import opts_out
from datapipe.stages.urls import BadUrlError, normal_url

IMAGE = b"\xff\xd8 an image, as far as fetching goes \xff\xd9"
LARGE = IMAGE * 20_000


class _Misbehaving(BaseHTTPRequestHandler):
    """Each path is a way in which a server can behave."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[Counter[str]] = Counter()
    at_once: ClassVar[Counter[str]] = Counter()
    lock = threading.Lock()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        with self.lock:
            self.asked[self.path] += 1
        try:
            getattr(self, "answer_" + path.strip("/").replace("-", "_"))()
        except OSError:
            pass  # the client has had enough
        finally:
            self.close_connection = True

    def answer_image(self, status: int = 200, body: bytes = IMAGE, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer_large(self) -> None:
        self.answer_image(body=LARGE)

    def answer_missing(self) -> None:
        self.answer_image(404)

    def answer_forbidden(self) -> None:
        self.answer_image(403)

    def answer_never_ready(self) -> None:
        self.answer_image(503)

    def answer_ready_at_second(self) -> None:
        self.answer_image(503 if self.asked[self.path] == 1 else 200)

    def answer_come_back_soon(self) -> None:
        self.answer_image(429, Retry_After="1") if self.asked[self.path] == 1 else self.answer_image()

    def answer_come_back_tomorrow(self) -> None:
        self.answer_image(429, Retry_After="86400")

    def answer_slow(self, status: int = 200) -> None:
        with self.lock:
            self.at_once["now"] += 1
            self.at_once["most"] = max(self.at_once["most"], self.at_once["now"])
        time.sleep(0.05)
        with self.lock:  # before the answer: with its last byte the client may already ask for the next
            self.at_once["now"] -= 1
        self.answer_image(status)

    def answer_slow_missing(self) -> None:
        self.answer_slow(404)

    def answer_stall(self) -> None:
        time.sleep(1.5)

    def answer_trickle(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        for _ in range(50):
            self.wfile.write(b"x")
            time.sleep(0.1)

    def answer_trickle_headers(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Endless: ")
        for _ in range(50):
            self.wfile.write(b"x")
            time.sleep(0.1)

    def answer_truncated(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(IMAGE)

    def answer_truncated_chunks(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"ff\r\nshort")

    def answer_chunks(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(IMAGE), IMAGE))

    def answer_empty(self) -> None:
        self.answer_image(body=b"")

    def answer_announced_huge(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(10**12))
        self.end_headers()

    def answer_endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        while True:
            self.wfile.write(b"x" * 65536)

    def answer_garbage(self) -> None:
        self.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")

    def answer_hang_up(self) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer_opt_out(self) -> None:
        self.answer_image(X_Robots_Tag="noai, noimageai")

    def answer_opt_out_for_us(self) -> None:
        self.answer_image(X_Robots_Tag="SubjectBot: noai")

    def answer_opt_out_for_another(self) -> None:
        self.answer_image(X_Robots_Tag="otherbot: noindex, nofollow")

    def answer_to_image(self) -> None:
        self.answer_image(302, Location="/image")

    def answer_to_itself(self) -> None:
        self.answer_image(302, Location="/to-itself")

    def answer_to_file(self) -> None:
        self.answer_image(302, Location="file:///etc/passwd")

    def answer_to_ftp(self) -> None:
        self.answer_image(302, Location="ftp://127.0.0.1/x")

    def answer_to_nowhere(self) -> None:
        self.answer_image(301)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Misbehaving) as running:
        running.daemon_threads = True
        running.block_on_close = False
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture(autouse=True)
def _forget() -> None:
    _Misbehaving.asked.clear()
    _Misbehaving.at_once.clear()


def stage(**changes: object) -> FetchStage:
    usual = {"timeout_s": 0.4, "deadline_s": 2.0, "retries": 1, "backoff_s": 0.01, "allow_private_addresses": True}
    return FetchStage(FetchSettings.model_validate({**usual, **changes}))


def fetched(url: str, **changes: object) -> Sample:
    (sample,) = stage(**changes)([Sample(row=3, url=url)])
    return sample


def reason(sample: Sample) -> Reason | None:
    return sample.verdict.reason if sample.verdict else None


@pytest.mark.parametrize("path", ["image", "chunks", "to-image", "ready-at-second", "come-back-soon"])
def test_an_image_is_fetched_with_its_status_and_hash(server: str, path: str) -> None:
    sample = fetched(f"{server}/{path}")
    assert sample.verdict is None
    assert sample.image == IMAGE
    assert sample.http_status == 200
    assert sample.sha256 == hashlib.sha256(IMAGE).hexdigest()


@pytest.mark.parametrize(
    ("path", "expected", "status", "retryable", "requests"),
    [
        ("missing", Reason.HTTP_STATUS, 404, False, 1),
        ("forbidden", Reason.HTTP_STATUS, 403, False, 1),
        ("never-ready", Reason.HTTP_STATUS, 503, True, 2),
        ("come-back-tomorrow", Reason.HTTP_STATUS, 429, True, 1),
        ("stall", Reason.TIMEOUT, None, True, 2),
        ("truncated", Reason.UNREACHABLE, 200, True, 2),
        ("truncated-chunks", Reason.UNREACHABLE, 200, True, 2),
        ("hang-up", Reason.UNREACHABLE, None, True, 2),
        ("garbage", Reason.UNREACHABLE, None, False, 1),
        ("empty", Reason.EMPTY_BODY, 200, False, 1),
        ("announced-huge", Reason.TOO_LARGE, 200, False, 1),
        ("endless", Reason.TOO_LARGE, 200, False, 1),
        ("to-nowhere", Reason.HTTP_STATUS, 301, False, 1),
        ("to-file", Reason.BAD_URL, None, False, 1),
        ("to-ftp", Reason.BAD_URL, None, False, 1),
    ],
)
def test_each_failure_has_its_reason_and_only_passing_ones_are_tried_again(
    server: str, path: str, expected: Reason, status: int | None, retryable: bool, requests: int
) -> None:
    sample = fetched(f"{server}/{path}", max_bytes=1_000_000)
    assert sample.image is None
    assert sample.verdict is not None
    assert sample.verdict.outcome == Outcome.FAILED
    assert sample.verdict.stage == StageName.FETCH
    assert (sample.verdict.reason, sample.http_status, sample.verdict.retryable) == (expected, status, retryable)
    assert _Misbehaving.asked[f"/{path}"] == requests
    assert "\n" not in sample.verdict.detail


def test_a_redirect_loop_ends(server: str) -> None:
    sample = fetched(f"{server}/to-itself")
    assert reason(sample) == Reason.HTTP_STATUS
    assert sample.http_status == 302


@pytest.mark.parametrize("path", ["trickle", "trickle-headers"])
def test_a_server_that_trickles_is_cut_at_the_deadline(server: str, path: str) -> None:
    start = time.monotonic()
    sample = fetched(f"{server}/{path}", deadline_s=0.6)
    assert reason(sample) == Reason.TIMEOUT
    assert time.monotonic() - start < 2


def test_a_refused_connection_is_unreachable_and_worth_another_try() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listens
        sample = fetched(f"http://127.0.0.1:{taken.getsockname()[1]}/")
    assert reason(sample) == Reason.UNREACHABLE
    assert sample.verdict
    assert sample.verdict.retryable
    assert "ECONNREFUSED" in sample.verdict.detail


def test_a_host_without_an_address_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    sample = fetched("http://no-such-host.invalid/a.jpg")
    assert reason(sample) == Reason.UNREACHABLE
    assert sample.verdict
    assert not sample.verdict.retryable


def test_a_name_server_that_does_not_answer_takes_no_longer_than_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answers.wait(60))
    sample = fetched("http://slow-name.invalid/a.jpg", deadline_s=0.2)
    answers.set()
    assert reason(sample) == Reason.TIMEOUT


@pytest.fixture
def tls_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """The same server over TLS, and its certificate, which nobody has signed."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (tmp_path / "certificate.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (tmp_path / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate.pem", tmp_path / "key.pem")
    with ThreadingHTTPServer(("127.0.0.1", 0), _Misbehaving) as running:
        running.daemon_threads = True
        running.block_on_close = False
        running.socket = context.wrap_socket(running.socket, server_side=True)
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"https://localhost:{running.server_port}", tmp_path / "certificate.pem"
        running.shutdown()


def test_tls_is_fetched_under_the_same_limits(tls_server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    url, certificate = tls_server
    untrusted = fetched(f"{url}/image")
    assert reason(untrusted) == Reason.UNREACHABLE
    assert untrusted.verdict
    assert "certificate" in untrusted.verdict.detail
    assert not untrusted.verdict.retryable

    context = ssl.create_default_context(cafile=certificate)
    monkeypatch.setattr(http_get, "_tls_context", lambda: context)
    assert fetched(f"{url}/image").image == IMAGE
    another = fetched(f"{url}/image".replace("localhost", "127.0.0.1"))
    assert another.verdict
    assert "not valid for '127.0.0.1'" in another.verdict.detail
    start = time.monotonic()
    assert reason(fetched(f"{url}/trickle", deadline_s=0.6)) == Reason.TIMEOUT
    assert time.monotonic() - start < 2


def test_tls_to_a_server_without_it_is_unreachable(server: str) -> None:
    assert reason(fetched(server.replace("http:", "https:") + "/image")) == Reason.UNREACHABLE


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "0.0.0.0", "169.254.169.254", "2130706433", "0x7f.1"]
)
def test_private_addresses_are_refused_however_they_are_written(server: str, host: str) -> None:
    port = server.rpartition(":")[2]
    sample = fetched(f"http://{host}:{port}/image", allow_private_addresses=False)
    assert reason(sample) in (Reason.FORBIDDEN_ADDRESS, Reason.UNREACHABLE)
    assert sample.image is None
    assert not _Misbehaving.asked


def test_a_redirect_to_a_private_address_is_refused(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The first look-up of 127.0.0.1 passes for a public one, as an attacker's own host would; the second does not.
    answers = iter([True, False])
    monkeypatch.setattr(fetch, "is_public", lambda address: next(answers))
    sample = fetched(f"{server}/to-image", allow_private_addresses=False)
    assert reason(sample) == Reason.FORBIDDEN_ADDRESS
    assert _Misbehaving.asked == {"/to-image": 1}


def test_an_opt_out_drops_the_row_and_is_kept_verbatim(server: str) -> None:
    sample = fetched(f"{server}/opt-out")
    assert sample.image is None
    assert sample.opt_out == "noai, noimageai"
    assert sample.verdict
    assert (sample.verdict.outcome, sample.verdict.reason) == (Outcome.DROPPED, Reason.OPT_OUT)


def test_an_opt_out_for_our_token_binds_us_and_nobody_else(server: str) -> None:
    assert reason(fetched(f"{server}/opt-out-for-us", user_agent_token="SubjectBot")) == Reason.OPT_OUT
    assert fetched(f"{server}/opt-out-for-us").image == IMAGE


@pytest.mark.parametrize(("path", "respect"), [("opt-out-for-another", True), ("opt-out", False)])
def test_an_opt_out_that_does_not_bind_is_still_recorded(server: str, path: str, respect: bool) -> None:
    sample = fetched(f"{server}/{path}", respect_opt_outs=respect, user_agent_token="SubjectBot")
    assert sample.image == IMAGE
    assert sample.opt_out in ("otherbot: noindex, nofollow", "noai, noimageai")


@pytest.mark.parametrize(
    ("header", "binds"),
    [
        ("NoAI", True),
        ("nofollow, noimageindex", True),
        ("all", False),
        ("me: noai", True),
        ("Me : nofollow, NOINDEX", True),
        ("you: noai", False),
        ("you: nofollow, me: noai", True),
        ("*: noai", True),
        ("unavailable_after: 25 Jun 2030 15:00:00 PST, noai", True),
        ("noai, unavailable_after: 25 Jun 2030 15:00:00 PST", True),
        ("unavailable_after: Wed, 25 Jun 2030 15:00:00 GMT, noai", True),
        ("max-image-preview:large, noai", True),
        ("index, follow, max-snippet:-1, max-video-preview: 0, noimageai", True),
        ("you: max-snippet:-1, noai", False),
        ("", False),
        (":,:,", False),
    ],
)
def test_x_robots_tag_is_read_for_all_and_for_us(header: str, binds: bool) -> None:
    assert opts_out([header], "me") is binds


@pytest.mark.parametrize(
    "url",
    [
        "",
        "   ",
        "nonsense",
        "http://",
        "http:///path",
        "ftp://example.com/a.jpg",
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
        "http://[::1/a.jpg",
        "http://example.com:99999/",
        "http://example.com:port/",
        "http://user:word@example.com/",
        "http://a b.com/",
        "http://exa\x00mple.com/",
        "http://example.com/a\r\nX-Injected: 1",
        "http://" + "a" * 64 + ".com/",
        "http://[fe80::1%25eth0 x]/a.jpg",
        "http://example.com/\ud800",
        "http://example.com/" + "a" * 1_000_000,
    ],
)
def test_a_bad_url_is_recorded_and_nothing_is_asked(url: str) -> None:
    sample = fetched(url)
    assert reason(sample) == Reason.BAD_URL
    assert sample.verdict
    assert sample.verdict.detail.isprintable()
    assert len(sample.verdict.detail) <= 200


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        (" http://example.com/a b.jpg ", "http://example.com/a%20b.jpg"),
        ("https://bücher.example/ü.jpg?q=é#part", "https://xn--bcher-kva.example/%C3%BC.jpg?q=%C3%A9"),
        ("http://faß.de/a", "http://xn--fa-hia.de/a"),
        ("http://i❤.ws/a", "http://xn--i-7iq.ws/a"),
        ("http://foo_bar.Ｅxample。com/a", "http://foo_bar.example.com/a"),
        ("http://１２７.1/a", "http://127.0.0.1/a"),
        ("HTTP://Example.COM:8080/%20a", "http://example.com:8080/%20a"),
        ("http://example.com./a", "http://example.com/a"),
        ("http://0x7f.1:80/a", "http://127.0.0.1:80/a"),
        ("http://2130706433/a", "http://127.0.0.1/a"),
        ("http://[2001:DB8::1]:80/x", "http://[2001:db8::1]:80/x"),
    ],
)
def test_an_odd_url_is_made_sendable(url: str, normal: str) -> None:
    assert normal_url(url) == normal


@given(st.one_of(st.text(), st.text().map("http://".__add__), st.text().map("http://example.com/".__add__)))
def test_any_text_is_a_url_or_a_bad_url(text: str) -> None:
    try:
        normal = normal_url(text)
    except BadUrlError:
        return
    assert normal.isascii()
    assert normal.isprintable()
    assert " " not in normal
    assert normal_url(normal) == normal


def test_results_come_in_order_and_hosts_are_not_crowded(server: str) -> None:
    rows = [Sample(row=i, url=f"{server}/{'slow' if i % 3 else 'slow-missing'}?{i}") for i in range(30)]
    results = stage(threads=16, per_host=3, timeout_s=5, deadline_s=10)(rows)
    assert [s.row for s in results] == list(range(30))
    assert [s.image is None for s in results] == [i % 3 == 0 for i in range(30)]
    assert _Misbehaving.at_once["most"] == 3


class _Watched(ByteBudget):
    """Remembers the most that was taken at once, and keeps each download waiting."""

    def __init__(self, total: int, wait_s: float = 0.0) -> None:
        super().__init__(total)
        self.most, self._wait_s, self._lock, self._now = 0, wait_s, threading.Lock(), 0

    @contextlib.contextmanager
    def download(self) -> Iterator[Take]:
        mine = 0

        def count(taken: int) -> None:
            nonlocal mine
            mine += taken
            with self._lock:
                self._now += taken
                self.most = max(self.most, self._now)

        def take_and_count(taken: int, most_s: float) -> None:
            time.sleep(self._wait_s)
            take(taken, most_s)
            count(taken)

        with super().download() as take:
            try:
                yield take_and_count
            finally:
                count(-mine)


def test_downloads_together_hold_no_more_than_their_budget_and_one_of_them(server: str) -> None:
    budget = _Watched(len(LARGE) // 2)
    fetching = stage(timeout_s=10, deadline_s=20, threads=8)
    fetching._budget = budget
    done = fetching([Sample(row=row, url=f"{server}/large?{row}") for row in range(8)])
    assert {s.sha256 for s in done} == {hashlib.sha256(LARGE).hexdigest()}
    assert 2 * len(LARGE) <= budget.most <= 2 * len(LARGE) + len(LARGE) // 2


def test_waiting_for_other_downloads_takes_none_of_a_rows_time(server: str) -> None:
    fetching = stage(timeout_s=1.2, deadline_s=1.2, retries=0)
    fetching._budget = _Watched(len(LARGE), wait_s=0.15)
    (sample,) = fetching([Sample(row=0, url=f"{server}/large")])
    assert sample.verdict is None and sample.image == LARGE


def test_who_waits_for_other_downloads_until_the_batch_is_over_may_be_tried_again(server: str) -> None:
    fetching = stage(batch_deadline_s=0.5, retries=0)
    with fetching._budget.download() as first:
        first(fetch.DOWNLOADS_BYTES, 0)
        (sample,) = fetching([Sample(row=0, url=f"{server}/large")])
    assert reason(sample) is Reason.TIMEOUT and sample.verdict and sample.verdict.retryable


def test_two_runs_record_the_same(server: str) -> None:
    paths = ["image", "missing", "stall", "truncated", "garbage", "opt-out", "hang-up", "empty", "to-itself"]
    rows = [Sample(row=i, url=f"{server}/{path}") for i, path in enumerate(paths)]
    assert stage()(rows) == stage(threads=2)(rows[:])


def test_an_image_that_came_with_its_row_is_only_hashed() -> None:
    rows = [Sample(row=0, image=IMAGE), Sample(row=1, image=b""), Sample(row=2, image=b"x" * 2000)]
    whole, empty, large = stage(max_bytes=1000)(rows)
    assert (whole.sha256, whole.http_status) == (hashlib.sha256(IMAGE).hexdigest(), None)
    assert reason(empty) == Reason.EMPTY_BODY
    assert reason(large) == Reason.TOO_LARGE


def test_a_hanging_host_cannot_hold_a_batch_for_ever(server: str) -> None:
    rows = [Sample(row=i, url=f"{server}/stall?{i}") for i in range(40)]
    start = time.monotonic()
    results = stage(per_host=2, retries=0, batch_deadline_s=1)(rows)
    assert time.monotonic() - start < 4
    assert {reason(s) for s in results} == {Reason.TIMEOUT}
    assert all(s.verdict and s.verdict.retryable for s in results)
