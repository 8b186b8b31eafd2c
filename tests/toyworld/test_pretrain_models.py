"""The small SAM, BLIP and CLIP: a few steps of training each, and what they are made of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor, BlipForConditionalGeneration, SamImageProcessor, SamModel

from toyworld.pretrain import captioner, card, clip, segmenter, tower
from toyworld.pretrain.views import random_windows, sampling_grid, view_labels, view_pixels
from toyworld.pretrain.vocabulary import build_tokenizer

TINY = ["--steps", "2", "--scenes", "70", "--heldout", "33"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sam, blip and clip after two steps of training each, through their own commands."""
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # scenes and checkpoints go to out/pretrain there
        segmenter.main([*TINY, "--out", "sam"])
        captioner.main([*TINY, "--warm-steps", "2", "--decoder-steps", "2", "--fresh", "70", "--out", "blip"])
        clip.main([*TINY, "--tower", "blip", "--out", "clip"])
    return folder


def photo(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_sam_loads_as_the_hubs_does_and_gives_a_mask_of_the_photos_size(trained: Path) -> None:
    model = SamModel.from_pretrained(trained / "sam", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(trained / "sam")
    inputs = processor(images=photo(90, 150), input_boxes=[[[10.0, 10.0, 80.0, 60.0]]], return_tensors="pt")
    with torch.no_grad():
        output = model(
            pixel_values=inputs["pixel_values"], input_boxes=inputs["input_boxes"].float(), multimask_output=False
        )
    masks = processor.post_process_masks(output.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"])
    assert masks[0].shape == (1, 1, 90, 150)
    assert output.iou_scores.shape == (1, 1, 1)


def test_blip_loads_as_the_hubs_does_and_says_words_of_the_toy_world(trained: Path) -> None:
    model = BlipForConditionalGeneration.from_pretrained(trained / "blip", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(trained / "blip")
    inputs = processor(images=[photo(90, 150)], return_tensors="pt")
    for beams in (1, 3):
        tokens = model.generate(**inputs, max_new_tokens=6, num_beams=beams)
        assert isinstance(processor.batch_decode(tokens, skip_special_tokens=True)[0], str)


def test_clip_loads_as_the_hubs_does_and_compares_photos_with_texts(trained: Path) -> None:
    model = AutoModel.from_pretrained(trained / "clip", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(trained / "clip")
    texts = ["a red star", "a blue fish on grass"]
    together = model(**processor(text=texts, images=[photo(90, 150)], padding=True, return_tensors="pt"))
    alone = model(**processor(text=texts[:1], images=[photo(90, 150)], padding=True, return_tensors="pt"))
    assert together.logits_per_image.shape == (1, 2)
    torch.testing.assert_close(together.logits_per_image[:, :1], alone.logits_per_image, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["sam", "blip", "clip"])
def test_weights_are_stored_in_half_precision_with_their_scores(trained: Path, name: str) -> None:
    model = AutoModel.from_pretrained(trained / name) if name != "blip" else None
    if model is not None:
        assert {p.dtype for p in model.parameters()} == {torch.float16}
    record = json.loads((trained / name / "scores.json").read_text())
    assert record["steps"] == 2
    assert record["scores"]["scenes"] == 33


def test_the_card_names_every_model_and_its_command(trained: Path) -> None:
    text = card.card(trained)
    for name, module in (("sam", "segmenter"), ("blip", "captioner"), ("clip", "clip")):
        assert f"## {name}" in text
        assert f"python -m toyworld.pretrain.{module} " in text


def test_clips_tower_begins_with_the_blocks_of_the_warm_one() -> None:
    warm = tower.DenseTower().vision
    model = clip.build_clip(build_tokenizer())
    clip.begin_from_tower(model, warm)
    tokens = torch.randn(2, 10, tower.HIDDEN)
    with torch.no_grad():
        ours = model.get_submodule("vision_model.encoder.layers.0")(tokens, attention_mask=None)
        theirs = warm.get_submodule("encoder.layers.0")(tokens)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_mask_boxes_are_tight_and_zero_where_there_is_no_mask() -> None:
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, 2:5, 1:7] = True
    assert segmenter.mask_boxes(masks).tolist() == [[1, 2, 7, 5], [0, 0, 0, 0]]


def test_a_perfect_mask_costs_nothing_and_boxes_without_weight_do_not_count() -> None:
    target = torch.zeros(2, 8, 8)
    target[:, 2:6, 2:6] = 1
    logits = (target * 2 - 1) * 20
    logits[1] *= -1
    loss, iou = segmenter.mask_loss(logits, torch.ones(2), target, torch.tensor([1.0, 0.0]))
    assert loss.item() == pytest.approx(0, abs=1e-4)
    assert iou.item() == 1


def test_the_dense_loss_is_small_when_patches_subjects_and_image_are_named_right() -> None:
    masks = torch.zeros(1, 2, 16, 16)
    masks[0, 0, 8:] = 1
    batch = tower.SceneBatch(torch.zeros(0), masks, torch.tensor([[1, -1]]), np.array([0]))
    patches = torch.nn.functional.one_hot(torch.tensor([[0, 0, 2, 2]]), 4).float() * 40
    image = torch.tensor([[[-20.0, 20.0, -20.0, 0.0]]])
    tokens = torch.cat([image, patches], dim=1)
    drop_last = torch.nn.Linear(4, 3, bias=False)
    torch.nn.init.eye_(drop_last.weight)
    loss, measures = tower.dense_loss(tokens, torch.nn.Identity(), drop_last, batch)
    assert loss.item() == pytest.approx(0, abs=1e-4)
    assert measures == {"subjects": 1, "sets": 1}


def test_windows_that_keep_the_caption_true_cut_no_subject() -> None:
    boxes = np.full((50, 4, 4), np.nan, dtype=np.float32)
    boxes[:, 0] = [20, 30, 60, 70]
    boxes[:, 1] = [50, 10, 100, 50]
    windows = random_windows(boxes, 128, np.random.default_rng(0), keep=True)
    assert (windows[:, :2] <= [20, 10]).all()
    assert (windows[:, 2:] >= [100, 70]).all()
    assert len(np.unique(windows[:, 0])) > 20


def test_a_view_for_sam_is_resized_and_padded_as_its_processor_does() -> None:
    image = np.tile(np.linspace(0, 255, 128).astype(np.uint8)[None, :, None], (128, 1, 3))
    window = torch.tensor([[0.0, 0.0, 128.0, 64.0]])
    grid = sampling_grid(window, 128, 128, stretch=False)
    processor = segmenter.build_processor().image_processor
    truth = processor(image[:64], return_tensors="pt")["pixel_values"]
    mean, std = SamImageProcessor.image_mean, SamImageProcessor.image_std
    ours = view_pixels(image[None], grid, list(mean), list(std), np.random.default_rng(0))
    assert (ours[0, :, 64:] == 0).all()
    assert (truth[0, :, 64:] == 0).all()
    assert np.corrcoef(ours[0, 0, :64].ravel(), truth[0, 0, :64].ravel())[0, 1] > 0.98
    labels = view_labels(np.ones((1, 1, 128, 128), dtype=np.uint8), grid)
    assert labels.sum() == 64 * 128
