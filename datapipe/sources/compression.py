"""Compressed files, known by their first bytes and not by their names, which do not always say."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from typing import IO, Any, cast

import pyarrow as pa

GZIP, BZIP2, XZ, ZSTD = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"
COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")

READ_AT_ONCE = 1 << 20


def is_compressed(file: IO[bytes]) -> bool:
    """Looks at the first bytes, and goes back to the start."""
    head = file.read(6)
    file.seek(0)
    return head.startswith((GZIP, BZIP2, XZ, ZSTD))


def decompressed(file: IO[bytes]) -> IO[bytes]:
    """The file itself, or what is in it, also where a server has compressed a compressed file once more. It can be
    wound forward fast enough, and back at the price of a new start."""
    once = _decompressed(file)
    return file if once is file else _decompressed(once)


def _decompressed(file: IO[bytes]) -> IO[bytes]:
    head = file.read(6)
    file.seek(0)
    if head.startswith(GZIP):
        return cast(IO[bytes], gzip.GzipFile(fileobj=file, mode="rb"))
    if head.startswith(BZIP2):
        return cast(IO[bytes], bz2.BZ2File(file))
    if head.startswith(XZ):
        return cast(IO[bytes], lzma.LZMAFile(file))
    if head.startswith(ZSTD):
        return io.BufferedReader(_Zstandard(file), READ_AT_ONCE)
    return file


class _Zstandard(io.RawIOBase):
    """Arrow's decompressor as a file that can be wound."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._at = 0
        self._stream = _arrow_stream(file)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        data: bytes = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            raise io.UnsupportedOperation("the length of a compressed file is not known")
        target = offset if whence == io.SEEK_SET else self._at + offset
        if target < self._at:
            self._file.seek(0)
            self._at, self._stream = 0, _arrow_stream(self._file)
        while self._at < target:
            skipped = len(self._stream.read(min(READ_AT_ONCE, target - self._at)))
            if not skipped:
                break
            self._at += skipped
        return self._at


class _KeptOpen:
    """Arrow closes the file beneath a stream that is given up; here another stream follows on the same file."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self.read = file.read

    def close(self) -> None:
        pass


def _arrow_stream(file: IO[bytes]) -> Any:
    return pa.CompressedInputStream(pa.PythonFile(_KeptOpen(file), mode="r"), "zstd")
