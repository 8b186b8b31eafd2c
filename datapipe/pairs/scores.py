"""Candidates, and all that is measured of each: what needs features is measured once, and kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from datapipe.pairs.embed import SubjectPatches
from datapipe.pairs.files import Entities

if TYPE_CHECKING:
    from datapipe.pairs.search import Neighbors

Floats = NDArray[np.float32]
_UNRANKED = np.iinfo(np.int16).max


@dataclass(frozen=True)
class Candidates:
    """E pairs of entities, a < b, each once. a, b: (E,) int64 numbers of entities; rank_a: (E,) int16, which of a's
    neighbors b is, from 1, and 0 where it is none; rank_b: the other way round; similarity: (E,) float32, the cosine of
    the embeddings."""

    a: NDArray[np.int64]
    b: NDArray[np.int64]
    rank_a: NDArray[np.int16]
    rank_b: NDArray[np.int16]
    similarity: Floats

    def __len__(self) -> int:
        return len(self.a)

    def part(self, rows: slice) -> Candidates:
        return Candidates(*(getattr(self, f.name)[rows] for f in fields(self)))


def candidates(found: Neighbors, entities: int) -> Candidates:
    """Every two entities of which either is a neighbor of the other, in order. Of an edge that comes twice the better
    rank counts."""
    low, high = np.minimum(found.of, found.neighbor), np.maximum(found.of, found.neighbor)
    pairs, first, number = np.unique(low * entities + high, return_index=True, return_inverse=True)
    of_a = found.of < found.neighbor
    rank_a, rank_b = np.zeros((2, len(pairs)), np.int16)
    for ranks, rows in ((rank_a, of_a), (rank_b, ~of_a)):
        rank = np.full(len(pairs), _UNRANKED, np.int16)
        np.minimum.at(rank, number[rows], found.rank[rows])
        ranks[:] = np.where(rank == _UNRANKED, 0, rank)
    return Candidates(pairs // entities, pairs % entities, rank_a, rank_b, found.similarity[first])


def patch_similarity(one: SubjectPatches, other: SubjectPatches) -> Floats:
    """(E,) ½ · (m(a, b) + m(b, a)), where m(a, b) = 1/|a| · Σ_{i ∈ a} max_{j ∈ b} cos(a_i, b_j): for each patch of one
    subject the most alike of the other (MaSC, arXiv 2605.22469, both ways and inside both masks)."""
    cosines = one.features @ other.features.transpose(0, 2, 1)
    both = one.shown[:, :, None] & other.shown[:, None, :]
    cosines = np.where(both, cosines, -1)
    forth = (cosines.max(axis=2) * one.shown).sum(axis=1) / one.shown.sum(axis=1)
    back = (cosines.max(axis=1) * other.shown).sum(axis=1) / other.shown.sum(axis=1)
    mean: Floats = ((forth + back) / 2).astype(np.float32)
    return mean


def aligned(one: SubjectPatches, other: SubjectPatches) -> Floats:
    """(E,) mean cosine of the cells that both cover, times the share of those that either covers: 1 for the same
    cut-out, whatever the images around it."""
    both, either = one.shown & other.shown, one.shown | other.shown
    cosines = (one.features * other.features).sum(axis=2)
    mean: Floats = ((cosines * both).sum(axis=1) / either.sum(axis=1)).astype(np.float32)
    return mean


def copy_bits(entities: Entities, pairs: Candidates) -> NDArray[np.int16]:
    """(E,) bits in which the perceptual hashes of the two images differ."""
    bits: NDArray[np.int16] = np.bitwise_count(entities.phash[pairs.a] ^ entities.phash[pairs.b]).astype(np.int16)
    return bits


def seconds_apart(entities: Entities, a: NDArray[np.int64], b: NDArray[np.int64]) -> Floats:
    """Between the two frames, where they are of one clip and their times are known; else NaN. a, b: (E,)."""
    one_clip = (entities.clip[a] == entities.clip[b]) & (entities.clip[a] != "")
    apart: Floats = np.where(one_clip, np.abs(entities.time_s[a] - entities.time_s[b]), np.nan).astype(np.float32)
    return apart


def scores_name(part: int) -> str:
    """The table of the scores of a part of the candidates."""
    return f"scores-{part:04d}.parquet"


def scores_table(parts: Sequence[tuple[Floats, Floats]]) -> pa.Table:
    """parts: patch similarities and aligned similarities."""
    similarity, same_place = (np.concatenate(column) for column in zip(*parts, strict=True))
    return pa.table({"patch_similarity": similarity, "aligned": same_place})
