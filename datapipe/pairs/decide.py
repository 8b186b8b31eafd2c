"""Which candidates are pairs, by their scores alone: no feature is read, so that thresholds are changed in seconds."""

from __future__ import annotations

import string
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from datapipe.pairs.files import Entities
from datapipe.pairs.scores import Candidates, Floats
from datapipe.pairs.settings import DecideSettings
from datapipe.schema.pairs import PairRejection

Bools = NDArray[np.bool_]
_PAIRS_AT_ONCE = 1 << 18


REJECTIONS = (None, *PairRejection)
"""By number, as `Decision.rejected` holds them."""


def number_of(rejection: PairRejection) -> int:
    return REJECTIONS.index(rejection)


@dataclass(frozen=True)
class Scores:
    """What E candidates are judged by. patch_similarity, aligned: (E,) float32; copy_bits: (E,) int16; seconds: (E,)
    float32, between two frames of one clip, else NaN."""

    patch_similarity: Floats
    aligned: Floats
    copy_bits: NDArray[np.int16]
    seconds: Floats


@dataclass(frozen=True)
class Decision:
    """What becomes of E candidates. rejected: (E,) uint8 numbers of `REJECTIONS`, 0 for pairs; rival: (E,) float32, the
    similarity of either entity with the nearest that is another subject, NaN where none came near; margin: (E,)
    float32, by which share the pair's distance is smaller than the rival's, see `relative_margin`."""

    rejected: NDArray[np.uint8]
    rival: Floats
    margin: Floats


def decide(
    pairs: Candidates, scores: Scores, entities: Entities, excluded: Bools, settings: DecideSettings
) -> Decision:
    """excluded: (N,) bool, the entities whose images are to be kept out."""
    a, b = pairs.a, pairs.b
    image = image_numbers(entities)
    same_picture = image[a] == image[b]
    copy = (scores.copy_bits < settings.min_copy_bits) | (scores.aligned > settings.max_aligned)
    unlike = (pairs.similarity < settings.min_similarity) | (scores.patch_similarity < settings.min_patch_similarity)
    one_way = (pairs.rank_a == 0) | (pairs.rank_b == 0)
    noun = noun_numbers(entities)
    other_noun = (noun[a] != noun[b]) & settings.same_noun
    # Two subjects of one picture are two; a copy of a subject is the subject.
    rival = rivals(pairs, pairs.similarity, ~same_picture & (copy | ~(unlike | one_way | other_noun)))
    margin = relative_margin(pairs.similarity, rival)
    ambiguous = margin < settings.min_margin
    rejected = np.select(
        [
            same_picture,
            excluded[a] | excluded[b],
            copy,
            scores.seconds < settings.min_seconds,
            unlike,
            one_way,
            other_noun,
            ambiguous,
        ],
        [number_of(r) for r in list(PairRejection)[:8]],
        0,
    ).astype(np.uint8)
    return Decision(rejected, rival, margin)


def relative_margin(similarity: Floats, rival: Floats) -> Floats:
    """(E,) 1 − (1 − s) / (1 − r): Lowe's ratio test (2004), of cosine distances. How far apart two individuals are
    differs from noun to noun, so that no difference of cosines fits all."""
    margin: Floats = (1 - (1 - similarity) / np.maximum(1 - rival, np.float32(1e-6))).astype(np.float32)
    return margin


def image_numbers(entities: Entities) -> NDArray[np.int64]:
    """(N,) numbers of the entities' images, ascending."""
    return np.cumsum(np.diff(entities.row, prepend=-1) != 0)


def noun_numbers(entities: Entities) -> NDArray[np.int64]:
    """(N,) numbers of the last words of the entities' tags, whatever their case and punctuation."""
    tags = pa.array(entities.tag, pa.string()).dictionary_encode()
    nouns = ["".join(tag.casefold().rstrip(string.punctuation).split()[-1:]) for tag in tags.dictionary.to_pylist()]
    _, noun = np.unique(np.array(nouns, object), return_inverse=True)
    numbers: NDArray[np.int64] = noun[tags.indices.to_numpy()]
    return numbers


def rivals(pairs: Candidates, score: Floats, alike: Bools) -> Floats:
    """(E,) for each pair (a, b) the best score of a or b with an entity that is not alike to both; NaN without any.

    Who is alike to both may be a third picture of the same subject. alike: (E,) bool.
    """
    count = int(max(pairs.a.max(initial=0), pairs.b.max(initial=0))) + 1
    ends = np.concatenate([pairs.a, pairs.b]), np.concatenate([pairs.b, pairs.a])
    order = np.argsort(ends[0], kind="stable")
    of, other = ends[0][order], ends[1][order]
    edge_score, edge_alike = np.tile(score, 2)[order], np.tile(alike, 2)[order]
    first = np.searchsorted(of, np.arange(count + 1))
    known = np.sort((of * count + other)[edge_alike])

    best = np.full(len(pairs), -np.inf, np.float32)
    for start in range(0, len(pairs), _PAIRS_AT_ONCE):
        rows = np.arange(start, min(start + _PAIRS_AT_ONCE, len(pairs)))
        for mine, yours in ((pairs.a[rows], pairs.b[rows]), (pairs.b[rows], pairs.a[rows])):
            many = first[mine + 1] - first[mine]
            pair = np.repeat(np.arange(len(rows)), many)
            edge = np.arange(many.sum()) - np.repeat(np.cumsum(many) - many, many) + first[mine][pair]
            third = other[edge]
            both = edge_alike[edge] & _holds(known, third * count + yours[pair])
            rival = ~both & (third != yours[pair])
            np.maximum.at(best, rows[pair[rival]], edge_score[edge[rival]])
    return np.where(np.isfinite(best), best, np.nan).astype(np.float32)


def _holds(ordered: NDArray[np.int64], sought: NDArray[np.int64]) -> Bools:
    """Whether each number is among the ordered ones."""
    if not len(ordered):
        return np.zeros(len(sought), bool)
    found: Bools = ordered[np.searchsorted(ordered, sought).clip(max=len(ordered) - 1)] == sought
    return found
