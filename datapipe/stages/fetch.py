"""Fetches each row's image with the downloader of img2dataset, through an opener that closes its gaps.

img2dataset calls `urllib.request.urlopen`. The opener in guarded_http.py bounds every download in bytes and seconds,
keeps it out of private networks, and records what img2dataset discards: the status, the headers and the error.
"""

from __future__ import annotations

import datetime
import errno
import hashlib
import http
import http.client
import io
import os
import random
import socket
import ssl
import time
import urllib.error
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from typing import Annotated, ClassVar
from urllib.parse import urlsplit

from pydantic import Field

from datapipe.schema import Reason, Sample, StageName
from datapipe.stages.guarded_http import (
    BadUrlError,
    Exchange,
    ForbiddenAddressError,
    Limits,
    OptedOutError,
    TooLargeError,
    exchanging,
    normal_url,
)
from datapipe.stages.stage import Phase, StageSettings
from subject_diffusion.settings import EXECUTION_ONLY

RETRY_AFTER_CAP_S = 10.0
"""If a server asks for a longer pause, this run does not try the row again; its verdict says that a later try may
help."""

Download = Callable[[tuple[int, str], float, str | None, None], tuple[int, io.BytesIO | None, str | None]]
"""`download_image` of img2dataset: ((key, url), timeout, user agent token, directives) -> (key, body, error)."""


class FetchSettings(StageSettings):
    """How images are downloaded."""

    phase: ClassVar[Phase] = "fetch"

    threads: Annotated[int, EXECUTION_ONLY] = Field(64, ge=1, le=1024)
    """Simultaneous downloads per worker."""
    per_host: Annotated[int, EXECUTION_ONLY] = Field(8, ge=1)
    """Simultaneous connections to one host per worker, to be polite; times run.fetch_workers in all."""
    micro_batch: Annotated[int, EXECUTION_ONLY] = Field(1000, ge=1)
    """Rows per batch of downloads; a smaller batch holds fewer bytes in memory."""
    timeout_s: float = Field(10.0, gt=0)
    """Maximum seconds to wait for a connection, or for the next bytes of an answer (the default of img2dataset)."""
    deadline_s: float = Field(30.0, gt=0)
    """Maximum seconds for one row in all, with its redirects and retries."""
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
    respect_opt_outs: bool = True
    """Drop images whose X-Robots-Tag says noai, noimageai, noindex or noimageindex (the list of img2dataset)."""
    allow_private_addresses: bool = False
    """Also fetch from loopback, private, link-local and reserved addresses: for tests and for the toy world."""

    def build(self) -> FetchStage:
        return FetchStage(self)


class FetchStage:
    """Gives every row without an image its image, SHA-256 and HTTP status, or a verdict. A row that has its image gets
    its SHA-256."""

    name = StageName.FETCH

    def __init__(self, settings: FetchSettings) -> None:
        self.settings = settings
        self.micro_batch = settings.micro_batch
        self._agent = settings.user_agent_token.lower() if settings.user_agent_token else None
        self._download = _img2dataset_download()
        self._limits = Limits(
            timeout_s=settings.timeout_s,
            max_bytes=settings.max_bytes,
            allow_private_addresses=settings.allow_private_addresses,
            respect_opt_outs=settings.respect_opt_outs,
            agent=self._agent,
        )

    def bucket(self, sample: Sample) -> object:
        return None

    def __call__(self, samples: Sequence[Sample]) -> list[Sample]:
        """The same samples in order. Hosts with few rows go first, so that a failing host with many delays no other."""
        done = {s.row: self._with_image(s, s.image) for s in samples if s.image is not None}
        by_host: dict[str, deque[Sample]] = {}
        for sample in samples:
            if sample.image is None:
                by_host.setdefault(_host(sample.url), deque()).append(sample)
        start_until = time.monotonic() + self.settings.batch_deadline_s

        def empty(queue: deque[Sample]) -> None:
            while True:
                try:
                    sample = queue.popleft()
                except IndexError:
                    return
                done[sample.row] = self._fetch(sample, start_until)

        with ThreadPoolExecutor(self.settings.threads, thread_name_prefix="fetch") as pool:
            queues = sorted(by_host.values(), key=len)
            lanes = [pool.submit(empty, q) for q in queues for _ in range(min(self.settings.per_host, len(q)))]
        for lane in lanes:
            lane.result()
        return [done[s.row] for s in samples]

    def _fetch(self, sample: Sample, start_until: float) -> Sample:
        if time.monotonic() > start_until:
            detail = f"not asked: its batch had already taken {self.settings.batch_deadline_s:g} s"
            return sample.failed(self.name, Reason.TIMEOUT, detail, retryable=True)
        try:
            url = normal_url(sample.url)
        except BadUrlError as error:
            return sample.failed(self.name, Reason.BAD_URL, str(error))
        deadline = time.monotonic() + self.settings.deadline_s
        for attempt in range(self.settings.retries + 1):
            result, asked_pause_s = self._attempt(sample, url, deadline)
            if result.verdict is None or not result.verdict.retryable or asked_pause_s > RETRY_AFTER_CAP_S:
                break
            jitter = random.Random(f"{sample.row} {attempt}").uniform(0.5, 1.5)
            pause_s = max(self.settings.backoff_s * 2**attempt * jitter, asked_pause_s)
            if attempt == self.settings.retries or time.monotonic() + pause_s >= deadline:
                break
            time.sleep(pause_s)
        return result

    def _attempt(self, sample: Sample, url: str, deadline: float) -> tuple[Sample, float]:
        """The sample after one GET, and the pause in seconds that the server asked for."""
        with exchanging(self._limits, deadline) as exchange:
            # The opener reads X-Robots-Tag, so img2dataset gets no directives of its own.
            _, body, message = self._download((sample.row, url), self._limits.timeout_s, self._agent, None)
        sample = sample.replace(http_status=exchange.status, opt_out=exchange.opt_out)
        if body is None:
            return self._failed(sample, exchange.error or RuntimeError(message)), _pause_asked_s(exchange)
        if exchange.status is None:
            raise RuntimeError("img2dataset no longer downloads through urllib.request.urlopen")
        return self._with_image(sample, body.getvalue()), 0.0

    def _with_image(self, sample: Sample, image: bytes) -> Sample:
        if not image:
            return sample.replace(image=None).failed(self.name, Reason.EMPTY_BODY)
        if len(image) > self.settings.max_bytes:
            return self._failed(sample.replace(image=None), TooLargeError())
        return sample.replace(image=image, sha256=hashlib.sha256(image).hexdigest())

    def _failed(self, sample: Sample, error: Exception) -> Sample:
        """Gives the verdict for what a download raised. The detail holds nothing that could differ in a second run."""
        if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
            error = error.reason
        match error:
            case OptedOutError():
                return sample.dropped(self.name, Reason.OPT_OUT, sample.opt_out)
            case TooLargeError():
                reason, detail, retryable = Reason.TOO_LARGE, f"more than {self.settings.max_bytes} bytes", False
            case ForbiddenAddressError():
                reason, detail, retryable = Reason.FORBIDDEN_ADDRESS, "no public address", False
            case urllib.error.HTTPError():
                reason, detail, retryable = Reason.HTTP_STATUS, _status_text(error), _is_transient(error.code)
            case TimeoutError():
                limits = f"timeout_s {self.settings.timeout_s:g}, deadline_s {self.settings.deadline_s:g}"
                reason, detail, retryable = Reason.TIMEOUT, f"no whole answer in time ({limits})", True
            case BadUrlError() | UnicodeError() | http.client.InvalidURL():
                reason, detail, retryable = Reason.BAD_URL, str(error), False
            case socket.gaierror():
                reason, detail = Reason.UNREACHABLE, "the host's name does not resolve"
                retryable = error.errno == socket.EAI_AGAIN
            case ssl.SSLCertVerificationError():
                reason, detail, retryable = Reason.UNREACHABLE, f"certificate: {error.verify_message}", False
            case http.client.IncompleteRead():
                reason, detail, retryable = Reason.UNREACHABLE, "the body is shorter than announced", True
            case OSError():
                name = errno.errorcode.get(error.errno or 0, type(error).__name__)
                reason, detail, retryable = Reason.UNREACHABLE, f"connection failed: {name}", True
            case http.client.HTTPException():
                reason, detail, retryable = Reason.UNREACHABLE, f"no HTTP answer: {type(error).__name__}", False
            case _:
                reason, detail, retryable = Reason.ERROR, f"{type(error).__name__}: {error}", False
        return sample.failed(self.name, reason, _one_line(detail), retryable)


def _img2dataset_download() -> Download:
    # img2dataset imports albumentations, which would look for its newest version on the internet.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    # Imported here because it takes seconds, and the settings above must load at once.
    from img2dataset.downloader import download_image

    download: Download = download_image
    return download


def _host(url: str) -> str:
    try:
        return urlsplit(url.strip()).netloc.lower()
    except ValueError:
        return ""


def _is_transient(status: int) -> bool:
    return status in (408, 425, 429) or status >= 500


def _status_text(error: urllib.error.HTTPError) -> str:
    if 300 <= error.code < 400:
        return f"{error.code} redirects without end or without a target"
    known = {status.value: status.phrase for status in http.HTTPStatus}
    return f"{error.code} {known.get(error.code, '')}".strip()


def _pause_asked_s(exchange: Exchange) -> float:
    """Retry-After, in seconds or as a date; 0 when there is none."""
    asked = exchange.retry_after.strip()
    if asked.isascii() and asked.isdigit():
        return float(asked[:9])
    try:
        until = parsedate_to_datetime(asked)
    except (ValueError, OverflowError):
        return 0.0
    now = datetime.datetime.now(datetime.UTC)
    return max((until.astimezone(datetime.UTC) - now).total_seconds(), 0.0)


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)[:200]
