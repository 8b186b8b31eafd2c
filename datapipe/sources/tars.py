"""WebDataset tars such as img2dataset's, read in place: their images stay where they are until a slice needs them."""

from __future__ import annotations

import heapq
import itertools
import json
import operator
import os
import posixpath
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from sqlite3 import Connection
from typing import IO, Any, Literal

from datapipe.sources.columns import columns_of_keys, facts_of
from datapipe.sources.compression import decompressed
from datapipe.sources.failed_downloads import failed_downloads
from datapipe.sources.folders import TEXT_LIMIT
from datapipe.sources.input_files import InputFile, opened_as_it_is
from datapipe.sources.kinds import counted
from datapipe.sources.row_index import DamagedError, Found, ImagePlace, InputRow, RowFacts
from datapipe.sources.settings import SourceSettings
from datapipe.sources.tar_headers import tar_headers
from datapipe.sources.tar_keys import (
    Group,
    KeyRule,
    groups_of_key,
    is_clutter,
    is_image,
    main_image,
    shares_its_key,
    split_key,
)
from datapipe.sources.temporary_database import temporary_database
from datapipe.sources.values import text_of
from subject_diffusion.errors import one_line

TEXT_ENDINGS = ("txt", "text", "caption", "cap")
TARS_AT_ONCE = 8
_MOST_LINKS = 8
"""Links that lead to links, until one leads to a file."""

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


class TarContent:
    """The members of a tar, numbered in their order, in a database, because there may be millions. `problem`: why there
    are no more of them; `packed`: the tar is compressed."""

    def __init__(self, database: Connection) -> None:
        self._database = database
        database.execute("CREATE TABLE members (number INTEGER PRIMARY KEY, name, start, size, text, image, link)")
        database.create_function("first_dot", 1, lambda name: _key_of(name, "first_dot"))
        database.create_function("last_dot", 1, lambda name: _key_of(name, "last_dot"))
        self.problem = ""
        self.packed = False

    def add(self, members: Iterable[Member]) -> None:
        query = "INSERT INTO members (name, start, size, text, image, link) VALUES (?, ?, ?, ?, ?, ?)"
        self._database.executemany(query, map(_record, members))

    def count(self) -> int:
        (count,) = self._database.execute("SELECT count(*) FROM members").fetchone()
        return int(count)

    def member(self, number: int) -> Member:
        return self._member("number = ?", number)  # type: ignore[return-value]  # numbers are those of members

    def resolve_links(self) -> None:
        """As `with_links_resolved`."""
        links = [number for (number,) in self._database.execute("SELECT number FROM members WHERE link IS NOT NULL")]
        if links:
            self._database.execute("CREATE INDEX names ON members (name, number)")
        for number in links:
            member = resolved(self.member(number), lambda name: self._member("name = ?", os.fsencode(name)))
            query = "UPDATE members SET name = ?, start = ?, size = ?, text = ?, image = ?, link = ? WHERE number = ?"
            self._database.execute(query, (*_record(member), number))

    def by_key(self, rule: Literal["first_dot", "last_dot"]) -> Iterator[tuple[str, list[tuple[int, str]]]]:
        """Each key with number and name of all of its members, by its first one."""
        query = f"""
            SELECT first, number, name
            FROM (SELECT number, name, min(number) OVER (PARTITION BY {rule}(name)) AS first FROM members)
            ORDER BY first, number
        """
        for _, rows in itertools.groupby(self._database.execute(query), key=operator.itemgetter(0)):
            members = [(number, os.fsdecode(name)) for _, number, name in rows]
            yield split_key(members[0][1], rule)[0], members

    def _member(self, condition: str, value: int | bytes) -> Member | None:
        query = f"SELECT name, start, size, text, image, link FROM members WHERE {condition} ORDER BY number LIMIT 1"
        found = self._database.execute(query, (value,)).fetchone()
        if found is None:
            return None
        name, start, size, text, image, link = found
        return Member(os.fsdecode(name), start, size, text, bool(image), None if link is None else os.fsdecode(link))


def _key_of(name: bytes, rule: KeyRule) -> bytes:
    return os.fsencode(split_key(os.fsdecode(name), rule)[0])


def _record(member: Member) -> tuple[object, ...]:
    """Names as bytes, because they need not be UTF-8."""
    link = None if member.link is None else os.fsencode(member.link)
    return os.fsencode(member.name), member.offset, member.size, member.text, member.image, link


def rows_of_tars(
    files: Iterable[InputFile],
    sidecar_of: Callable[[str], InputFile | None],
    settings: SourceSettings,
    found: Found,
) -> Iterator[InputRow]:
    """Every sample of the tars, in order: what its json (or txt) says, and where its image lies. A tar that ends early
    has one more row, with a problem; one with a sidecar, by the tar's name, the rows that were not downloaded."""

    def failed(sidecar: InputFile | None) -> list[InputRow]:
        return list(failed_downloads(sidecar, settings, found))

    files = iter(files)
    while part := list(itertools.islice(files, TARS_AT_ONCE)):
        sidecars = [sidecar_of(file.name) for file in part]
        with ExitStack() as stack:
            contents = [TarContent(stack.enter_context(temporary_database())) for _ in part]
            # In a bucket, most of the time is waiting. The threads end before the databases that they fill are closed.
            pool = stack.enter_context(ThreadPoolExecutor(TARS_AT_ONCE))
            read = pool.map(_read, part, contents)
            for file, content, _, lost in zip(part, contents, read, pool.map(failed, sidecars), strict=True):
                yield from _rows(file, content, settings, found)
                if content.problem and settings.strict:
                    raise DamagedError(f"input {file.url.removesuffix(file.name)}{content.problem}")
                if content.problem:
                    yield InputRow.lost(content.problem)
                yield from lost


def _read(file: InputFile, content: TarContent) -> None:
    """Adds the members of a tar to `content`."""
    try:
        with opened_as_it_is(file.url) as raw:
            tar = decompressed(raw)
            content.packed = tar is not raw
            content.add(members_of(tar))
    except (tarfile.TarError, DamagedError) as error:
        what = one_line(error) if isinstance(error, tarfile.TarError) else "compressed, and damaged or cut off"
        content.problem = (
            f"{file.name}: not a whole tar ({what}, after {content.count()} members); download it again or take it away"
        )
    content.resolve_links()


def members_of(file: IO[bytes]) -> Iterator[Member]:
    """The files and links of a tar, clutter left out. Raises tarfile.TarError where it is not whole."""
    for info in tar_headers(file):
        name = posixpath.normpath(info.name)
        if is_clutter(name):
            continue
        if info.islnk():
            yield Member(name, 0, 0, link=posixpath.normpath(info.linkname))
        elif info.issym():
            yield Member(name, 0, 0, link=posixpath.normpath(posixpath.join(posixpath.dirname(name), info.linkname)))
        elif info.isreg():
            yield _member(file, name, info)


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
    by_name = {member.name: member for member in reversed(members)}
    return [resolved(member, by_name.get) for member in members]


def resolved(member: Member, find: Callable[[str], Member | None]) -> Member:
    """A link with the place and content of what it leads to; one that leads nowhere, or no link, as it is. `find`: a
    member by its name."""
    target: Member | None = member
    for _ in range(_MOST_LINKS):
        if target is None or target.link is None:
            break
        target = find(target.link)
    return member if target is None or target.link is not None else replace(target, name=member.name)


def _rows(file: InputFile, content: TarContent, settings: SourceSettings, found: Found) -> Iterator[InputRow]:
    rule = settings.key_rule
    if rule == "auto":
        shared = (shares_its_key(name for _, name in members) for _, members in content.by_key("first_dot"))
        rule = "last_dot" if any(shared) else "first_dot"
    if rule != settings.key_rule and rule == "last_dot":
        found.note(
            f"{file.name}: keys end at the last dot of a name, since at the first one, as in WebDataset, images would "
            "share a key; source.key_rule=first_dot if they belong together"
        )
    surplus = 0
    for group in groups_of(content, rule):
        members = [content.member(number) for number in group.members]
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


def groups_of(content: TarContent, rule: Literal["first_dot", "last_dot"]) -> Iterator[Group]:
    """The samples of a tar, by their first members."""
    waiting: list[tuple[int, Group]] = []
    """A heap: where a key is that of several samples, the first member of another key may come before the second's."""
    for key, members in content.by_key(rule):
        while waiting and waiting[0][0] < members[0][0]:
            yield heapq.heappop(waiting)[1]
        for group in groups_of_key(key, members, rule):
            heapq.heappush(waiting, (group.members[0], group))
    while waiting:
        yield heapq.heappop(waiting)[1]


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
