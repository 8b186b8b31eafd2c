"""What `sdd inspect` shows: tables of the whole, or single samples in words and pictures."""

from __future__ import annotations

import dataclasses
import difflib
import heapq
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from datapipe.inspect.draw import contact_sheet, draw_sample
from datapipe.inspect.random_choice import rank_in_sql
from datapipe.inspect.sidecars import View, quoted, select
from datapipe.inspect.summary import count_manifests, require_shards, summarize
from datapipe.inspect.tar_samples import find_in_tar, random_of_tar, summarize_tar
from datapipe.inspect.terminal import (
    CANDIDATE_COLUMNS,
    IMAGE_COLUMNS,
    can_show_pictures,
    candidate_line,
    image_line,
    print_picture,
    sample_details,
)
from datapipe.schema import Sample, printable, to_table
from datapipe.shards import Manifest, Store, manifests, read_manifest, read_sample, read_samples
from datapipe.shards.manifest import manifest_name
from datapipe.sources.compression import COMPRESSED_SUFFIXES
from subject_diffusion.errors import QueryError
from subject_diffusion.storage import named_errors

SHEET_IMAGES = 64
"""The most on a contact sheet; more would be too large to look at."""

TAR_ENDINGS = (".tar", *(f".tar{suffix}" for suffix in COMPRESSED_SUFFIXES), ".tgz")
_SHARD = re.compile(r"(?P<folder>.*/)?shard-(?P<index>\d{6,})\.(tar|parquet|manifest\.json)")


@dataclass(frozen=True)
class Query:
    """What of a dataset or tar to show; default: the whole. `save`: where the picture goes; `as_json`: one JSON object
    per line, for scripts."""

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
        """The condition for `sidecars.select`."""
        parts = [] if self.where is None else [f"({self.where})"]
        if self.entity is not None:
            tag, tags = quoted(self.entity), "list_transform(entities, lambda e: e.tag)"
            parts.append(f"tag = {tag}" if self.candidates else f"list_contains({tags}, {tag})")
        if self.where is None and self.random is not None:
            parts.append("outcome = 'kept'")
        return " AND ".join(parts) or "true"


def inspect(path: str, query: Query, console: Console) -> None:
    """Shows `path`: a dataset folder, one of its shards, or any WebDataset tar. Raises SddError."""
    if query.candidates and (query.sample is not None or query.random is not None or query.save is not None):
        raise QueryError("--candidates lists boxes; leave out --sample, --random and --save")
    match = _SHARD.fullmatch(path)
    if match is not None:
        store = Store(match["folder"] or ".", create=False)
        if store.exists(manifest_name("shard", int(match["index"]))):
            _inspect_folder(store, dataclasses.replace(query, shard=int(match["index"])), console)
            return
    if path.endswith(TAR_ENDINGS):
        _inspect_tar(path, query, console)
    else:
        _inspect_folder(Store(path, create=False), query, console)


def _inspect_folder(store: Store, query: Query, console: Console) -> None:
    require_shards(store, query.shard)
    if query.sample is not None:
        _show_samples([read_sample(store, query.sample, query.shard)], query, console, store.root)
    elif query.random is not None:
        chosen = list(random_samples(store, query.random, query.seed, query.condition(), query.shard))
        if not chosen:
            _refuse_unknown_tag(store, query)
        _show_samples(chosen, query, console, store.root)
    elif query.where is not None or query.entity is not None or query.candidates:
        _list_rows(store, query, console)
    elif query.save is not None:
        raise QueryError("--save draws samples: choose them with --sample, --random, --where or --entity")
    elif query.as_json:
        print(json.dumps(count_manifests(store, query.shard).to_json() | summarize(store, query.shard).to_json()))
    else:
        console.print(count_manifests(store, query.shard), "")
        console.print(summarize(store, query.shard))


def _refuse_unknown_tag(store: Store, query: Query) -> None:
    """For a query that found nothing: raises QueryError where nothing in the dataset is called as asked."""
    if query.entity is None or query.as_json:
        return
    of = "true" if query.candidates else "reason IS NULL"
    shards = manifests(store, "shard", query.shard)
    known = {row["tag"] for row in select(store, "tag", of, view="candidates", shards=shards)}
    if query.entity not in known:
        near = difflib.get_close_matches(query.entity, known, n=1, cutoff=0)
        nearest = f"; the nearest is {near[0]}" if near else ""
        raise QueryError(f"--entity {query.entity}: no such tag here{nearest}")


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


def _list_rows(store: Store, query: Query, console: Console) -> None:
    """A line for every row that matches; `query.save` gets the first ones drawn."""
    found = rows = 0

    def shards() -> Iterator[Manifest]:
        nonlocal rows
        for manifest in manifests(store, "shard", query.shard):
            rows += manifest.rows
            yield manifest

    first: list[tuple[int, int]] = []
    line, columns = (candidate_line, CANDIDATE_COLUMNS) if query.candidates else (image_line, IMAGE_COLUMNS)
    view: View = "candidates" if query.candidates else "images"
    everything = "*" if query.candidates else "* EXCLUDE (thumbnail)"
    for row in select(store, everything if query.as_json else columns, query.condition(), view=view, shards=shards()):
        found += 1
        if len(first) < SHEET_IMAGES:
            first.append((row["shard"], row["row"]))
        if query.as_json:
            print(json.dumps(row))
        else:
            _print_line(console, line(row))
    if not found:
        _refuse_unknown_tag(store, query)
    if not query.as_json:
        hint = "" if found or query.candidates else "; boxes have reasons of their own, which --candidates looks at"
        _print_line(console, f"{found:,} {'candidate boxes' if query.candidates else f'of {rows:,} rows'}{hint}")
    if query.save is not None:
        drawn = [s for s in samples_at(store, first) if s.picture is not None]
        _save_picture(drawn, query, query.save, console, store.root, f"the first of {found:,} rows that match")


def _inspect_tar(path: str, query: Query, console: Console) -> None:
    if query.where is not None or query.shard is not None or query.candidates or query.entity is not None:
        raise QueryError(f"{path}: a tar without a sidecar; only --sample, --random and --save can be asked of it")
    if query.sample is not None:
        found = [find_in_tar(path, query.sample)]
    elif query.random is not None:
        found = random_of_tar(path, query.random, query.seed)
    else:
        summary = summarize_tar(path)
        if query.as_json:
            print(json.dumps(summary.to_json()))
        else:
            console.print(summary)
        return
    _show_samples([s.as_sample() for s in found], query, console, path, [s.key for s in found])


def _show_samples(
    samples: Sequence[Sample], query: Query, console: Console, root: str, keys: Sequence[str] = ()
) -> None:
    """Details and, where there is an image and a place for it, pictures. `root`: where they are from; `keys`: if they
    are not the samples' own."""
    for key, sample in itertools.zip_longest(keys or [s.key for s in samples], samples):
        if query.entity is not None:
            sample = _with_tag_only(sample, query.entity)
        if query.as_json:
            print(json.dumps(to_table([sample]).drop_columns("thumbnail").to_pylist()[0] | {"key": key}))
            continue
        console.print(sample_details(key, sample))
        if query.save is None and sample.picture is not None and can_show_pictures():
            print_picture(console, sample)
    if query.save is not None:
        drawn = [_with_tag_only(s, query.entity) if query.entity is not None else s for s in samples]
        _save_picture(drawn, query, query.save, console, root, f"at random, seed {query.seed}")


def _with_tag_only(sample: Sample, tag: str) -> Sample:
    candidates = tuple(c for c in sample.candidates if c.tag == tag)
    if not candidates:
        known = ", ".join(sorted({c.tag for c in sample.candidates})) or "none"
        raise QueryError(f"sample {sample.key} has no entity {tag}; it has: {known}")
    return sample.replace(candidates=candidates)


def _save_picture(
    samples: Sequence[Sample], query: Query, path: Path, console: Console, root: str, chosen: str
) -> None:
    """One sample large, or several on a sheet, with the words for where they are from and how they were chosen."""
    if not samples:
        raise QueryError("nothing to draw: no image matches, or the folder no longer has it")
    samples = samples[:SHEET_IMAGES]
    if len(samples) == 1:
        picture = draw_sample(samples[0])
    else:
        asked = [query.where] if query.where is not None else []
        asked += [f"with {query.entity}"] if query.entity is not None else []
        counts = f"{len(samples)} images, {sum(len(s.entities) for s in samples)} entities; {chosen}"
        picture = contact_sheet(samples, root.rstrip("/").rpartition("/")[2], "; ".join([counts, *asked]))
    with named_errors(str(path), QueryError):
        try:
            picture.save(path)
        except ValueError:
            raise QueryError(f"--save {path}: name a picture file, such as {path.stem}.png") from None
    _print_line(console, f"{path}: {len(samples)} drawn")


def _print_line(console: Console, text: str) -> None:
    console.print(printable(text), highlight=False, markup=False, soft_wrap=True)
