"""Classifiers drop images only where the recipe names them, and say with which probability."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, pipeline

from datapipe.plan import read_run
from datapipe.recipe import Recipe, load_recipe
from datapipe.schema import Outcome, Reason, Sample, StageName, from_table
from datapipe.shards import Store, iter_tables
from datapipe.stages import ANNOTATE_STAGES, FETCH_STAGES
from datapipe.stages.classify import NsfwSettings, WatermarkSettings
from subject_diffusion.errors import BackendError
from tests.documents import marked
from tests.toy import TOY_RECIPE, run, write_images, write_recipe

LABELS = ("drawing", "nsfw", "photo")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in hub format, of the architecture of Falconsai/nsfw_image_detection."""
    return saved(tmp_path_factory.mktemp("models") / "vit")


def saved(folder: Path, problem_type: str | None = None) -> Path:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
        initializer_range=1.0, id2label=dict(enumerate(LABELS)), label2id={name: i for i, name in enumerate(LABELS)},
        problem_type=problem_type,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 12)
    return folder


def samples(images: Path) -> list[Sample]:
    """Those that screening lets through."""
    rows = [Sample(row=i, image=path.read_bytes()) for i, path in enumerate(sorted(images.glob("*.jpg")))]
    return [s for s in load_recipe(TOY_RECIPE).screen.build()(rows) if s.verdict is None]


@pytest.mark.parametrize("problem_type", [None, "multi_label_classification"])
@pytest.mark.parametrize("labels", [("nsfw",), ("nsfw", "drawing")])
def test_probabilities_are_those_of_transformers(
    tmp_path: Path, images: Path, problem_type: str | None, labels: tuple[str, ...]
) -> None:
    folder = saved(tmp_path, problem_type)
    classify = pipeline("image-classification", model=str(folder), top_k=None)
    told: list[list[dict[str, Any]]] = [
        classify(Image.open(io.BytesIO(s.image or b"")).convert("RGB")) for s in samples(images)
    ]
    add = max if problem_type else sum
    wanted = [add(each["score"] for each in answer if each["label"] in labels) for answer in told]
    settings = NsfwSettings(model=str(folder), labels=labels, threshold=float(np.median(wanted)), device="cpu")
    done = settings.build()(samples(images))
    assert [dict(s.scores)["nsfw"] for s in done] == pytest.approx(wanted, abs=1e-5)
    assert 0 < sum(s.verdict is not None for s in done) < len(done)
    for sample in done:
        assert (sample.verdict is not None) == (dict(sample.scores)["nsfw"] >= settings.threshold)
        assert sample.verdict is None or sample.verdict.reason is Reason.NSFW


def test_a_label_that_the_model_does_not_have_is_refused_with_those_that_it_has(classifier: Path) -> None:
    with pytest.raises(BackendError) as refused:
        WatermarkSettings(model=str(classifier)).build()
    assert "watermark.labels: watermark is none of" in str(refused.value)
    assert ", ".join(LABELS) in str(refused.value)


def test_a_model_of_another_kind_is_refused() -> None:
    with pytest.raises(BackendError, match=r"nsfw\.model .*a blip model, where one for ImageClassification is wanted"):
        NsfwSettings(model="toyworld/weights/blip").build()


def test_they_run_before_the_captions_in_the_actors_that_caption(classifier: Path) -> None:
    plain = load_recipe(TOY_RECIPE)
    assert not {StageName.NSFW, StageName.WATERMARK} & set(plain.stages())
    assert not [key for key in plain.identity() if key.startswith(("nsfw", "watermark"))]
    blocks = {"nsfw": {"model": str(classifier)}, "watermark": {"model": str(classifier), "labels": ["photo"]}}
    recipe = Recipe.model_validate(blocks)
    assert recipe.with_optional(FETCH_STAGES) == FETCH_STAGES
    assert recipe.with_optional(ANNOTATE_STAGES) == (StageName.NSFW, StageName.WATERMARK, *ANNOTATE_STAGES)
    assert recipe.with_optional((StageName.GROUND, StageName.SEGMENT)) == (StageName.GROUND, StageName.SEGMENT)


def test_the_documented_recipe_is_one() -> None:
    recipe = Recipe.model_validate(yaml.safe_load(marked("classifiers").code))
    assert [name.value for name in recipe.stages()][2:4] == ["nsfw", "watermark"]


def test_a_run_records_scores_verdicts_and_models(classifier: Path, images: Path, tmp_path: Path) -> None:
    scores = [dict(s.scores)["nsfw"] for s in NsfwSettings(model=str(classifier)).build()(samples(images))]
    nsfw: dict[str, Any] = {"model": str(classifier), "threshold": float(np.median(scores))}
    recipe = write_recipe(tmp_path / "recipe.yaml", nsfw=nsfw)
    done = run(recipe, images, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    store = Store(str(tmp_path / "out"))
    seen = [s for table in iter_tables(store) for s in from_table(table) if "nsfw" in dict(s.scores)]
    refused = [s for s in seen if s.verdict and s.verdict.reason is Reason.NSFW]
    assert refused == [s for s in seen if dict(s.scores)["nsfw"] >= nsfw["threshold"]]
    assert 0 < len(refused) < len(seen)
    for sample in refused:
        assert sample.verdict and (sample.verdict.outcome, sample.verdict.stage) == (Outcome.DROPPED, StageName.NSFW)
        assert not sample.caption
    assert read_run(store).identity["nsfw.threshold"] == nsfw["threshold"]
    assert read_run(store).models["nsfw"].startswith(f"{classifier}@")
    assert "nsfw" in json.loads((tmp_path / "out" / "throughput.jsonl").read_text().splitlines()[-1])["stages"]
