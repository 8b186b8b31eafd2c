"""The reason, in a word and in a line, for whatever a download can raise."""

from __future__ import annotations

import errno
import socket
import ssl

from datapipe.schema import Reason
from datapipe.stages.http_get import EncodedError, FramingError, NoHttpError, TooLargeError, TruncatedError
from datapipe.stages.opt_outs import RobotsTxtError
from datapipe.stages.urls import BadUrlError


class ForbiddenAddressError(Exception):
    """The host has no public address."""


def explained(error: Exception, max_bytes: int) -> tuple[Reason, str, bool]:
    """Reason, detail, and whether a later try may help. The detail holds nothing that could differ in a second run."""
    match error:
        case TooLargeError():
            return Reason.TOO_LARGE, f"more than {max_bytes} bytes", False
        case ForbiddenAddressError():
            return Reason.FORBIDDEN_ADDRESS, "no public address", False
        case TimeoutError():
            return Reason.TIMEOUT, "no whole answer in time", True
        case BadUrlError() | UnicodeError():
            return Reason.BAD_URL, _one_line(error), False
        case RobotsTxtError():
            return Reason.UNREACHABLE, "the host does not give its robots.txt", True
        case socket.gaierror():
            return Reason.UNREACHABLE, "the host's name does not resolve", error.errno == socket.EAI_AGAIN
        case ssl.SSLCertVerificationError():
            return Reason.UNREACHABLE, f"certificate: {error.verify_message}", False
        case ssl.SSLError():
            return Reason.UNREACHABLE, f"no TLS connection: {error.reason}", True
        case TruncatedError():
            return Reason.UNREACHABLE, "the body is shorter than announced", True
        case OSError():
            name = errno.errorcode.get(error.errno or 0, type(error).__name__)
            return Reason.UNREACHABLE, f"connection failed: {name}", True
        case NoHttpError():
            return Reason.UNREACHABLE, "no HTTP answer", False
        case FramingError():
            return Reason.BAD_FRAMING, _one_line(error), False
        case EncodedError():
            return Reason.CONTENT_ENCODING, _one_line(error), False
        case _:
            return Reason.ERROR, f"{type(error).__name__}: {_one_line(error)}", False


def _one_line(error: Exception) -> str:
    return "".join(c if c.isprintable() else " " for c in str(error))[:160]
