"""A run on Stable Diffusion XL: it learns, goes on from a checkpoint, and leaves a pipeline that draws."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from model import Subject
from model.base import load_base
from tests.model.bases import assert_same
from tests.train.datasets import sample
from tests.train.training import learned, training_recipe, write_training_recipe
from train.trainer.checkpoint import checkpoints
from train.trainer.data import through_epochs
from train.trainer.encode import encode
from train.trainer.launch import train
from train.trainer.loop import Trainer
from train.trainer.optimization import part_of
from train.trainer.pipeline import open_pipeline
from train.trainer.recipe import LrFactors, TrainRecipe


@pytest.fixture(scope="module")
def recipe(sdxl: Path, clip: Path, dataset: Path) -> TrainRecipe:
    model = {"attention_downsampling": [2, 4]}
    return training_recipe(sdxl, clip, dataset, model=model, optimizer={"steps": 2}, run={"checkpoint_every": 1})


@pytest.fixture(scope="module")
def run(recipe: TrainRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("xl") / "run"
    assert train(recipe, out)
    return out


def test_a_resumed_run_learns_bit_for_bit_what_one_that_never_stopped_does(recipe, run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("tensorboard", "pipeline", "step-00000002"))
    assert len(checkpoints(out / "checkpoints")) == 1
    assert train(recipe, out)
    expected, found = learned(run), learned(out)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_every_part_of_both_text_encoders_is_learned_and_saved(run, sdxl):
    net, base = open_pipeline(run).subject_net, load_base(sdxl)
    for found, was in ((net.text_encoder, base.text_encoder), (net.text_encoder_2, base.text_encoder_2)):
        changed = {name for name, w in was.named_parameters() if not torch.equal(w, found.get_parameter(name))}
        assert any("self_attn" in name for name in changed) and any("embedding" in name for name in changed)
    assert {part_of(name) for name, _ in net.named_parameters()} == set(LrFactors.model_fields)


def test_run_and_checkpoint_draw_alike_and_from_the_shell(run, sdd, tmp_path):
    cutout = Image.new("RGBA", (32, 32))
    cutout.paste("red", (8, 8, 24, 28))
    mug = Subject(cutout, "mug")
    drawn = []
    for path in (run, run / "checkpoints/step-00000002"):
        pipe = open_pipeline(path)
        pipe.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(0)
        drawn.append(pipe("a mug", mug, num_inference_steps=2, generator=noise, output_type="pt").images)
    assert_same(*drawn)
    cutout.save(tmp_path / "mug.png")
    words = ("--run", run, "--subject", f"mug={tmp_path / 'mug.png'}", "--images", "1", "--out", tmp_path / "drawn")
    code, _, error = sdd("sample", "a mug", *words)
    assert code == 0, error
    assert Image.open(tmp_path / "drawn" / "seed-0.png").size == (64, 64)


def test_true_sizes_and_crops_go_with_the_images(recipe, tmp_path):
    trainer = Trainer(recipe, tmp_path / "run", torch.device("cpu"))
    batch = next(through_epochs(trainer.loader))
    found = encode(trainer.model, batch, torch.device("cpu"), 0).time_ids.tolist()
    sizes = {(s.height, s.width) for s in (sample(row) for row in range(30))}
    for height, width, top, left, *square in found:
        assert (height, width) in sizes and square == [64, 64]
        assert top == 0 and 0 <= left <= round(width * 64 / height) - 64, "the pictures are wider than high"


def test_a_lora_reaches_both_text_encoders_but_not_what_is_never_read(recipe, tmp_path):
    optimizer = recipe.optimizer.model_copy(update={"text_encoder_rank": 2})
    trainer = Trainer(recipe.model_copy(update={"optimizer": optimizer}), tmp_path / "run", torch.device("cpu"))
    of_text = [name for name in trainer.named if part_of(name) == "text_encoder"]
    assert len(of_text) == (1 + 3) * 4 * 2 and all(".lora_" in name for name in of_text)


def test_a_refiner_is_refused_in_one_line(sdd, sdxl, clip, dataset, tmp_path):
    refiner = Path(shutil.copytree(sdxl, tmp_path / "refiner", ignore=shutil.ignore_patterns("*.safetensors")))
    index = json.loads((refiner / "model_index.json").read_text()) | {"text_encoder": [None, None]}
    (refiner / "model_index.json").write_text(json.dumps(index))
    recipe = write_training_recipe(tmp_path / "r.yaml", refiner, clip, dataset)
    code, _, error = sdd("train", "--recipe", recipe, "--out", tmp_path / "run")
    assert code == 2
    assert error.startswith(f"sdd: base {refiner}: a Stable Diffusion XL, not its refiner, is needed"), error
    assert error.count("\n") == 1
