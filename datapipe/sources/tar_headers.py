"""A tar's headers, one after another. Python's tarfile believes them: it follows chains of them as deep as they go,
reads names of any length, and reads for ever where a size is negative."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import IO, Any

_EXTENDED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
"""Headers that say something of the next one."""
_MOST_IN_A_ROW = 16
_LONGEST = 1 << 20
"""Bytes of what such a header says."""
_MOST_GLOBAL = 1000
"""Keywords that hold for the rest of the tar."""


class BoundedTarInfo(tarfile.TarInfo):
    """A header that refuses what no tool writes. To be given to `tarfile.open` as `tarinfo`."""

    def _proc_member(self, archive: Any) -> Any:
        if self.type in _EXTENDED:
            archive.in_a_row = getattr(archive, "in_a_row", 0) + 1
            if archive.in_a_row > _MOST_IN_A_ROW or self.size > _LONGEST or len(archive.pax_headers) > _MOST_GLOBAL:
                raise tarfile.ReadError("headers without end")
        else:
            archive.in_a_row = 0
        if self.size < 0:
            raise tarfile.ReadError("a negative size")
        found = super()._proc_member(archive)  # type: ignore[misc]  # tarfile's own place to extend it
        if found.size < 0:  # an extended header may say so
            raise tarfile.ReadError("a negative size")
        return found


def tar_headers(file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """Every member of a tar. Raises tarfile.ReadError where it is not whole, and for whatever else is wrong with it."""
    if not file.read(1):
        raise tarfile.ReadError("empty file")
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=BoundedTarInfo) as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else it keeps every one of them
                yield info
            end = tar.offset
        file.seek(end)
        if any(file.read(tarfile.BLOCKSIZE)):  # tarfile takes half a header, or a damaged one, for the end
            raise tarfile.ReadError(f"nothing to read at byte {end}")
    except (ValueError, OverflowError, IndexError, KeyError) as error:  # numbers that are none, or too large
        raise tarfile.ReadError(f"a damaged header: {error}") from None
