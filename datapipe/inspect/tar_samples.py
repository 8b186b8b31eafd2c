"""Any WebDataset tar, with or without a manifest, in the samples that the pipeline would read from it."""

from __future__ import annotations

import heapq
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from rich.table import Table
from rich.text import Text

from datapipe.decoding import normalize
from datapipe.image_file import ImageRefusedError
from datapipe.inspect.random_choice import rank
from datapipe.schema import MAX_PIXELS, Reason, Sample, StageName, clean_text, from_json, printable
from datapipe.sources import SourceSettings
from datapipe.sources.input_files import opened
from datapipe.sources.tar_keys import Group, group_members, rule_for
from datapipe.sources.tars import (
    TEXT_ENDINGS,
    Member,
    ending_of,
    facts_of_texts,
    image_of,
    members_of,
    with_links_resolved,
)
from subject_diffusion.errors import ShardError, one_line


@dataclass(frozen=True)
class TarSample:
    """`members`: contents by ending ("jpg", "json"); `image`: the ending of the one that is the sample's image."""

    key: str
    members: dict[str, bytes]
    image: str | None

    def as_sample(self) -> Sample:
        """The sample with its entities where this project wrote it, failed where it is corrupt; else its image and
        caption, if there are any. An image that cannot be decoded is left out."""
        image = None if self.image is None else self.members[self.image]
        try:
            return from_json(self.members["json"]).replace(image=image)
        except (KeyError, ShardError) as error:
            if b'"schema_version"' in self.members.get("json", b""):
                return Sample(row=0).failed(StageName.SELECT, Reason.UNREADABLE, f"corrupt: {error}")
            texts = {e: data for e, data in self.members.items() if e.rpartition(".")[2] in ("json", *TEXT_ENDINGS)}
            sample = Sample(row=0, caption=clean_text(facts_of_texts(texts, SourceSettings()).alt_text))
        if image is None:
            return sample
        try:
            stored = normalize(image, MAX_PIXELS)
        except ImageRefusedError:
            return sample
        return sample.replace(image=stored.data, width=stored.width, height=stored.height)


@dataclass(frozen=True)
class _Group:
    """One sample, of which nothing but the members' places was read."""

    group: Group
    members: tuple[Member, ...]


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
            table.add_row(Text(printable(ending)), f"{self.members[ending]:,}", f"{self.sizes[ending] / 1e6:,.1f} MB")
        return table


def summarize_tar(path: str) -> TarSummary:
    """Raises ShardError where it is no whole tar."""
    summary = TarSummary()
    for found in _groups(path):
        summary.samples += 1
        for member in found.members:
            ending = ending_of(member, found.group)
            summary.members[ending] += 1
            summary.sizes[ending] += member.size
    return summary


def find_in_tar(path: str, key: str) -> TarSample:
    """The first sample of this key. Raises ShardError when it is not there."""
    found = next((g for g in _groups(path) if g.group.key == key), None)
    if found is None:
        raise ShardError(f"{path} has no sample {key}")
    return next(_read(path, [found]))


def random_of_tar(path: str, count: int, seed: int) -> list[TarSample]:
    """`count` samples at random, in the order of the tar; no more are held at a time."""
    chosen = heapq.nsmallest(count, enumerate(_groups(path)), key=lambda item: rank(item[1].group.key, seed))
    return list(_read(path, (found for _, found in sorted(chosen, key=lambda item: item[0]))))


def _groups(path: str) -> list[_Group]:
    """The samples of a tar. Raises ShardError where it is no whole one, SourceError where it cannot be read."""
    try:
        with opened(path) as tar:
            # What texts say is read once a sample has been chosen.
            members = with_links_resolved([replace(member, text=None) for member in members_of(tar)])
    except tarfile.TarError as error:
        raise ShardError(f"{path}: not a whole tar ({one_line(error)}); download it again") from None
    names = [member.name for member in members]
    groups = group_members(names, rule_for(names))
    return [_Group(group, tuple(members[number] for number in group.members)) for group in groups]


def _read(path: str, groups: Iterable[_Group]) -> Iterator[TarSample]:
    with opened(path) as tar:
        for found in groups:
            group, contents = found.group, {}
            image = image_of(group, found.members)
            # As in the pipeline, nobody knows whose the texts of a mixed-up key are.
            for member in found.members if group.clear else ([image] if image else []):
                tar.seek(member.offset)
                contents[ending_of(member, group)] = tar.read(member.size)
            yield TarSample(group.key, contents, None if image is None else ending_of(image, group))
