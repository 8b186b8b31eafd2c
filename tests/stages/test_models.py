"""The model stages on toy scenes: what they say is checked against what was drawn."""

from __future__ import annotations

import re
import threading
from typing import Any

import cv2
import numpy as np
import pytest
from transformers import AutoTokenizer

from datapipe.backends.grounding_dino import MAX_TOKENS, make_prompt
from datapipe.backends.loading import model_identity
from datapipe.ledger import Ledger
from datapipe.recipe import build_stage, load_recipe
from datapipe.schema import Entity, Outcome, Reason, Sample, Slice, StageName, Tag, from_table, to_table
from datapipe.stages.caption import CaptionSettings, CaptionStage
from datapipe.stages.ground import GroundStage
from datapipe.workers import run_stages
from tests.toy import PROJECT, TOY_RECIPE
from toyworld.render import PLURALS, Scene, render_scene

SCENES = [render_scene(1000 + seed, size=(128, 144), split="heldout") for seed in range(24)]
RECIPE = load_recipe(TOY_RECIPE)


def sample_of(row: int, scene: Scene) -> Sample:
    """The scene as the stages before grounding would leave it, if they made no mistake."""
    _, data = cv2.imencode(".jpg", scene.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
    height, width = scene.image.shape[:2]
    tags = tuple(dict.fromkeys(Tag(s.tag, s.span) for s in scene.subjects))
    return Sample(row=row, image=bytes(data), width=width, height=height, caption=scene.caption, tags=tags)


SAMPLES = [sample_of(i, scene) for i, scene in enumerate(SCENES)]


def test_captions_name_the_subjects():
    singular = {plural: noun for noun, plural in PLURALS.items()} | {noun: noun for noun in PLURALS}
    captioned = build_stage(StageName.CAPTION, RECIPE)(SAMPLES)
    named = [{singular[w] for w in re.findall(r"\w+", s.caption) if w in singular} for s in captioned]
    drawn = [{s.tag for s in scene.subjects} for scene in SCENES]
    assert sum(len(n & d) for n, d in zip(named, drawn, strict=True)) >= 0.85 * sum(map(len, drawn))
    assert {s.caption_model for s in captioned} == {model_identity(RECIPE.caption)}


def test_alt_text_can_serve_as_the_caption():
    stage = CaptionStage(CaptionSettings(backend="alt_text"))
    described, bare = stage([Sample(row=0, alt_text=" a  mug\n"), Sample(row=1)])
    assert (described.caption, described.caption_model) == ("a mug", "alt text")
    assert bare.verdict and bare.verdict.reason is Reason.NO_CAPTION


def test_boxes_are_found_where_the_subjects_are():
    grounded = build_stage(StageName.GROUND, RECIPE)(SAMPLES)
    hits = total = 0
    for sample, scene in zip(grounded, SCENES, strict=True):
        for subject in scene.subjects:
            total += 1
            hits += any(
                c.tag == subject.tag and c.span == subject.span and c.score > 0.3 and overlap(c.box, subject.box) > 0.5
                for c in sample.candidates
            )
        for candidate in sample.candidates:
            x1, y1, x2, y2 = candidate.box
            assert 0 <= x1 <= x2 <= sample.width
            assert 0 <= y1 <= y2 <= sample.height
    assert hits >= 0.85 * total


def test_masks_are_the_subjects():
    prompted = [
        s.replace(candidates=tuple(Entity(p.tag, p.span, p.box, 1.0, 1.0) for p in scene.subjects))
        for s, scene in zip(SAMPLES, SCENES, strict=True)
    ]
    segmented = build_stage(StageName.SEGMENT, RECIPE)(prompted)
    ious = []
    for sample, scene in zip(segmented, SCENES, strict=True):
        for candidate, subject in zip(sample.candidates, scene.subjects, strict=True):
            assert candidate.mask is not None
            assert candidate.mask.size == scene.image.shape[:2]
            decoded = candidate.mask.array()
            ious.append((decoded & subject.mask).sum() / (decoded | subject.mask).sum())
            assert candidate.stability is not None
            assert 0 <= candidate.stability <= 1
    assert np.mean(ious) > 0.85


@pytest.mark.parametrize("name", [StageName.CAPTION, StageName.GROUND, StageName.SEGMENT])
def test_a_sample_gets_the_same_result_alone_as_in_a_batch(name):
    stage = build_stage(name, RECIPE)
    batch = [s.replace(candidates=(Entity("mug", (0, 1), (20.0, 20.0, 90.0, 90.0), 1.0, 1.0),)) for s in SAMPLES[:4]]
    for together, alone in zip(stage(batch), (stage([s])[0] for s in batch), strict=True):
        assert together.caption == alone.caption
        assert len(together.candidates) == len(alone.candidates)
        for a, b in zip(together.candidates, alone.candidates, strict=True):
            np.testing.assert_allclose(a.box, b.box, atol=0.05)
            assert a.score == pytest.approx(b.score, abs=2e-4)


NETWORKS = {
    StageName.CAPTION: lambda stage: stage._caption._model.vision_model,
    StageName.GROUND: lambda stage: stage._detect.model,
    StageName.SEGMENT: lambda stage: stage._segment.model.vision_encoder,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_batches_that_overlap_say_what_they_say_one_by_one_and_take_turns_at_the_network(name):
    stage: Any = build_stage(name, load_recipe(TOY_RECIPE, [f"{name.value}.micro_batch=3"]))
    taken = threading.Lock()
    collisions: list[int] = []

    def enter(*_: Any) -> None:
        if not taken.acquire(blocking=False):
            collisions.append(1)

    network = NETWORKS[name](stage)
    network.register_forward_pre_hook(enter)
    network.register_forward_hook(lambda *_: taken.release())
    work = Slice(0, tuple(s.replace(candidates=tuple(CANDIDATES)) for s in SAMPLES))
    one_by_one = run_stages([stage], work, Ledger(), 60)
    assert run_stages([stage], work, Ledger(), 60, at_once=4) == one_by_one
    assert not collisions
    assert not any(s.verdict and s.verdict.outcome is Outcome.FAILED for s in one_by_one.samples)


CANDIDATES = [Entity("mug", (0, 1), box, 1.0, 1.0) for box in ((20.0, 20.0, 90.0, 90.0), (5.0, 40.0, 60.0, 120.0))]


def test_an_image_in_which_nothing_is_found_is_dropped_before_it_costs_a_mask():
    blank = SAMPLES[0].replace(image=sample_of(0, SCENES[0]).image)
    stage = build_stage(StageName.GROUND, load_recipe(TOY_RECIPE, ["ground.floor=1.0"]))
    (done,) = stage([blank])
    assert done.verdict and done.verdict.reason is Reason.TOO_FEW_BOXES


def test_a_phrase_knows_its_own_tokens():
    tokenizer = AutoTokenizer.from_pretrained(PROJECT / "toyworld/weights/grounding-dino")
    prompt = make_prompt(["mug", "teapot", "xylophone"], tokenizer)
    assert prompt.text == "mug . teapot . xylophone ."
    ids = tokenizer(prompt.text)["input_ids"]
    words = [tokenizer.convert_ids_to_tokens([ids[i] for i in tokens]) for tokens in prompt.tokens]
    assert words[:2] == [["mug"], ["teapot"]]
    assert len(words[2]) > 1
    assert len({i for tokens in prompt.tokens for i in tokens}) == sum(map(len, prompt.tokens))


@pytest.mark.parametrize("separator", ["period", "comma"])
def test_phrases_beyond_the_longest_prompt_are_left_out_and_nothing_breaks(separator):
    tokenizer = AutoTokenizer.from_pretrained(PROJECT / "toyworld/weights/grounding-dino")
    prompt = make_prompt(["mug"] * 200, tokenizer, separator)
    assert len(prompt.tokens) == 200
    assert prompt.tokens[-1] == ()
    assert prompt.left_out == tuple(i for i, tokens in enumerate(prompt.tokens) if not tokens)
    assert MAX_TOKENS - 2 <= len(tokenizer(prompt.text)["input_ids"]) <= MAX_TOKENS


def test_a_phrase_that_does_not_fit_takes_none_along_that_does():
    tokenizer = AutoTokenizer.from_pretrained(PROJECT / "toyworld/weights/grounding-dino")
    prompt = make_prompt(["mug", "z " * 300, "fish"], tokenizer)
    assert prompt.text == "mug . fish ."
    assert [len(tokens) for tokens in prompt.tokens] == [1, 0, 1]
    assert prompt.left_out == (1,)


def test_the_released_codes_prompt_joins_nouns_by_commas_and_repeats_what_the_caption_repeats():
    tokenizer = AutoTokenizer.from_pretrained(PROJECT / "toyworld/weights/grounding-dino")
    prompt = make_prompt(["mug", "fish", "mug"], tokenizer, "comma")
    assert prompt.text == "mug,fish,mug."
    ids = tokenizer(prompt.text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens([ids[i] for (i,) in prompt.tokens]) == ["mug", "fish", "mug"]
    tags = (Tag("mug", (0, 3)), Tag("fish", (4, 8)), Tag("mug", (9, 12)))
    period = GroundStage(RECIPE.ground)
    comma = GroundStage(RECIPE.ground.model_copy(update={"separator": "comma"}))
    sample = Sample(row=0, tags=tags)
    assert (period._nouns(sample), comma._nouns(sample)) == (["mug", "fish"], ["mug", "fish", "mug"])


def test_tags_for_which_the_prompt_has_no_room_are_recorded():
    subject, odd = SCENES[0].subjects[0], "z " * 300
    tags = (Tag(odd, (0, 1)), Tag(subject.tag, subject.span))
    (done,) = build_stage(StageName.GROUND, RECIPE)([SAMPLES[0].replace(tags=tags)])
    assert {c.tag for c in done.candidates} == {subject.tag}
    assert [t.left_out for t in done.tags] == [True, False]
    assert from_table(to_table([done]))[0].tags == done.tags


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)
