"""One picture in, labels out: the same as a run's, without Ray; what cannot be labeled is said in one line."""

from __future__ import annotations

import importlib
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import subject_diffusion
from datapipe.schema import Outcome, Reason, Sample, StageName
from datapipe.shards import kept_samples
from subject_diffusion import Labeler, label, open_dataset, read_samples
from subject_diffusion.errors import RecipeError, RunError, ShardError, SourceError
from subject_diffusion.loading_bars import no_loading_bars
from tests.toy import MADE_SELECT, PROJECT, Made
from toyworld.render.web import render_web_image

OVERRIDES = [f"select.{key}={value}" for key, value in MADE_SELECT.items()]


@pytest.fixture(scope="module")
def labeler() -> Labeler:
    return Labeler("toy")


@pytest.fixture(scope="module")
def jpeg() -> bytes:
    data = render_web_image(0, 300, seed=1).jpeg
    assert data is not None
    return data


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_a_picture_gets_the_entities_that_were_drawn(labeler, jpeg):
    scene = render_web_image(0, 300, seed=1).scene
    assert scene is not None
    (sample,) = labeler([Image.open(io.BytesIO(jpeg))])
    drawn = {subject.tag: subject for subject in scene.subjects}
    assert {e.tag for e in sample.entities} == set(drawn) == {"mushroom", "bird"}
    for entity in sample.entities:
        mask = entity.mask.array()
        assert mask.shape == (sample.height, sample.width) and mask.dtype == bool
        assert sample.caption[slice(*entity.span)] == entity.tag
        assert iou(mask, drawn[entity.tag].mask) > 0.7
    assert sample.verdict.outcome is Outcome.KEPT


def test_labels_are_those_of_a_run(made: Made):
    def told(sample: Sample) -> tuple[object, ...]:
        return sample.caption, sample.sha256, [(e.tag, e.span, e.mask) for e in sample.entities]

    def measured(samples: list[Sample]) -> list[float]:
        return [number for s in samples for e in s.entities for number in (*e.box, e.score)]

    expected = list(kept_samples(made.store))[:12]
    found = Labeler("toy", OVERRIDES)([s.image or b"" for s in expected])
    assert [told(s) for s in found] == [told(s) for s in expected]
    # Other batches than the run's round otherwise.
    assert measured(found) == pytest.approx(measured(expected), abs=0.02)


def test_paths_bytes_and_pillow_images_of_any_mode_are_taken(labeler, jpeg, tmp_path: Path):
    (tmp_path / "photo.jpg").write_bytes(jpeg)
    opened = Image.open(tmp_path / "photo.jpg")
    given = [tmp_path / "photo.jpg", str(tmp_path / "photo.jpg"), jpeg, opened, *map(opened.convert, ("RGBA", "CMYK"))]
    samples = labeler(given)
    assert [s.row for s in samples] == list(range(6))
    assert [s.image == jpeg for s in samples] == [True] * 3 + [False] * 3, "files stay as they are"
    assert all({e.tag for e in s.entities} == {"mushroom", "bird"} for s in samples)
    assert samples[0].url == str(tmp_path / "photo.jpg") and samples[2].url == ""


def test_a_photo_is_labeled_upright(labeler, jpeg, tmp_path: Path):
    turned = Image.Exif()
    turned[0x0112] = 6  # seen upright when turned by 90 degrees clockwise
    Image.open(io.BytesIO(jpeg)).rotate(90, expand=True).save(tmp_path / "turned.png", exif=turned)
    with Image.open(tmp_path / "turned.png") as picture:
        as_image, as_path = labeler([picture, tmp_path / "turned.png"])
    assert (as_image.width, as_image.height) == (as_path.width, as_path.height) == Image.open(io.BytesIO(jpeg)).size


def test_what_the_recipe_would_drop_says_so(labeler):
    (nothing,) = labeler([Image.new("RGB", (160, 120), "gray")])
    assert nothing.entities == () and nothing.verdict.outcome is Outcome.DROPPED
    strict = label(Image.new("RGB", (160, 120), "gray"), overrides=["tag.min_tags=9", "tag.max_tags=9"])
    assert strict.verdict is not None
    assert (strict.verdict.stage, strict.verdict.reason) == (StageName.TAG, Reason.TOO_FEW_TAGS)


def test_one_call_keeps_its_models_for_the_next(jpeg, monkeypatch):
    label(jpeg)
    monkeypatch.setattr("subject_diffusion.labeling.Labeler.__init__", None)
    assert label(jpeg).caption


@pytest.mark.parametrize("image", [b"no picture", b"", "nowhere.jpg", None])
def test_a_picture_that_cannot_be_read_is_one_line(image):
    with pytest.raises(SourceError) as refused:
        label(image)
    assert "\n" not in str(refused.value)


def test_a_broken_picture_leaves_its_neighbors_alone(labeler, jpeg):
    before, broken, after = labeler([jpeg, jpeg[:2000], jpeg])
    assert (broken.verdict.stage, broken.verdict.reason) == (StageName.SCREEN, Reason.UNDECODABLE)
    assert before.entities and before.entities == after.entities


def test_a_recipe_that_cannot_be_read_is_one_line():
    with pytest.raises(RecipeError, match="no-such"):
        Labeler("no-such")
    with pytest.raises(RecipeError, match="min_score"):
        Labeler("toy", ["select.min_scores=1"])


@pytest.mark.parametrize("downloads_draw", [True, False])
def test_models_load_without_a_word_and_the_bars_of_others_stay_as_they_are(capfd, downloads_draw, monkeypatch):
    from transformers.utils import logging

    from model.base import load_base

    hub: Any = importlib.import_module("huggingface_hub.utils")
    monkeypatch.setattr(logging, "_tqdm_active", True)
    (hub.enable_progress_bars if downloads_draw else hub.disable_progress_bars)()
    try:
        Labeler("toy")
        load_base(PROJECT / "toyworld/weights/stable-diffusion")
        assert capfd.readouterr() == ("", "")
        assert logging.is_progress_bar_enabled()
        assert hub.are_progress_bars_disabled() is not downloads_draw
        with no_loading_bars():
            assert hub.are_progress_bars_disabled() is not downloads_draw
    finally:
        hub.enable_progress_bars()


def test_labeling_does_without_ray_and_settings_without_models():
    code = (
        "import sys, subject_diffusion, subject_diffusion.settings, subject_diffusion.errors;"
        "assert not {'torch', 'ray', 'transformers', 'pyarrow', 'datapipe'} & set(sys.modules);"
        "from subject_diffusion import label, open_dataset; assert not {'ray', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_exported_name_is_there_and_others_are_not():
    for name in subject_diffusion.__all__:
        assert getattr(subject_diffusion, name).__name__ == name
        assert name in dir(subject_diffusion)
    with pytest.raises(AttributeError, match="labell"):
        _ = subject_diffusion.labell


def test_a_dataset_opens_as_a_table_of_every_row(made: Made, copied: Path):
    rows = open_dataset(made.folder)
    assert rows.count_rows() == sum(1 for _ in rows.to_table(columns=["row"])["row"]) == 120
    for manifest in copied.glob("shard-000001*.json"):
        manifest.unlink()  # without it there is no shard
    assert open_dataset(copied).count_rows() == 80


def test_a_dataset_in_a_bucket_opens_too(made: Made, bucket: str):
    import fsspec

    system = fsspec.filesystem("s3")
    system.put(str(made.folder), f"{bucket}/opened", recursive=True)
    assert open_dataset(f"{bucket}/opened").count_rows() == 120


def test_samples_come_with_their_images(made: Made):
    samples = list(read_samples(made.folder))
    assert [s.key for s in samples] == sorted(s.key for s in samples)
    for sample in samples:
        assert sample.image is not None
        assert Image.open(io.BytesIO(sample.image)).size == (sample.width, sample.height)


def test_a_folder_without_shards_is_refused(tmp_path: Path):
    with pytest.raises(ShardError, match="no committed shard"):
        open_dataset(tmp_path)
    with pytest.raises(RunError, match="no such folder"):
        open_dataset(tmp_path / "nowhere")
