"""Fetches each row's image over HTTP: with a verdict for whatever goes wrong, politely, and from public addresses only.

A row is a visit of several steps, each of which asks one name server or one address: it looks the URL's host up, asks
one of its addresses, follows a redirect to the next host. Between two steps it waits for its turn.
"""

from __future__ import annotations

import datetime
import hashlib
import http
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar

from pydantic import Field

from datapipe.schema import Reason, Sample, StageName
from datapipe.stages.addresses import Address, Resolver, is_public
from datapipe.stages.byte_budget import ByteBudget
from datapipe.stages.fetch_failures import ForbiddenAddressError, explained
from datapipe.stages.http_get import Deadline, Exchange, HttpError, TooLargeError, connected, connected_to_any
from datapipe.stages.opt_outs import ROBOTS_TXT_BYTES, Blocklist, RobotsTxt, opts_out
from datapipe.stages.retry_after import Pauses, retry_after_s
from datapipe.stages.stage import Phase, StageSettings, WaitsForTheLast
from datapipe.stages.turns import Visit, take_turns
from datapipe.stages.urls import BadUrlError, Target, normal_url, redirected, target
from subject_diffusion.settings import ADDED_LATER, EXECUTION_ONLY

RETRY_AFTER_CAP_S = 10.0
"""If a server asks for a longer pause, this run does not try the row again; its verdict says that a later try may
help."""

DOWNLOADS_BYTES = 512 << 20
"""What downloads under way hold together. Further ones wait for their next bytes, in time that is not theirs."""

ADDRESSES_TRIED = 4
REDIRECTS = 10
OPT_OUT_LENGTH = 300
NAME = "subject-diffusion"
BROWSER = "Mozilla/5.0 (X11; Ubuntu; Linux x86_64; rv:72.0) Gecko/20100101 Firefox/72.0"
"""The User-Agent of who gives neither name nor contact (that of img2dataset)."""


class FetchSettings(StageSettings):
    """How images are downloaded."""

    phase: ClassVar[Phase] = "fetch"

    threads: Annotated[int, EXECUTION_ONLY] = Field(64, ge=1, le=1024)
    """Simultaneous downloads per worker."""
    per_host: Annotated[int, EXECUTION_ONLY] = Field(8, ge=1)
    """Simultaneous connections to one address per worker, however many hosts share it; times run.fetch_workers in
    all."""
    micro_batch: Annotated[int, EXECUTION_ONLY] = Field(1000, ge=1)
    """Rows per batch of downloads; a smaller batch holds fewer bytes in memory."""
    timeout_s: float = Field(10.0, gt=0)
    """Maximum seconds to wait for a connection, or for the next bytes of an answer (that of img2dataset)."""
    deadline_s: float = Field(30.0, gt=0)
    """Maximum seconds for one row in all: name resolution, connecting, TLS, redirects, retries. A row that takes longer
    than its share of half of batch_deadline_s begins again, with the time that it has left, after the others."""
    batch_deadline_s: Annotated[float, EXECUTION_ONLY] = Field(300.0, gt=0)
    """Seconds after which a micro-batch starts no further download and its remaining rows fail as retryable. This
    happens only when a host with many rows hangs. Keep it below run.deadline_s."""
    retries: int = Field(2, ge=0, le=10)
    """Further attempts after a failure that may be temporary: a timeout, a broken connection, 408, 425, 429, 5xx."""
    backoff_s: float = Field(1.0, ge=0)
    """Pause before the first retry. It doubles with each further one, and is multiplied by a random factor in
    [0.5, 1.5) that depends on the row; the pause that Retry-After asks for is kept if it is longer."""
    max_bytes: int = Field(50_000_000, ge=1)
    """Maximum size of a body, in bytes; a row with a larger one fails."""
    user_agent_token: str | None = Field(None, pattern=r"^[A-Za-z0-9_-]{1,64}$")
    """Name that servers see in the User-Agent and that X-Robots-Tag may address; default: anonymous."""
    contact: Annotated[str | None, EXECUTION_ONLY] = Field(None, pattern=r"^[!-'*-~]{3,200}$")
    """Web or mail address in the User-Agent at which servers' owners reach you; default: none."""
    respect_opt_outs: bool = True
    """Drop images whose X-Robots-Tag says noai, noimageai, noindex or noimageindex (the list of img2dataset)."""
    robots_txt: Annotated[bool, ADDED_LATER] = False
    """Drop images that their host's robots.txt forbids to user_agent_token, or to subject-diffusion if there is none.
    Each worker asks each host once a day."""
    blocklist: Annotated[str | None, ADDED_LATER] = None
    """File of domains (with all below them) and URLs, one in a line, that are never asked, even by redirects. It may be
    in a bucket, and grow while a run is stopped. Default: none."""
    allow_private_addresses: bool = False
    """Also fetch from loopback, private, link-local and reserved addresses: for tests and for the toy world."""

    def build(self) -> FetchStage:
        return FetchStage(self)

    def check(self) -> None:
        """Raises RecipeError of a blocklist that cannot be read."""
        if self.blocklist is not None:
            Blocklist.read(self.blocklist)

    def user_agent(self) -> str:
        if self.user_agent_token is None and self.contact is None:
            return BROWSER
        contact = f"; +{self.contact}" if self.contact else ""
        return f"Mozilla/5.0 (compatible; {self.user_agent_token or NAME}{contact})"


class FetchStage(WaitsForTheLast):
    """Gives every row without an image its image, SHA-256 and HTTP status, or a verdict. A row that has its image gets
    its SHA-256."""

    name = StageName.FETCH
    hold: Callable[[bytes], bytes] = staticmethod(bytes)
    """Is given each image as it is downloaded, and gives back what the sample has of it: the bytes themselves, or what
    stands for them where all together are too many to be held."""

    def __init__(self, settings: FetchSettings) -> None:
        self.settings = settings
        self.micro_batch = settings.micro_batch
        token = settings.user_agent_token
        self._agent = token.lower() if token else None
        self._blocklist = Blocklist.read(settings.blocklist) if settings.blocklist else None
        self._robots = RobotsTxt(token or NAME, self._read_robots_txt) if settings.robots_txt else None
        self._resolver = Resolver()
        self._pauses = Pauses()
        self._budget = ByteBudget(DOWNLOADS_BYTES)

    def bucket(self, sample: Sample) -> object:
        return None

    def __call__(self, samples: Sequence[Sample]) -> list[Sample]:
        """The same samples in order. Hosts with few rows go first, so that a failing host with many delays no other."""
        done: dict[int, Sample] = {}
        urls: dict[int, str] = {}
        for sample in samples:
            try:
                if sample.image is None:
                    urls[sample.row] = normal_url(sample.url)
                else:
                    done[sample.row] = self._with_image(sample, sample.image)
            except BadUrlError as error:
                done[sample.row] = self._failed(sample, error)
        rows_of = Counter(target(url).host for url in urls.values())
        to_ask = [sample for sample in samples if sample.row in urls]
        to_ask.sort(key=lambda sample: rows_of[target(urls[sample.row]).host])
        share_s = self._share_s(len(to_ask))
        visits = [Visit(s, i, urls[s.row], share_s) for i, s in enumerate(to_ask)]
        started = time.monotonic()
        ends: list[float] = []

        def step(visit: Visit) -> bool:
            result = self._step(visit, started + self.settings.batch_deadline_s)
            if result is not None:
                done[visit.sample.row] = result
                ends.append(time.monotonic() - started)
            return result is None

        take_turns(visits, step, threads=self.settings.threads, per_key=self.settings.per_host)
        self.tail_s += tail_of(ends)
        return [done[s.row] for s in samples]

    def _share_s(self, rows: int) -> float:
        """How long a row may take before the others have had their turn: even if all take so long, each is asked
        within half of the batch's time."""
        lanes_s = self.settings.batch_deadline_s * self.settings.threads
        return min(lanes_s / 2 / max(rows, 1), self.settings.deadline_s)

    def _step(self, visit: Visit, start_until: float) -> Sample | None:
        """The row with its image or verdict; None: there is a further step."""
        started = time.monotonic()
        if started > start_until:
            detail = f"not asked: its batch had already taken {self.settings.batch_deadline_s:g} s"
            return visit.sample.failed(self.name, Reason.TIMEOUT, detail, retryable=True)
        deadline = Deadline(started + visit.left_s, self.settings.timeout_s, pauses_until=start_until)
        try:
            result = self._ask(visit, deadline) if visit.addresses else self._look_up(visit, deadline)
        except Exception as error:
            result = self._failed(visit.sample, error)
        now = time.monotonic()
        visit.left_s = deadline.at - now
        if result is None or result.verdict is None or not result.verdict.retryable:
            return result
        return self._again(visit, result, start_until - now)

    def _again(self, visit: Visit, failed: Sample, seconds: float) -> Sample | None:
        """None if a row that failed is to be asked again, `seconds` from now at the latest."""
        asked_pause_s = self._pauses.left_s(target(visit.url).host)
        if asked_pause_s > RETRY_AFTER_CAP_S:
            return failed
        jitter = random.Random(f"{visit.sample.row} {visit.attempt}").uniform(0.5, 1.5)
        pause_s = max(self.settings.backoff_s * 2**visit.attempt * jitter, asked_pause_s)
        url = normal_url(visit.sample.url)
        if pause_s >= visit.left_s and visit.share_s < self.settings.deadline_s and not visit.postponed:
            visit.postpone(url, self.settings.deadline_s - visit.share_s)
        elif visit.attempt < self.settings.retries and pause_s < min(visit.left_s, seconds):
            visit.retry(url, pause_s)
        else:
            return failed
        return None

    def _look_up(self, visit: Visit, deadline: Deadline) -> Sample | None:
        if self._is_blocklisted(visit.url):
            return visit.sample.dropped(self.name, Reason.BLOCKLISTED)
        visit.found(self._permitted(target(visit.url), deadline))
        return None

    def _is_blocklisted(self, url: str) -> bool:
        return self._blocklist is not None and self._blocklist.holds(url)

    def _permitted(self, aim: Target, deadline: Deadline) -> list[Address]:
        """The addresses that may be asked; they are connected to without a second look-up."""
        found = self._resolver.addresses(aim.host, aim.port, deadline.left_s())
        public = [a for a in found if self.settings.allow_private_addresses or is_public(str(a.sockaddr[0]))]
        if not public:
            raise ForbiddenAddressError
        return public[:ADDRESSES_TRIED]

    def _ask(self, visit: Visit, deadline: Deadline) -> Sample | None:
        aim = target(visit.url)
        pause_s = self._pauses.left_s(aim.host)
        if pause_s > RETRY_AFTER_CAP_S:
            detail = "not asked: its host had asked for a longer pause"
            return visit.sample.failed(self.name, Reason.HTTP_STATUS, detail, retryable=True)
        if pause_s > 0:
            visit.not_before = time.monotonic() + pause_s
            return None
        if self._robots is not None and not self._robots.allows(visit.url, deadline.at):
            return visit.sample.dropped(self.name, Reason.ROBOTS_TXT)
        try:
            sock = connected(visit.addresses[0], deadline)
        except OSError:
            if len(visit.addresses) == 1:
                raise
            visit.found(visit.addresses[1:])
            return None
        with Exchange(sock, aim, self.settings.user_agent(), deadline) as exchange:
            return self._answered(visit, exchange)

    def _answered(self, visit: Visit, exchange: Exchange) -> Sample | None:
        """What follows from the answer's head, and its body where it has the image."""
        status = exchange.status
        location = _location(exchange)
        if location is not None and visit.redirects < REDIRECTS:
            visit.redirect(redirected(visit.url, location))
            return None
        sample = visit.sample.replace(http_status=status)
        if not 200 <= status < 300:
            for value in exchange.values("retry-after") if _is_transient(status) else ():
                asked_s = retry_after_s(value, datetime.datetime.now(datetime.UTC))
                self._pauses.ask(target(visit.url).host, asked_s or 0.0)
            return sample.failed(self.name, Reason.HTTP_STATUS, _status_text(status), _is_transient(status))
        tags = exchange.values("x-robots-tag")
        sample = sample.replace(opt_out="".join(c for c in ", ".join(tags) if c.isprintable())[:OPT_OUT_LENGTH])
        if self.settings.respect_opt_outs and opts_out(tags, self._agent):
            return sample.dropped(self.name, Reason.OPT_OUT, sample.opt_out)
        with self._budget.download() as take:
            try:
                found = self._with_image(sample, exchange.body(self.settings.max_bytes, take))
            except (OSError, HttpError) as error:
                return self._failed(sample, error)
            return found if found.image is None else found.replace(image=self.hold(found.image))

    def _read_robots_txt(self, url: str, until: float) -> tuple[int, str]:
        deadline = Deadline(until, self.settings.timeout_s, pauses_until=until)
        try:
            for _ in range(REDIRECTS):
                if self._is_blocklisted(url):
                    break
                aim = target(url)
                sock = connected_to_any(self._permitted(aim, deadline), deadline)
                with Exchange(sock, aim, self.settings.user_agent(), deadline) as exchange:
                    location = _location(exchange)
                    if location is None:
                        body = exchange.start_of_body(ROBOTS_TXT_BYTES) if exchange.status < 300 else b""
                        return exchange.status, body.decode("utf-8", "replace")
                    url = redirected(url, location)
        except TimeoutError:
            raise
        except (OSError, UnicodeError, HttpError, BadUrlError, ForbiddenAddressError):
            pass
        return 503, ""

    def _with_image(self, sample: Sample, image: bytes) -> Sample:
        if not image:
            return sample.replace(image=None).failed(self.name, Reason.EMPTY_BODY)
        if len(image) > self.settings.max_bytes:
            return self._failed(sample.replace(image=None), TooLargeError())
        return sample.replace(image=image, sha256=hashlib.sha256(image).hexdigest())

    def _failed(self, sample: Sample, error: Exception) -> Sample:
        reason, detail, retryable = explained(error, self.settings.max_bytes)
        if reason is Reason.TIMEOUT:
            detail += f" (timeout_s {self.settings.timeout_s:g}, deadline_s {self.settings.deadline_s:g})"
        return sample.failed(self.name, reason, detail, retryable)


def tail_of(ends: Sequence[float]) -> float:
    """By how much the last of these moments, seconds since a start, is later than the first nine tenths foretell."""
    if not ends:
        return 0.0
    most = math.ceil(0.9 * len(ends))
    return max(0.0, max(ends) - sorted(ends)[most - 1] * len(ends) / most)


def _location(exchange: Exchange) -> str | None:
    if exchange.status not in (301, 302, 303, 307, 308):
        return None
    return next(iter(exchange.values("location") + exchange.values("uri")), None)


def _is_transient(status: int) -> bool:
    return status in (408, 425, 429) or status >= 500


def _status_text(status: int) -> str:
    if 300 <= status < 400:
        return f"{status} redirects without end or without a target"
    known = {known.value: known.phrase for known in http.HTTPStatus}
    return f"{status} {known.get(status, '')}".strip()
