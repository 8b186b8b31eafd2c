"""Servers are asked as their owners would have it, and slow ones do not keep others from being asked."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from datapipe.schema import Outcome, Reason, Sample
from datapipe.stages.fetch import FetchSettings, FetchStage
from subject_diffusion.errors import RecipeError

IMAGE = b"\xff\xd8 an image, as far as fetching goes \xff\xd9"


class _Owned(BaseHTTPRequestHandler):
    """Counts who asks, and answers each path in its own way."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[Counter[str]] = Counter()
    agents: ClassVar[set[str]] = set()
    robots: ClassVar[tuple[int, str]] = (404, "")
    lock = threading.Lock()
    now = 0
    most = 0

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        kind = type(self)
        with kind.lock:
            kind.asked[path] += 1
            kind.agents.add(self.headers["User-Agent"])
            kind.now += 1
            kind.most = max(kind.most, kind.now)
        time.sleep(0.02)
        with kind.lock:  # before the answer: with its last byte the client may already ask for the next
            kind.now -= 1
        with contextlib.suppress(OSError):  # the client may have had enough
            self.answer(path)
        self.close_connection = True

    def answer(self, path: str) -> None:
        if path == "/robots.txt":
            status, text = self.robots
            self.say(status, text.encode())
        elif path == "/elsewhere":
            port = self.headers["Host"].rpartition(":")[2]
            self.say(302, Location=f"http://127.0.0.1:{port}/image?{self.path}")
        elif path == "/busy":
            self.say(429, Retry_After="3600")
        elif path == "/busy-for-a-second":
            self.say(429 if self.asked[path] == 1 else 200, IMAGE, Retry_After="1")
        elif path == "/late":
            time.sleep(0.5)
            self.say(200, IMAGE)
        elif path == "/drip":
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            while True:
                self.wfile.write(b"x")
                time.sleep(0.05)
        else:
            self.say(200, IMAGE)

    def say(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The port of a server that has every name below .example."""
    real = socket.getaddrinfo

    def found(host: str, *args: object, **options: object) -> object:
        return real("127.0.0.1" if host.rstrip(".").endswith(".example") else host, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    _Owned.asked.clear()
    _Owned.agents.clear()
    _Owned.robots = (404, "")
    _Owned.most = 0
    with _Server(("127.0.0.1", 0), _Owned) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running.server_address[1]
        running.shutdown()


def fetched(urls: list[str], **changes: object) -> list[Sample]:
    usual = {"timeout_s": 5, "deadline_s": 10, "retries": 1, "backoff_s": 0.01, "allow_private_addresses": True}
    stage = FetchStage(FetchSettings.model_validate({**usual, **changes}))
    return stage([Sample(row=i, url=url) for i, url in enumerate(urls)])


def reasons(samples: list[Sample]) -> Counter[Reason | None]:
    return Counter(s.verdict.reason if s.verdict else None for s in samples)


def test_a_server_of_200_names_is_not_crowded(port: int) -> None:
    found = fetched([f"http://host{i}.example:{port}/image" for i in range(200)], per_host=4)
    assert reasons(found) == {None: 200}
    assert _Owned.most == 4


def test_all_spellings_of_a_host_are_one(port: int) -> None:
    spellings = ["127.0.0.1", "2130706433", "0x7f.1", "a.example", "A.EXAMPLE", "b.example."]
    found = fetched([f"http://{host}:{port}/image?{i}" for i in range(20) for host in spellings], per_host=4)
    assert reasons(found) == {None: 120}
    assert _Owned.most == 4


def test_the_targets_of_redirects_are_not_crowded_either(port: int) -> None:
    found = fetched([f"http://host{i}.example:{port}/elsewhere" for i in range(60)], per_host=4)
    assert reasons(found) == {None: 60}
    assert _Owned.most == 4


def test_a_row_that_waits_long_for_its_turn_has_all_of_its_time(port: int) -> None:
    found = fetched([f"http://a.example:{port}/image?{i}" for i in range(60)], per_host=1, deadline_s=0.5)
    assert reasons(found) == {None: 60}


def test_a_host_that_asks_for_a_long_pause_gets_it(port: int) -> None:
    urls = [
        f"http://{host}.example:{port}/{path}?{i}" for i in range(100) for host, path in [("a", "busy"), ("b", "ok")]
    ]
    found = fetched(urls, per_host=4)
    assert reasons(found) == {Reason.HTTP_STATUS: 100, None: 100}
    assert _Owned.asked["/busy"] <= 4
    assert all(s.verdict.retryable for s in found if s.verdict)


def test_the_pause_holds_for_the_batches_that_follow(port: int) -> None:
    stage = FetchStage(FetchSettings(allow_private_addresses=True, retries=0))
    first = stage([Sample(row=0, url=f"http://a.example:{port}/busy")])
    later = stage([Sample(row=1, url=f"http://a.example:{port}/image")])
    assert [first[0].http_status, later[0].http_status] == [429, None]
    assert reasons(later) == {Reason.HTTP_STATUS: 1}
    assert not _Owned.asked["/image"]


def test_all_rows_of_a_host_wait_for_a_short_pause_to_end(port: int) -> None:
    start = time.monotonic()
    found = fetched([f"http://a.example:{port}/busy-for-a-second?{i}" for i in range(10)], per_host=1)
    assert time.monotonic() - start > 1
    assert reasons(found) == {None: 10}
    assert _Owned.asked["/busy-for-a-second"] == 11


def test_hosts_that_drip_leave_time_for_the_others(port: int) -> None:
    dripping = [f"http://slow{i}.example:{port}/drip" for i in range(30)]
    good = [f"http://good{i}.example:{port}/image" for i in range(10)]
    # The slow ones would take 30 / 4 * 1 s, and come first.
    found = fetched(dripping + good, threads=4, deadline_s=1, batch_deadline_s=3, retries=0)
    assert reasons(found[30:]) == {None: 10}
    assert reasons(found[:30]) == {Reason.TIMEOUT: 30}


def test_a_row_that_takes_longer_than_its_share_gets_the_rest_of_its_time_after_the_others(port: int) -> None:
    urls = [f"http://a.example:{port}/{path}" for path in ["late", "image", "image", "drip"]]
    # The share of each is 2 / 2 / 4 s, and "late" takes longer.
    found = fetched(urls, threads=1, batch_deadline_s=2, deadline_s=1.5, retries=0)
    assert reasons(found) == {None: 3, Reason.TIMEOUT: 1}
    assert _Owned.asked["/late"] == 2


def test_the_user_agent_says_who_asks_and_how_to_reach_them(port: int) -> None:
    url = f"http://a.example:{port}/image"
    fetched([url])
    assert "Firefox" in _Owned.agents.pop()
    fetched([url], contact="https://example.org/bot")
    assert _Owned.agents.pop() == "Mozilla/5.0 (compatible; subject-diffusion; +https://example.org/bot)"
    fetched([url], user_agent_token="SubjectBot", contact="mailto:me@example.org")
    assert _Owned.agents.pop() == "Mozilla/5.0 (compatible; SubjectBot; +mailto:me@example.org)"


@pytest.mark.parametrize("contact", ["a\r\nX: y", "é@example.org", "a b", "(x)", ""])
def test_a_contact_cannot_break_the_header(contact: str) -> None:
    with pytest.raises(ValueError, match="contact"):
        FetchSettings(contact=contact)


ROBOTS = "User-agent: *\nDisallow: /private\nDisallow: /*.gif$\n\nUser-agent: SubjectBot\nDisallow: /image\n"


def test_robots_txt_is_kept_and_asked_for_once(port: int) -> None:
    _Owned.robots = (200, ROBOTS)
    paths = ["image", "private/a", "a.gif", "a.gif?x"]
    found = fetched([f"http://a.example:{port}/{path}" for path in paths * 10], robots_txt=True)
    assert [s.verdict and s.verdict.reason for s in found] == [None, Reason.ROBOTS_TXT, Reason.ROBOTS_TXT, None] * 10
    assert {s.verdict.outcome for s in found if s.verdict} == {Outcome.DROPPED}
    assert _Owned.asked["/robots.txt"] == 1
    assert not _Owned.asked["/private/a"]


def test_robots_txt_may_address_us_by_name_and_is_kept_by_redirects(port: int) -> None:
    _Owned.robots = (200, ROBOTS)
    urls = [f"http://a.example:{port}/image", f"http://a.example:{port}/elsewhere"]
    assert reasons(fetched(urls, robots_txt=True, user_agent_token="SubjectBot")) == {Reason.ROBOTS_TXT: 2}
    assert not _Owned.asked["/image"]


@pytest.mark.parametrize(
    ("robots", "expected"),
    [
        ((404, ""), None),
        ((403, ""), None),
        ((429, ""), Reason.UNREACHABLE),
        ((500, ""), Reason.UNREACHABLE),
        ((200, "\x00\xff nonsense\n" * 1000), None),
        ((200, "x" * 1_000_000), None),
        ((200, "User-agent: *\nDisallow: /\n" + "#" * 1_000_000), Reason.ROBOTS_TXT),
    ],
)
def test_a_host_without_robots_txt_allows_all_and_one_that_fails_nothing(
    port: int, robots: tuple[int, str], expected: Reason | None
) -> None:
    _Owned.robots = robots
    found = fetched([f"http://a.example:{port}/image?{i}" for i in range(5)], robots_txt=True)
    assert reasons(found) == {expected: 5}
    assert _Owned.asked["/robots.txt"] == 1


def test_robots_txt_is_not_asked_for_unless_wanted(port: int) -> None:
    _Owned.robots = (200, ROBOTS)
    assert reasons(fetched([f"http://a.example:{port}/private/a"])) == {None: 1}
    assert not _Owned.asked["/robots.txt"]


def test_opt_outs_that_are_asked_for_are_part_of_what_a_recipe_is() -> None:
    plain = FetchSettings().identity()
    assert not {"robots_txt", "blocklist", "contact"} & plain.keys()
    assert FetchSettings(robots_txt=True, blocklist="b", contact="c@d").identity() == {
        **plain, "robots_txt": True, "blocklist": "b",
    }  # fmt: skip


def test_what_the_blocklist_names_is_never_asked(port: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("lists") / "blocked.txt"
    path.write_text(
        f"# asked us not to\n\nBlocked.example  # all of it\nbücher.example\nfaß.example\nhttp://a.example:{port}/image?1\n127.0.0.1\n"
        f"http://c.example/%7Eann/caf%c3%a9.jpg\n"
    )
    blocked = [
        f"http://0x7f000001:{port}/image",
        f"http://a.example.:{port + 1}/image?1",
        f"http://blocked.example:{port}/image",
        f"https://deep.below.BLOCKED.example.:{port}/image",
        f"http://xn--bcher-kva.example:{port}/image",
        f"http://xn--fa-hia.example:{port}/image",
        f"https://a.example:{port}/image?1",
        f"http://a.example:{port}/%69m%61ge?1#part",
        f"http://a.example:{port}//x/%2e%2E/./image?1",
        f"http://c.example:{port}/~ann/café.jpg",
        f"http://c.example:{port}/%7eann/caf%C3%A9.jpg",
        f"http://b.example:{port}/elsewhere",
    ]
    allowed = [f"http://{asked}" for asked in (
        f"notblocked.example:{port}/image", f"a.example:{port}/image?2", f"a.example:{port}/image%3F1",
        f"fass.example:{port}/image",
    )]  # fmt: skip
    found = fetched(blocked + allowed, blocklist=str(path))
    assert reasons(found[: len(blocked)]) == {Reason.BLOCKLISTED: len(blocked)}
    assert reasons(found[len(blocked) :]) == {None: len(allowed)}
    assert _Owned.asked == {"/elsewhere": 1, "/image": 3, "/image%3F1": 1}


def test_a_blocklist_that_cannot_be_read_is_told_before_any_work(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("lists")
    with pytest.raises(RecipeError, match=r"fetch\.blocklist .*missing\.txt"):
        FetchSettings(blocklist=str(folder / "missing.txt")).check()
    bad = {b"fine.example\nhttp://[::1/\n": "line 2: malformed", b"a.example/x\n": "line 1: a URL without its scheme",
           b"\xff\xfea\n": "no text in UTF-8"}  # fmt: skip
    for content, says in bad.items():
        (folder / "bad.txt").write_bytes(content)
        with pytest.raises(RecipeError, match=rf"bad\.txt.* {says}"):
            FetchSettings(blocklist=str(folder / "bad.txt")).check()
