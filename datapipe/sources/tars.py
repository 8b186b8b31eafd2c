"""WebDataset tars such as img2dataset's, read in place: their images stay where they are until a slice needs them."""

from __future__ import annotations

import json
import os
import posixpath
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import IO, Any

from datapipe.sources.columns import columns_of_keys, facts_of
from datapipe.sources.compression import decompressed
from datapipe.sources.failed_downloads import failed_downloads
from datapipe.sources.folders import TEXT_LIMIT
from datapipe.sources.input_files import InputFile, opened_as_it_is
from datapipe.sources.kinds import counted
from datapipe.sources.row_index import DamagedError, Found, ImagePlace, InputRow, RowFacts
from datapipe.sources.settings import SourceSettings
from datapipe.sources.tar_keys import Group, group_members, is_clutter, is_image, main_image, rule_for
from datapipe.sources.values import text_of
from subject_diffusion.errors import one_line

TEXT_ENDINGS = ("txt", "text", "caption", "cap")
TARS_AT_ONCE = 8

MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cJXL ", b"\0\0\0\x0cjP  ")
"""How images begin, whatever the name of their file."""


@dataclass(frozen=True)
class Member:
    """A file in a tar, or a link to one. `text`: what it says, if it is a text or a json; `image`: whether it is an
    image, by its ending or first bytes."""

    name: str
    offset: int
    size: int
    text: bytes | None = None
    image: bool = False
    link: str | None = None


@dataclass
class TarContent:
    """The members of a tar, in order; `problem`: why there are no more of them; `packed`: it is compressed."""

    members: list[Member] = field(default_factory=list)
    problem: str = ""
    packed: bool = False


def rows_of_tars(
    files: Sequence[InputFile], sidecars: Mapping[str, InputFile], settings: SourceSettings, found: Found
) -> Iterator[InputRow]:
    """Every sample of the tars, in order: what its json (or txt) says, and where its image lies. A tar that ends early
    has one more row, with a problem; one with a sidecar, by the tar's name, the rows that were not downloaded."""

    def failed(file: InputFile) -> list[InputRow]:
        return list(failed_downloads(sidecars.get(file.name), settings, found))

    # In a bucket, most of the time is waiting.
    with ThreadPoolExecutor(TARS_AT_ONCE) as pool:
        window = 2 * TARS_AT_ONCE
        for start in range(0, len(files), window):
            part = files[start : start + window]
            for file, content, lost in zip(part, pool.map(_content, part), pool.map(failed, part), strict=True):
                yield from _rows(file, content, settings, found)
                if content.problem and settings.strict:
                    raise DamagedError(f"input {file.url.removesuffix(file.name)}{content.problem}")
                if content.problem:
                    yield InputRow.lost(content.problem)
                yield from lost


def _content(file: InputFile) -> TarContent:
    content = TarContent()
    try:
        with opened_as_it_is(file.url) as raw:
            tar = decompressed(raw)
            content.packed = tar is not raw
            for member in members_of(tar):
                content.members.append(member)
    except (tarfile.TarError, DamagedError) as error:
        what = one_line(error) if isinstance(error, tarfile.TarError) else "compressed, and damaged or cut off"
        content.problem = (
            f"{file.name}: not a whole tar ({what}, after {len(content.members)} members); download it again or "
            "take it away"
        )
    content.members = with_links_resolved(content.members)
    return content


def members_of(file: IO[bytes]) -> Iterator[Member]:
    """The files and links of a tar, clutter left out. Raises tarfile.TarError where it is not whole."""
    if not file.read(1):
        raise tarfile.ReadError("empty file")
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # else it keeps every one of them
            name = posixpath.normpath(info.name)
            if is_clutter(name):
                continue
            if info.islnk():
                yield Member(name, 0, 0, link=posixpath.normpath(info.linkname))
            elif info.issym():
                yield Member(
                    name, 0, 0, link=posixpath.normpath(posixpath.join(posixpath.dirname(name), info.linkname))
                )
            elif info.isreg():
                yield _member(file, name, info)
        end = tar.offset
    file.seek(end)
    if any(file.read(tarfile.BLOCKSIZE)):  # tarfile takes half a header, or a damaged one, for the end
        raise tarfile.ReadError(f"nothing to read at byte {end}")


def _member(file: IO[bytes], name: str, info: tarfile.TarInfo) -> Member:
    ending = name.rpartition(".")[2].lower()
    if ending == "json" or ending in TEXT_ENDINGS:
        file.seek(info.offset_data)
        return Member(name, info.offset_data, info.size, text=file.read(min(info.size, TEXT_LIMIT)))
    image = is_image(ending)
    if not image:
        file.seek(info.offset_data)
        start = file.read(min(info.size, 12))
        image = start.startswith(MAGIC) or (start[:4], start[8:]) == (b"RIFF", b"WEBP") or start[4:8] == b"ftyp"
    return Member(name, info.offset_data, info.size, image=image)


def with_links_resolved(members: Sequence[Member]) -> list[Member]:
    """Links with the place and content of what they lead to; those that lead nowhere stay."""
    if not any(member.link for member in members):
        return list(members)
    by_name = {member.name: member for member in reversed(members)}
    resolved = []
    for member in members:
        target: Member | None = member
        for _ in range(8):  # links to links
            if target is None or target.link is None:
                break
            target = by_name.get(target.link)
        if target is not None and target.link is None:
            member = replace(target, name=member.name)
        resolved.append(member)
    return resolved


def _rows(file: InputFile, content: TarContent, settings: SourceSettings, found: Found) -> Iterator[InputRow]:
    names = [member.name for member in content.members]
    rule = rule_for(names) if settings.key_rule == "auto" else settings.key_rule
    if rule != settings.key_rule and rule == "last_dot":
        found.note(
            f"{file.name}: keys end at the last dot of a name, since at the first one, as in WebDataset, images would "
            "share a key; source.key_rule=first_dot if they belong together"
        )
    surplus = 0
    for group in group_members(names, rule):
        members = [content.members[n] for n in group.members]
        row, images = _sample(file, group, members, content.packed, settings)
        surplus += max(images - 1, 0)
        if row is None:
            found.note(f"{file.name}: {members[0].name} is left out, being neither image nor text nor json")
            continue
        if not group.clear:
            found.note(f"{file.name}: the key {group.key} comes several times, mixed up; its images go without texts")
        yield row
    if surplus:
        found.note(
            f"{file.name}: {counted(surplus, 'image')} beyond the first of a key left out; source.key_rule=last_dot if "
            "each is a sample"
        )


def _sample(
    file: InputFile, group: Group, members: Sequence[Member], packed: bool, settings: SourceSettings
) -> tuple[InputRow | None, int]:
    """The row of a group, None if there is nothing to it, and how many images the group has."""
    image = image_of(group, members)
    texts = {ending_of(m, group): m.text for m in members if m.text is not None} if group.clear else {}
    facts = facts_of_texts(texts, settings)
    if image is not None:
        place = ImagePlace(os.fsencode(file.name), image.offset, image.size, packed)
        return InputRow(facts, place), sum(member.image for member in members)
    link = next((m for m in members if m.link), None)
    if link is not None:
        return InputRow(facts, problem=f"{file.name}: {link.name} is a link to {link.link}, which is not in it"), 0
    if not texts:
        return None, 0
    return InputRow(facts, problem="" if facts.url else f"{file.name}: {group.key} has no image"), 0


def ending_of(member: Member, group: Group) -> str:
    """What follows the dot behind its group's key, in lower case."""
    return member.name[len(group.key) + 1 :].lower()


def image_of(group: Group, members: Sequence[Member]) -> Member | None:
    """The image of a group of these members, if it has one."""
    images = {ending_of(member, group): member for member in reversed(members) if member.image}
    named = main_image(list(reversed(images)))
    return images[named] if named is not None else next(reversed(images.values()), None)


def facts_of_texts(texts: Mapping[str, bytes], settings: SourceSettings) -> RowFacts:
    """What the json says and, where it has no caption, the text. `texts`: by ending; a plain ending goes before a
    longer one."""
    plain_first = sorted(texts, key=lambda ending: "." in ending)
    by_kind = {ending.rpartition(".")[2]: texts[ending] for ending in reversed(plain_first)}
    try:
        record: Any = json.loads(by_kind.get("json", b"{}").removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError):
        record = {}
    if not isinstance(record, dict):
        record = {}
    facts = facts_of(record, columns_of_keys(tuple(record), settings), settings)
    if facts.alt_text:
        return facts
    text = next((by_kind[ending] for ending in TEXT_ENDINGS if ending in by_kind), b"")
    return replace(facts, alt_text=text_of(text))
