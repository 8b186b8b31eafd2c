"""A dataset grows: by the new rows of its input, by another input, or by failed rows that are done again."""

from __future__ import annotations

import bisect
import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from datapipe.plan import Part, first_rows, parts_of, slices_of
from datapipe.schema import Outcome, Reason, StageName
from datapipe.shards import Kind, Store, iter_tables, manifest_name, present
from datapipe.sources import InputRows, rows_as_input
from datapipe.sources.row_index import ImagePlace, InputRow, RowFacts
from subject_diffusion.errors import RecipeError, RunError

RETRIED = (Reason.HTTP_STATUS, Reason.UNREACHABLE, Reason.TIMEOUT, Reason.NO_ANSWER)
"""Why a download, or a question to a server, may fail that could go well later; which one could, its verdict says."""

ALIKE_ROWS = 100
"""First rows by which an input that has grown is known again."""

Grown = tuple[tuple[Part, ...], dict[str, InputRows]]
"""The parts of a dataset, and the inputs at hand, by their fingerprints."""


def reasons_to_retry(words: str) -> tuple[Reason, ...]:
    """`transient`, for all of `RETRIED`, or some of them with commas between. Raises RecipeError."""
    names = [reason.value for reason in RETRIED] if words == "transient" else words.split(",")
    unknown = [name for name in names if name not in [reason.value for reason in RETRIED]]
    if unknown:
        known = ", ".join(reason.value for reason in RETRIED)
        raise RecipeError(f"--retry {words}: {unknown[0]!r} is none of {known}; transient is all of them")
    return tuple(Reason(name) for name in dict.fromkeys(names))


def with_input(source: InputRows, store: Store, slice_rows: int, append: bool) -> Grown:
    """What a folder will hold once this input is in it. `append`: whether its rows may be added to others. Raises
    RunError."""
    held = parts_of(store)
    known = [part.input for part in held]
    if source.fingerprint not in known and (not held or not append):
        part = Part(source.rows, source.fingerprint)
        return (part,), {part.input: source}
    sources = {source.fingerprint: source, **_retries(store, held)}
    if source.fingerprint not in known:
        earlier = _earlier_states(source, store, held, slice_rows)
        skip = sum(part.rows for part in earlier)
        if skip < source.rows:
            held = (*held, Part(source.rows - skip, source.fingerprint, skip))
    elif _missing(held, store, slice_rows):
        earlier = _earlier_states(source, store, held[: known.index(source.fingerprint)], slice_rows)
    else:
        earlier = []
    # The input's earlier states are gone, but today's has their rows, should some of them still have to be made.
    return held, {part.input: source for part in earlier} | sources


def with_retry(reasons: Sequence[Reason], store: Store, slice_rows: int) -> Grown:
    """What a folder will hold once the rows that failed for these reasons, and could go well now, are done again. A
    retry that was stopped goes on before another one begins. Raises RunError."""
    held = parts_of(store)
    sources = _retries(store, held)
    missing = _missing(held, store, slice_rows)
    if missing and not held[-1].retried:
        raise RunError(f"{store.root}: not a whole dataset yet; run without --retry first")
    counts = Counter() if missing else Counter(why for why, _ in _failed(store, held, reasons))
    if not counts:
        return held, sources
    again = dict(sorted(counts.items()))
    source = _retry(store, held, list(again))
    return (*held, Part(source.rows, source.fingerprint, retried=again)), {**sources, source.fingerprint: source}


def _missing(held: Sequence[Part], store: Store, slice_rows: int) -> int:
    """How many shards of the dataset are still to be made."""
    return slices_of(held, slice_rows) - len(present(store, "shard"))


def _earlier_states(source: InputRows, store: Store, held: Sequence[Part], slice_rows: int) -> list[Part]:
    """The parts that are the first rows of this input, in order. Raises RunError where it begins like them and then
    differs."""
    skip, found = 0, []
    for part, first, first_slice in zip(held, first_rows(held), _first_slices(held, slice_rows), strict=True):
        if part.retried or part.skip != skip:
            continue
        shards = range(first_slice, first_slice + slices_of([part], slice_rows))
        unlike = _first_unlike(source, part, first, _facts_of_rows(store, shards))
        if unlike is None:
            skip += part.rows
            found.append(part)
        elif unlike >= min(ALIKE_ROWS, part.rows):
            raise RunError(
                f"input {source.settings.path}: row {skip + unlike} is not what it was; new rows go to the end, or "
                "into an input of their own"
            )
    return found


def _first_unlike(
    source: InputRows, part: Part, first: int, rows: Iterator[tuple[list[int], list[RowFacts]]]
) -> int | None:
    """How far a part goes before it differs from the input's rows from `part.skip` on; None: it does not."""
    for numbers, facts in rows:
        start = numbers[0] - first
        stop = min(start + len(numbers), max(source.rows - part.skip, start))
        now = source.facts(part.skip + start, part.skip + stop)
        for offset, (before, after) in enumerate(zip(facts, now, strict=False)):
            if (before.url, before.alt_text, before.clip) != (after.url, after.alt_text, after.clip):
                return start + offset
        if len(now) < len(facts):
            return start + len(now)
    return None


def _facts_of_rows(store: Store, shards: range) -> Iterator[tuple[list[int], list[RowFacts]]]:
    """Row numbers of the dataset and what the input said about them, shard by shard."""
    raw = set(present(store, "raw"))  # where raw shards were deleted, the final ones say the same
    for index in shards:
        kind: Kind = "raw" if index in raw else "shard"
        for table in iter_tables(store, kind, ["row", "url", "alt_text", "clip"], index):
            rows = table.to_pylist()  # a sidecar of an earlier release has no clips
            yield [r["row"] for r in rows], [RowFacts(r["url"], r["alt_text"], clip=r.get("clip")) for r in rows]


def rows_done_again(store: Store, parts: Sequence[Part]) -> Iterator[int]:
    """The rows that a later one of these parts does again."""
    starts = first_rows(parts)
    if any(part.retried for part in parts):
        for table in iter_tables(store, "shard", ["row", *_FATE]):
            for row in table.filter(_may_pass(table)).to_pylist():
                if _is_done_again(row, parts, starts):
                    yield row["row"]


def _failed(store: Store, parts: Sequence[Part], reasons: Sequence[Reason]) -> Iterator[tuple[str, InputRow]]:
    """("stage/reason", row) of each row of these parts to do again: what failed for one of these reasons in the last
    attempt at it, and could go well now. An image that had come along is taken from its raw shard. Raises RunError
    where that is gone."""
    starts = first_rows(parts)
    end = sum(part.rows for part in parts)
    columns = ["row", "url", "alt_text", "licence", "scores", "clip", "time_s", "http_status", *_FATE]
    wanted = pa.array([reason.value for reason in reasons])
    for index in present(store, "shard"):
        for table in iter_tables(store, "shard", columns, index):
            chosen = pc.and_(_may_pass(table), pc.is_in(table["reason"], wanted))
            rows = table.filter(pc.and_(chosen, pc.less(table["row"], end))).to_pylist()
            again = [row for row in rows if not _is_done_again(row, parts, starts)]
            came_along = {r["row"] for r in again if r["stage"] != StageName.FETCH.value and r["http_status"] is None}
            places = _places_in_raw(store, index, came_along)
            for row in again:
                scores = tuple((name, value) for name, value in (row["scores"] or {}).items() if value is not None)
                clip, time_s = row.get("clip"), row.get("time_s")  # of an earlier release's sidecar neither
                facts = RowFacts(row["url"], row["alt_text"], row["licence"], scores, clip, time_s)
                yield f"{row['stage']}/{row['reason']}", InputRow(facts, places.get(row["row"]))


_FATE = ["outcome", "stage", "reason", "retryable"]


def _may_pass(table: pa.Table) -> pa.Array:
    return pc.and_(pc.equal(table["outcome"], Outcome.FAILED.value), table["retryable"])


def _is_done_again(row: Mapping[str, Any], parts: Sequence[Part], starts: Sequence[int]) -> bool:
    later = parts[bisect.bisect_right(starts, row["row"]) :]
    return any(f"{row['stage']}/{row['reason']}" in part.retried for part in later)


def _places_in_raw(store: Store, index: int, rows: Collection[int]) -> dict[int, ImagePlace]:
    """Where the images of these rows lie, below the dataset's folder. Raises RunError."""
    if not rows:
        return {}
    if not store.exists(manifest_name("raw", index)):
        raise RunError(
            f"{store.root}: row {min(rows)} got no answer, and its image went with the raw shards; "
            "make the dataset again"
        )
    columns, tar = ["row", "image_offset", "image_size"], f"{manifest_name('raw', index).partition('.')[0]}.tar"
    return {
        row["row"]: ImagePlace(tar.encode(), row["image_offset"], row["image_size"])
        for table in iter_tables(store, "raw", columns, index)
        for row in table.to_pylist()
        if row["row"] in rows
    }


def _retries(store: Store, held: Sequence[Part]) -> dict[str, InputRows]:
    """The inputs of the parts that do rows again, by their fingerprints."""
    parts = [(number, part) for number, part in enumerate(held) if part.retried]
    return {part.input: _retry(store, held[:number], list(part.retried)) for number, part in parts}


def _retry(store: Store, before: Sequence[Part], failures: Sequence[str]) -> InputRows:
    """An input of the rows of these parts that failed so ("stage/reason"). It lies in the folder, and is written again
    from the sidecars where it was removed."""
    claim = json.dumps([[asdict(part) for part in before], list(failures)])
    name = f"retry-{hashlib.sha256(claim.encode()).hexdigest()[:24]}"
    reasons = [Reason(reason) for reason in dict.fromkeys(failure.partition("/")[2] for failure in failures)]
    rows = rows_as_input(
        store.url, name, lambda: (row for why, row in _failed(store, before, reasons) if why in failures)
    )
    return replace(rows, root=store.url)


def _first_slices(parts: Sequence[Part], slice_rows: int) -> list[int]:
    return [slices_of(parts[:number], slice_rows) for number in range(len(parts))]
