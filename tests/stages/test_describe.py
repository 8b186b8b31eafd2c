"""Each entity of a kept image is described from its cutout; where the recipe names no captioner for it, none is."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from datapipe.backends.image_to_text import ImageToText
from datapipe.ledger import Ledger
from datapipe.recipe import Recipe, load_recipe
from datapipe.schema import RLE, Entity, Outcome, Reason, Rejection, Sample, Slice, StageName
from datapipe.stages import ANNOTATE_STAGES
from datapipe.stages.caption import CaptionSettings
from datapipe.stages.describe import DescribeSettings, cutout
from datapipe.workers import run_stages
from subject_diffusion.labeling import Labeler
from tests.backends.chat_server import ChatServer, completion, send
from tests.backends.test_openai_server import is_red, shown
from tests.documents import marked
from tests.toy import TOY_RECIPE
from toyworld.render import render_scene

BLIP = "toyworld/weights/blip"


def two_squares(row: int = 0) -> Sample:
    """A red square, a blue one and a candidate that is no entity, on gray."""
    image = np.full((60, 80, 3), 128, np.uint8)
    image[10:30, 10:30], image[10:30, 50:70] = (200, 30, 30), (30, 30, 200)
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, "JPEG", quality=95)
    inside = np.zeros((60, 80), np.uint8)
    inside[10:30, 10:30] = 1
    red = Entity("red", (0, 3), (5.0, 5.0, 35.0, 35.0), 0.9, 0.9, RLE.of(inside))
    none = dataclasses.replace(red, rejected=Rejection.AREA)
    blue = Entity("blue", (8, 12), (52.0, 12.0, 68.0, 28.0), 0.8, 0.8)
    return Sample(row, image=sink.getvalue(), width=80, height=60, caption="red and blue").replace(
        candidates=(red, none, blue)
    )


def through(sample: Sample, settings: DescribeSettings) -> Sample:
    work = run_stages([settings.build()], Slice(0, (sample,)), Ledger(), deadline_s=60)
    return work.samples[0]


def test_a_cutout_is_white_outside_of_the_mask_and_never_empty():
    red, _, blue = two_squares().candidates
    image = np.full((60, 80, 3), 7, np.uint8)
    found = cutout(image, red)
    assert found.shape == (30, 30, 3)
    assert (found[5:25, 5:25] == 7).all()
    assert (found == 255).sum() == 3 * (30 * 30 - 20 * 20)
    assert (cutout(image, blue) == 7).all()
    at_the_edge = dataclasses.replace(blue, box=(80.0, 60.0, 80.0, 60.0))
    assert cutout(image, at_the_edge).shape == (1, 1, 3)


def test_a_server_is_shown_each_entity_of_what_is_kept_alone():
    def answer(handler: Any, question: dict[str, Any]) -> None:
        send(handler, 200, completion("a blue square" if not is_red_inside(question) else "a red\nsquare"))

    def is_red_inside(question: dict[str, Any]) -> bool:
        return is_red(question) or np.asarray(shown(question))[10:20, 10:20, 2].mean() < 128

    with ChatServer(answer).served() as server:
        settings = DescribeSettings(backend="openai", model="tiny-vl", server=server.url, min_pixels=1)
        settings.check()
        kept = through(two_squares().kept(), settings)
        assert [c.desc for c in kept.candidates] == ["a red square", None, "a blue square"]
        assert kept.is_kept and len(server.asked) == 2
        assert "object" in server.asked[0]["messages"][0]["content"][1]["text"]
        corner = np.asarray(shown(next(q for q in server.asked if is_red_inside(q))))[1, 1]
        assert corner.min() > 240, "what is around the subject is not seen"
        for other in (two_squares(), two_squares().dropped(StageName.SELECT, Reason.TOO_FEW_ENTITIES)):
            assert through(other, settings) == other
        assert len(server.asked) == 2

        server.answer = lambda handler, _: send(handler, 400, {"error": "no"})
        lost = through(two_squares().kept(), settings).verdict
        assert lost and (lost.outcome, lost.stage, lost.reason) == (
            Outcome.FAILED,
            StageName.DESCRIBE,
            Reason.NO_ANSWER,
        )
        server.models = ["other"]
        with pytest.raises(Exception, match=r"^describe\.model tiny-vl: .* does not serve it, but other"):
            settings.check()


def test_toy_subjects_are_described_by_what_they_are_and_the_model_is_loaded_once():
    scenes = [render_scene(1000 + seed, size=(128, 144), split="heldout") for seed in range(8)]
    labeler = Labeler(load_recipe(TOY_RECIPE, [f"describe={{model: {BLIP}, num_beams: 3}}"]))
    samples = labeler([Image.fromarray(scene.image) for scene in scenes])
    described = [e for s in samples if s.is_kept for e in s.entities]
    assert len(described) > 4 and all(e.desc for e in described)
    assert sum(e.tag in (e.desc or "") for e in described) > 0.5 * len(described)
    assert not any(e.desc for s in samples for e in s.candidates if e.rejected)
    caption, describe = CaptionSettings(model=BLIP).build()._caption, DescribeSettings(model=BLIP).build()._describe
    assert isinstance(caption, ImageToText) and isinstance(describe, ImageToText)
    assert caption._model is describe._model


def test_the_documented_recipes_are_recipes() -> None:
    described, listed = (Recipe.model_validate(yaml.safe_load(marked(name).code)) for name in ("describe", "objects"))
    assert list(described.stages())[-1] is StageName.DESCRIBE
    assert listed.caption.objects


def test_the_stage_comes_last_in_the_actors_that_select_and_can_be_left_out():
    plain, recipe = load_recipe(TOY_RECIPE), Recipe.model_validate({"describe": {"model": BLIP}})
    assert StageName.DESCRIBE not in plain.stages()
    assert not [key for key in plain.identity() if key.startswith("describe")]
    assert recipe.with_optional(ANNOTATE_STAGES) == (*ANNOTATE_STAGES, StageName.DESCRIBE)
    assert str(recipe.stages()[StageName.DESCRIBE].model_used()).startswith(f"{BLIP}@")
    with pytest.raises(ValueError, match=r"describe\.server_deadline_s 900 must be less than run\.deadline_s 600"):
        Recipe.model_validate(
            {"describe": {"backend": "openai", "server": "http://localhost:1/v1", "server_deadline_s": 900}}
        )
    assert Counter(recipe.with_optional(ANNOTATE_STAGES[:2]))[StageName.DESCRIBE] == 0
