"""Candidates become pairs, and pairs identities, by their scores alone."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from datapipe.pairs.clusters import find_identities
from datapipe.pairs.decide import REJECTIONS, Decision, Scores, decide, rivals
from datapipe.pairs.files import Entities
from datapipe.pairs.scores import Candidates, seconds_apart
from datapipe.pairs.settings import DecideSettings
from datapipe.schema.pairs import PairRejection

SETTINGS = DecideSettings(min_similarity=0.8, min_patch_similarity=0.8, min_margin=0.6, min_copy_bits=8, max_images=3)


def entities(
    images: list[int],
    hashes: list[int] | None = None,
    times_s: list[float] | None = None,
    tags: list[str] | None = None,
) -> Entities:
    """One in each of these images, whose hashes differ in some 32 bits where none are given, and which are frames of a
    clip where times are."""
    count = len(images)
    if hashes is None:
        hashes = [int.from_bytes(np.random.default_rng(i).bytes(8), "big") for i in images]
    number = [images[:i].count(image) for i, image in enumerate(images)]
    return Entities(
        np.zeros(count, np.int32),
        np.array(images, np.int64),
        np.array(number, np.int32),
        np.array(hashes, np.uint64),
        np.array(tags or ["mug"] * count, object),
        np.array(["" if times_s is None else "film.mp4"] * count, object),
        np.array(times_s or [np.nan] * count),
    )


def measured(*rows: tuple[int, int, float], one_way: tuple[int, ...] = (), of: Entities) -> tuple[Candidates, Scores]:
    """rows: (a, b, both similarities); one_way: those that are not mutual."""
    a, b = (np.array([row[i] for row in rows], np.int64) for i in (0, 1))
    score = np.array([row[2] for row in rows], np.float32)
    rank = np.ones(len(rows), np.int16)
    back = np.array([0 if i in one_way else 1 for i in range(len(rows))], np.int16)
    bits = np.bitwise_count(of.phash[a] ^ of.phash[b]).astype(np.int16)
    return Candidates(a, b, rank, back, score), Scores(score, np.zeros_like(score), bits, seconds_apart(of, a, b))


def reasons(pairs: Candidates, scores: Scores, of: Entities, excluded: tuple[int, ...] = ()) -> list[str]:
    """What becomes of each candidate in the end."""
    kept_out = np.isin(np.arange(len(of)), excluded)
    decision = decide(pairs, scores, of, kept_out, SETTINGS)
    identities = find_identities(pairs, scores, decision, of, SETTINGS)
    return [r.value if (r := REJECTIONS[number]) else "pair" for number in identities.rejected]


def test_two_alike_and_nobody_near_are_a_pair():
    of = entities([0, 1])
    assert reasons(*measured((0, 1, 0.9), of=of), of) == ["pair"]


def test_each_threshold_has_its_reason():
    of = entities(
        [0, 0, 1, 2, 3, 4, 5, 6, 7], hashes=[0, 0, 2**40 - 1, 2**40 - 2, 2**64 - 1, 255 << 50, 0xABC, 7**20, 11**15]
    )
    rows = [(0, 1, 0.9), (2, 3, 0.95), (0, 4, 0.7), (2, 5, 0.9), (5, 8, 0.95), (6, 7, 0.9)]
    pairs, scores = measured(*rows, one_way=(3,), of=of)
    assert reasons(pairs, scores, of, excluded=(8,)) == [
        "same_picture", "near_copy", "unlike", "not_mutual", "excluded", "pair",
    ]  # fmt: skip


def test_what_goes_by_another_noun_is_another_subject():
    of = entities([0, 1, 2], tags=["red Mug", "mug", "cat"])
    rows = measured((0, 1, 0.95), (0, 2, 0.98), of=of)
    assert reasons(*rows, of) == ["ambiguous", "other_noun"], "and a rival"
    few = measured((0, 1, 0.98), (0, 2, 0.9), of=of)
    assert reasons(*few, of) == ["pair", "other_noun"]


def test_a_look_alike_that_is_nearly_as_near_makes_it_ambiguous():
    of = entities([0, 1, 2])
    assert reasons(*measured((0, 1, 0.95), (0, 2, 0.9), of=of), of) == ["ambiguous", "ambiguous"]
    assert reasons(*measured((0, 1, 0.95), (0, 2, 0.79), of=of), of) == ["pair", "unlike"]


def test_a_third_picture_of_the_subject_is_no_look_alike():
    of = entities([0, 1, 2])
    assert reasons(*measured((0, 1, 0.95), (0, 2, 0.93), (1, 2, 0.9), of=of), of) == ["pair"] * 3


def test_two_in_one_picture_are_two_subjects():
    of = entities([0, 1, 1])
    assert reasons(*measured((0, 1, 0.95), (0, 2, 0.93), (1, 2, 0.95), of=of), of) == [
        "ambiguous", "ambiguous", "same_picture",
    ]  # fmt: skip


def test_a_chain_does_not_bring_two_entities_of_one_picture_together():
    of = entities([0, 0, 1, 2])
    pairs, scores = measured((0, 2, 0.95), (1, 3, 0.93), (2, 3, 0.94), of=of)
    nothing = np.full(3, np.nan, np.float32)
    found = find_identities(pairs, scores, Decision(np.zeros(3, np.uint8), nothing, nothing), of, SETTINGS)
    assert [REJECTIONS[n] for n in found.rejected] == [None, PairRejection.AMBIGUOUS, None]
    assert found.of == {0: 0, 2: 0, 3: 0}


def test_an_identity_comes_as_often_as_it_may_and_once_of_each_copy():
    of = entities([0, 1, 2, 3, 4])
    clique = [(a, b, 0.99 - 0.01 * b) for a in range(5) for b in range(a + 1, 5)]
    pairs, scores = measured(*clique, of=of)
    assert reasons(pairs, scores, of).count("pair") == 3, "among three images"
    assert reasons(pairs, scores, of).count("over_bound") == 7
    copied = entities([0, 1, 2], hashes=[0, 2**40 - 1, 1])
    assert sorted(reasons(*measured((0, 1, 0.95), (0, 2, 0.99), (1, 2, 0.9), of=copied), copied)) == [
        "near_copy", "pair", "repeated",
    ]  # fmt: skip


def test_frames_of_a_clip_are_pairs_when_time_has_passed():
    of = entities([0, 1, 2], times_s=[0.0, 0.5, 4.0])
    rows = measured((0, 1, 0.99), (0, 2, 0.95), (1, 2, 0.94), of=of)
    assert reasons(*rows, of) == ["near_in_time", "pair", "repeated"]


@hypothesis.given(st.data())
def test_rivals_are_those_of_a_slow_search(data):
    count = data.draw(st.integers(2, 7))
    every = [(a, b) for a in range(count) for b in range(a + 1, count)]
    chosen = data.draw(st.lists(st.sampled_from(every), min_size=1, unique=True).map(sorted))
    score = [data.draw(st.integers(0, 8)) / 8 for _ in chosen]
    alike = [data.draw(st.booleans()) for _ in chosen]
    a, b = (np.array([pair[i] for pair in chosen], np.int64) for i in (0, 1))
    ones = np.ones(len(chosen), np.int16)
    floats = np.array(score, np.float32)
    found = rivals(Candidates(a, b, ones, ones, floats), floats, np.array(alike))

    known = {frozenset(pair): (s, like) for pair, s, like in zip(chosen, score, alike, strict=True)}
    for pair, value in zip(chosen, found, strict=True):
        slow = []
        for mine, yours in (pair, pair[::-1]):
            for third in set(range(count)) - {mine, yours}:
                to_mine, to_yours = known.get(frozenset({mine, third})), known.get(frozenset({yours, third}))
                if to_mine is not None and not (to_mine[1] and to_yours is not None and to_yours[1]):
                    slow.append(to_mine[0])
        assert value == pytest.approx(max(slow)) if slow else np.isnan(value)
