"""Any WebDataset tar, with or without a manifest: files that share a name up to the first dot are one sample."""

from __future__ import annotations

import heapq
import itertools
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import fsspec
from rich.table import Table

from datapipe.errors import ShardError
from datapipe.inspect.chance import rank
from datapipe.schema import Sample, clean_text, from_json
from datapipe.shards.store import named_errors

IMAGES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("txt", "text", "caption")


@dataclass(frozen=True)
class TarSample:
    """`members`: contents by ending ("jpg", "json")."""

    key: str
    members: dict[str, bytes]

    def as_sample(self) -> Sample:
        """With its entities where this project wrote it; else the image and a caption, if there are any."""
        image = next((self.members[e] for e in IMAGES if e in self.members), None)
        try:
            return from_json(self.members["json"]).replace(image=image)
        except (KeyError, ShardError):
            text = next((self.members[e] for e in CAPTIONS if e in self.members), b"")
            return Sample(row=0, caption=clean_text(text.decode("utf-8", "replace")), image=image)


@dataclass
class TarSummary:
    """`members` and `sizes` (bytes): by ending."""

    samples: int = 0
    members: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        endings = sorted(self.members)
        return {"samples": self.samples, "members": {e: [self.members[e], self.sizes[e]] for e in endings}}

    def __rich__(self) -> Table:
        table = Table(title=f"{self.samples:,} samples", title_justify="left", box=None)
        table.add_column("ending")
        table.add_column("members", justify="right")
        table.add_column("size", justify="right")
        for ending in sorted(self.members):
            table.add_row(clean_text(ending), f"{self.members[ending]:,}", f"{self.sizes[ending] / 1e6:,.1f} MB")
        return table


def iter_tar(path: str) -> Iterator[TarSample]:
    """Reads the tar once, in order. Raises ShardError when it is none."""
    with named_errors(path, ShardError):
        try:
            with fsspec.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r|*") as tar:
                members = (m for m in tar if m.isfile())
                for key, group in itertools.groupby(members, key=lambda m: _split(m.name)[0]):
                    yield TarSample(key, {_split(m.name)[1]: _content(tar, m) for m in group})
        except (tarfile.TarError, ValueError, EOFError) as error:
            raise ShardError(f"{path}: not a whole tar ({' '.join(str(error).split())})") from None


def summarise_tar(path: str) -> TarSummary:
    summary = TarSummary()
    for sample in iter_tar(path):
        summary.samples += 1
        summary.members.update(sample.members.keys())
        summary.sizes.update({ending: len(data) for ending, data in sample.members.items()})
    return summary


def find_in_tar(path: str, key: str) -> TarSample:
    """Raises ShardError when it is not there."""
    for sample in iter_tar(path):
        if sample.key == key:
            return sample
    raise ShardError(f"{path} has no sample {key}")


def random_of_tar(path: str, count: int, seed: int) -> list[TarSample]:
    """In the order of the tar; only as many as asked for are held at a time."""
    chosen = heapq.nsmallest(count, enumerate(iter_tar(path)), key=lambda item: rank(item[1].key, seed))
    return [sample for _, sample in sorted(chosen, key=lambda item: item[0])]


def _split(name: str) -> tuple[str, str]:
    """Key and ending, as WebDataset splits a path: at the first dot of its last part."""
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return f"{folder}{slash}{stem}", ending.lower()


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    body = tar.extractfile(member)
    return b"" if body is None else body.read()
