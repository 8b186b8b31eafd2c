"""What `sdd inspect` shows: tables of a whole, or single samples as facts and pictures."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from datapipe.errors import QueryError
from datapipe.inspect.chance import rank_in_sql
from datapipe.inspect.draw import contact_sheet, draw_sample
from datapipe.inspect.facts import (
    CANDIDATE_COLUMNS,
    IMAGE_COLUMNS,
    can_show_pictures,
    candidate_line,
    facts,
    image_line,
    terminal_picture,
)
from datapipe.inspect.sidecars import View, quoted, select
from datapipe.inspect.summary import count_manifests, expect_shards, summarise
from datapipe.inspect.tars import find_in_tar, random_of_tar, summarise_tar
from datapipe.schema import Sample, clean_text, to_table
from datapipe.shards import Manifest, Store, manifests, read_manifest, read_sample, read_samples
from datapipe.shards.store import named_errors

SHEET_IMAGES = 64
"""Of a contact sheet at most; more would be too large to look at."""

TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")
_SHARD = re.compile(r"(?P<folder>.*/)?(?P<name>shard-(?P<index>\d{6,}))\.(tar|parquet|json)")


@dataclass(frozen=True)
class Ask:
    """What of a dataset or tar is meant; nothing set: the whole. `save`: where the picture goes; `as_json`: machine
    readable, one object a line."""

    shard: int | None = None
    where: str | None = None
    candidates: bool = False
    entity: str | None = None
    sample: str | None = None
    random: int | None = None
    seed: int = 0
    save: Path | None = None
    as_json: bool = False

    def condition(self) -> str:
        """For `sidecars.select`."""
        parts = [] if self.where is None else [f"({self.where})"]
        if self.entity is not None:
            tag, tags = quoted(self.entity), "list_transform(entities, lambda e: e.tag)"
            parts.append(f"tag = {tag}" if self.candidates else f"list_contains({tags}, {tag})")
        if self.where is None and self.random is not None:
            parts.append("outcome = 'kept'")
        return " AND ".join(parts) or "true"


def inspect(path: str, ask: Ask, console: Console) -> None:
    """Shows `path`: a dataset folder, one of its shards, or any WebDataset tar. Raises SddError."""
    if ask.candidates and (ask.sample is not None or ask.random is not None or ask.save is not None):
        raise QueryError("--candidates lists boxes; leave out --sample, --random and --save")
    match = _SHARD.fullmatch(path)
    if match is not None:
        store = Store(match["folder"] or ".", create=False)
        if store.exists(f"{match['name']}.json"):
            _inspect_folder(store, dataclasses.replace(ask, shard=int(match["index"])), console)
            return
    if path.endswith(TAR_ENDINGS):
        _inspect_tar(path, ask, console)
    else:
        _inspect_folder(Store(path, create=False), ask, console)


def _inspect_folder(store: Store, ask: Ask, console: Console) -> None:
    expect_shards(store, ask.shard)
    if ask.sample is not None:
        _show([read_sample(store, ask.sample, ask.shard)], ask, console)
    elif ask.random is not None:
        _show(list(random_samples(store, ask.random, ask.seed, ask.condition(), ask.shard)), ask, console)
    elif ask.where is not None or ask.entity is not None or ask.candidates:
        _list(store, ask, console)
    elif ask.save is not None:
        raise QueryError("--save draws samples: choose them with --sample, --random, --where or --entity")
    elif ask.as_json:
        print(json.dumps(count_manifests(store, ask.shard).to_json() | summarise(store, ask.shard).to_json()))
    else:
        console.print(count_manifests(store, ask.shard), "")
        console.print(summarise(store, ask.shard))


def random_samples(
    store: Store, count: int, seed: int, where: str = "outcome = 'kept'", shard: int | None = None
) -> Iterator[Sample]:
    """`count` samples of those that match, with their images, in the order of the input."""
    order = rank_in_sql(seed)
    shards = manifests(store, "shard", shard)
    ranked = select(store, f"{order} AS rank, shard, row", where, shards=shards, best=(order, count))
    chosen = sorted(heapq.nsmallest(count, ((r["rank"], r["shard"], r["row"]) for r in ranked)), key=lambda c: c[1:])
    yield from samples_at(store, ((shard, row) for _, shard, row in chosen))


def samples_at(store: Store, places: Iterable[tuple[int, int]]) -> Iterator[Sample]:
    """The samples at (shard, row), in this order, with their images."""
    for shard, group in itertools.groupby(places, key=lambda place: place[0]):
        yield from read_samples(store, read_manifest(store, "shard", shard), [row for _, row in group])


def _list(store: Store, ask: Ask, console: Console) -> None:
    """A line for every row that matches; `ask.save` gets the first ones drawn."""
    found = rows = 0

    def shards() -> Iterator[Manifest]:
        nonlocal rows
        for manifest in manifests(store, "shard", ask.shard):
            rows += manifest.rows
            yield manifest

    first: list[tuple[int, int]] = []
    line, columns = (candidate_line, CANDIDATE_COLUMNS) if ask.candidates else (image_line, IMAGE_COLUMNS)
    view: View = "candidates" if ask.candidates else "images"
    for row in select(store, "*" if ask.as_json else columns, ask.condition(), view=view, shards=shards()):
        found += 1
        if len(first) < SHEET_IMAGES:
            first.append((row["shard"], row["row"]))
        if ask.as_json:
            print(json.dumps(row))
        else:
            _say(console, line(row))
    if not ask.as_json:
        hint = "" if found or ask.candidates else "; boxes have reasons of their own, which --candidates looks at"
        _say(console, f"{found:,} {'candidate boxes' if ask.candidates else f'of {rows:,} rows'}{hint}")
    if ask.save is not None:
        _save([s for s in samples_at(store, first) if s.image is not None], ask.save, console)


def _inspect_tar(path: str, ask: Ask, console: Console) -> None:
    if ask.where is not None or ask.shard is not None or ask.candidates or ask.entity is not None:
        raise QueryError(f"{path}: a tar without a sidecar; only --sample, --random and --save can be asked of it")
    if ask.sample is not None:
        found = [find_in_tar(path, ask.sample)]
    elif ask.random is not None:
        found = random_of_tar(path, ask.random, ask.seed)
    else:
        summary = summarise_tar(path)
        if ask.as_json:
            print(json.dumps(summary.to_json()))
        else:
            console.print(summary)
        return
    _show([s.as_sample() for s in found], ask, console, [s.key for s in found])


def _show(samples: Sequence[Sample], ask: Ask, console: Console, keys: Sequence[str] = ()) -> None:
    """Facts and, where there is an image and a place for it, pictures. `keys`: where they are not the samples' own."""
    for key, sample in itertools.zip_longest(keys or [s.key for s in samples], samples):
        if ask.entity is not None:
            sample = _only(sample, ask.entity)
        if ask.as_json:
            print(json.dumps(to_table([sample]).to_pylist()[0] | {"key": key}))
            continue
        console.print(facts(key, sample))
        if ask.save is None and sample.image is not None and can_show_pictures():
            console.print(terminal_picture(draw_sample(sample)))
    if ask.save is not None:
        _save([_only(s, ask.entity) if ask.entity is not None else s for s in samples], ask.save, console)


def _only(sample: Sample, tag: str) -> Sample:
    candidates = tuple(c for c in sample.candidates if c.tag == tag)
    if not candidates:
        known = ", ".join(sorted({c.tag for c in sample.candidates})) or "none"
        raise QueryError(f"sample {sample.key} has no entity {tag}; it has: {known}")
    return sample.replace(candidates=candidates)


def _save(samples: Sequence[Sample], path: Path, console: Console) -> None:
    """One sample large, or several on a sheet."""
    if not samples:
        raise QueryError("nothing to draw: no image matches, or the folder no longer has it")
    picture = draw_sample(samples[0]) if len(samples) == 1 else contact_sheet(samples[:SHEET_IMAGES])
    with named_errors(str(path), QueryError):
        try:
            picture.save(path)
        except ValueError:
            raise QueryError(f"--save {path}: name a picture file, such as {path.stem}.png") from None
    _say(console, f"{path}: {len(samples[:SHEET_IMAGES])} drawn")


def _say(console: Console, text: str) -> None:
    console.print(clean_text(text), highlight=False, markup=False, soft_wrap=True)
