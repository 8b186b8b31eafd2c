"""The shared loop, the vocabulary and the grounding model of `toyworld.pretrain`, in a few tiny steps."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BertTokenizerFast, GroundingDinoForObjectDetection, GroundingDinoProcessor

from tests.toy import PROJECT
from tests.toyworld import together
from toyworld.pretrain import grounding, grounding_batch
from toyworld.pretrain.command import as_typed
from toyworld.pretrain.detection_loss import match, overlap, quality_focal, token_worth
from toyworld.pretrain.loop import LoopSettings, fast_precision, learning_rate, seconds_spent, train
from toyworld.pretrain.scenes import SceneSet, load_scenes
from toyworld.pretrain.vocabulary import build_tokenizer
from toyworld.render import NOUNS, VOCABULARY, render_scene


@pytest.fixture(scope="module")
def tokenizer() -> BertTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> SceneSet:
    return load_scenes(12, cache=tmp_path_factory.mktemp("scenes"), processes=1)


def _noisy_loss(model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = (model(batch + 0.1 * torch.randn_like(batch)) - batch.sum(1, keepdim=True)).square().mean()
    return loss, {"twice": 2 * loss}


def _numbers(step: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(step).standard_normal((8, 4), dtype=np.float32))


def _train_linear(folder: Path, steps: int, stop_after: int | None = None) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))

    def batch_at(step: int) -> Tensor:
        if step == stop_after:
            raise KeyboardInterrupt
        return _numbers(step)

    settings = LoopSettings(steps, lr=1e-2, warmup=5, checkpoint_s=0.0, log_every=10)
    average = train(model, batch_at, _noisy_loss, settings, folder)
    return [*model.parameters(), *average.parameters()]


def test_a_training_that_was_interrupted_ends_at_the_very_same_weights(tmp_path: Path) -> None:
    whole = _train_linear(tmp_path / "whole", 30)
    with pytest.raises(KeyboardInterrupt):
        _train_linear(tmp_path / "parts", 30, stop_after=17)
    parts = _train_linear(tmp_path / "parts", 30)
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))
    assert seconds_spent(tmp_path / "parts") > 0


def test_a_training_that_is_done_is_not_done_again(tmp_path: Path) -> None:
    first = _train_linear(tmp_path, 10)
    again = _train_linear(tmp_path, 10, stop_after=0)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_two_processes_learn_what_one_learns_from_their_batches_together(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    together.main(one, images=8)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, "-m", together.__name__, str(two), "4"], cwd=PROJECT, check=True, timeout=120)
    first, second = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (one, two))
    assert first["step"] == second["step"] == together.STEPS
    for part in ("model", "average"):
        for name, weight in first[part].items():
            torch.testing.assert_close(second[part][name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("native", [True, False])
def test_products_are_in_bfloat16_only_where_the_cpu_has_it(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native})
    with fast_precision():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if native else torch.float32)


def test_the_learning_rate_rises_then_falls() -> None:
    settings = LoopSettings(steps=100, lr=1.0, warmup=10)
    rates = [learning_rate(step, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.02, abs=0.01)


def test_a_loss_that_is_not_a_number_stops_the_training(tmp_path: Path) -> None:
    def broken(model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return model(batch).sum() * float("nan"), {}

    with pytest.raises(FloatingPointError, match="step 0"):
        train(nn.Linear(4, 1), _numbers, broken, LoopSettings(2, lr=1e-3), tmp_path)


def test_the_cache_holds_what_the_renderer_draws(scenes: SceneSet) -> None:
    for seed in (0, 11):
        scene = render_scene(seed, size=128, split="train")
        count = len(scene.subjects)
        assert np.array_equal(scenes.images[seed], scene.image)
        assert scenes.captions[seed] == scene.caption
        assert scenes.counts[seed] == count
        assert [NOUNS[noun] for noun in scenes.nouns[seed, :count]] == [subject.tag for subject in scene.subjects]
        assert np.allclose(scenes.boxes[seed, :count], [subject.box for subject in scene.subjects])
        assert np.isnan(scenes.boxes[seed, count:]).all()
        masks = scenes.masks(np.array([seed]))[0]
        assert np.array_equal(masks[:count], np.stack([subject.mask for subject in scene.subjects]))


def test_every_word_of_the_toy_world_is_one_token(tokenizer: BertTokenizerFast) -> None:
    assert all(len(tokenizer.tokenize(word)) == 1 for word in (*VOCABULARY, *NOUNS))
    assert tokenizer.unk_token not in tokenizer.tokenize("Zebra-7 by J. Doe (c) 1999?")


def test_the_ids_that_grounding_dino_looks_for_are_berts(tokenizer: BertTokenizerFast) -> None:
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", "?"]) == [
        0,
        100,
        101,
        102,
        1012,
        1029,
    ]
    assert tokenizer("mug . fish .")["input_ids"][0::2] == [101, 1012, 1012]


def test_views_keep_their_subjects_whole_and_in_place(scenes: SceneSet) -> None:
    rng = np.random.default_rng(0)
    windows = grounding_batch.draw_windows(scenes.boxes[:], 128, np.tile([128, 150], (12, 1)), rng)
    boxes = grounding_batch.boxes_in_windows(scenes.boxes[:], windows)
    used = scenes.nouns[:] >= 0
    assert (boxes[used][:, :2] - boxes[used][:, 2:] / 2 >= 0).all()
    assert (boxes[used][:, :2] + boxes[used][:, 2:] / 2 <= 1 + 1e-6).all()
    ramp = torch.arange(128.0).expand(12, 1, 128, 128) + 0.5  # each pixel holds its own x
    sizes = torch.tensor([128.0, 150.0]).expand(12, 2)
    grid = grounding_batch.window_grid(torch.from_numpy(windows), 128, (128, 160), sizes)
    view = torch.nn.functional.grid_sample(ramp, grid, align_corners=False)
    for row in range(12):
        for (cx, cy, width, _), shown in zip(boxes[row], used[row], strict=True):
            if shown:
                x = view[row, 0, int(cy * 128), int(cx * 150)]
                truth = scenes.boxes[row][
                    np.abs((scenes.boxes[row][:, 0] + scenes.boxes[row][:, 2]) / 2 - x.item()) < 2
                ]
                assert len(truth) > 0
                assert width > 0
    assert (view[..., 150:] == 0).all()


def test_prompts_name_every_subject_at_its_place(scenes: SceneSet, tokenizer: BertTokenizerFast) -> None:
    batch = grounding_batch.batch_drawer(scenes, tokenizer, 4, seed=1)(5)
    words = [[tokenizer.decode([batch.tokens[row, place]]) for place in batch.phrases[row]] for row in range(4)]
    assert all(
        word in NOUNS for row in range(4) for word, used in zip(words[row], batch.real[row], strict=True) if used
    )
    assert torch.equal(batch.asked, batch.tokens != 0)


def test_matching_takes_the_nearest_query_of_the_right_word() -> None:
    predicted = torch.tensor([[[0.2, 0.2, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2], [0.71, 0.7, 0.2, 0.2]]])
    boxes = torch.tensor([[[0.7, 0.7, 0.2, 0.2], [0.2, 0.2, 0.2, 0.2]]])
    logits = torch.full((1, 3, 4), -5.0)
    logits[0, 2, 1] = 5.0
    logits[0, 0, 3] = 5.0
    real = torch.tensor([[True, True]])
    assert match(logits, predicted, boxes, torch.tensor([[1, 3]]), real).tolist() == [[2, 0]]


def test_overlap_agrees_with_counting_pixels() -> None:
    iou, generalised = overlap(torch.tensor([0.3, 0.3, 0.4, 0.4]), torch.tensor([0.4, 0.4, 0.4, 0.4]))
    assert iou.item() == pytest.approx(9 / 23)
    assert generalised.item() == pytest.approx(9 / 23 - 2 / 25)


def test_a_right_answer_costs_nothing_and_a_sure_wrong_one_much() -> None:
    costs = quality_focal(torch.tensor([20.0, -20.0, 5.0]), torch.tensor([1.0, 0.0, 0.0]))
    assert costs[0] < 1e-6
    assert costs[1] < 1e-6
    assert costs[2] > 4


def test_the_token_at_an_objects_centre_and_scale_is_worth_most() -> None:
    centers, levels = grounding.token_places(128, 128, torch.tensor([[128.0, 128.0]]))
    boxes = torch.tensor([[[0.3125, 0.3125, 0.35, 0.35], [0.5, 0.5, 1, 1]]])
    worth = token_worth(centers, levels, boxes, torch.tensor([[True, False]]))
    best = worth[0, :, 0].argmax()
    assert worth[0, best, 0] == 1
    assert levels[best] == 0
    assert (centers[0, best] - boxes[0, 0, :2]).abs().max() <= 16 / 128 / 2
    assert worth[..., 1].sum() == 0


def test_grounding_trains_resumes_and_loads_from_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scenes: SceneSet
) -> None:
    monkeypatch.setattr(grounding, "load_scenes", lambda *_: scenes)
    out, work = tmp_path / "grounding-dino", tmp_path / "work"
    common = [
        "grounding",
        "--naming-steps",
        "1",
        "--batch",
        "2",
        "--scenes",
        "12",
        "--out",
        str(out),
        "--work",
        str(work),
    ]
    for steps in ("1", "2"):
        monkeypatch.setattr("sys.argv", [*common, "--steps", steps])
        grounding.main()
    assert torch.load(work / "whole" / "checkpoint.pt", weights_only=True)["step"] == 2
    assert sum(path.stat().st_size for path in out.glob("*.safetensors")) < 9e6
    model = GroundingDinoForObjectDetection.from_pretrained(out, dtype=torch.float32)
    processor = GroundingDinoProcessor.from_pretrained(out)
    image = np.zeros((160, 240, 3), dtype=np.uint8)
    given = processor(images=[image], text=["mug . fish ."], return_tensors="pt")
    assert given["pixel_values"].shape == (1, 3, 128, 192)
    assert model(**given).pred_boxes.shape == (1, 20, 4)


def test_a_training_is_written_down_with_what_it_begins_from():
    given = argparse.Namespace(steps=3, begin=Path("weights/vae"), heldout=5, out=Path("out"))
    assert as_typed("vae", given) == "python -m toyworld.pretrain.vae --steps 3 --begin weights/vae"
    given.begin = None
    assert as_typed("vae", given) == "python -m toyworld.pretrain.vae --steps 3"
