"""The same weights through both implementations of a model give the same boxes and masks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import groundingdino.datasets.transforms as original_transforms
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from segment_anything import sam_model_registry
from transformers import (
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    SwinConfig,
)

from datapipe.backends import grounding_dino, sam
from datapipe.backends.grounding_dino import Asking, OriginalGroundingDino, TransformersGroundingDino
from datapipe.backends.loading import ModelSettings
from datapipe.backends.protocol import Detection, Segment
from datapipe.backends.sam import OriginalSam, TransformersSam
from datapipe.decoding import scaled_size
from tests.backends.convert import original_grounding_dino, original_sam
from tests.toy import PROJECT
from toyworld.pretrain.vocabulary import build_tokenizer
from toyworld.render import render_scene

WEIGHTS = PROJECT / "toyworld/weights"
SIZES = ((128, 160), (128, 128), (160, 128))
SCENES = [render_scene(seed, size=size, split="heldout") for seed, size in enumerate(SIZES)]
TOLERANCE = 1e-4


def save_random_grounding_dino(folder: Path) -> None:
    """Small, but 256 wide: groundingdino-py has this width of the published models written into it."""
    torch.manual_seed(0)
    bert = {"vocab_size": 1100, "hidden_size": 32, "intermediate_size": 64}
    bert |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    swin = {"embed_dim": 24, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8], "window_size": 4, "image_size": 128}
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(out_indices=[2, 3, 4], drop_path_rate=0.0, **swin),
        text_config=bert,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=30,
        disable_custom_kernels=True,
    )
    model = GroundingDinoForObjectDetection(config)
    shake(model)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def shake(model: torch.nn.Module) -> None:
    """Some parameters begin at zero or nearly so, which would hide a wrong name or an input that is not heeded."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.03)


@pytest.fixture(scope="module")
def detectors(tmp_path_factory: pytest.TempPathFactory):
    folder, text_encoder = tmp_path_factory.mktemp("grounding-dino"), tmp_path_factory.mktemp("bert")
    save_random_grounding_dino(folder)
    settings = ModelSettings(model=str(folder))
    asking = Asking(128, 256, pad_multiple=32, separator="period", floor=0.0, most=30)
    port = TransformersGroundingDino(settings, asking)
    port.model.model.text_backbone.save_pretrained(text_encoder)
    port.tokenizer.save_pretrained(text_encoder)
    checkpoint = str(folder / "original.pth")
    with pytest.MonkeyPatch.context() as patch:
        small = original_grounding_dino(port.model, str(text_encoder), patch)
        torch.save({"model": {f"module.{name}": t for name, t in small.state_dict().items()}}, checkpoint)
        patch.setattr(grounding_dino, "build_original", lambda _: small)
        with torch.no_grad():
            for parameter in small.parameters():
                parameter.zero_()
        original = OriginalGroundingDino(ModelSettings(model=checkpoint), asking, str(text_encoder), "swint_ogc")
    return port, original


@pytest.fixture
def segmenters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings, checkpoint = ModelSettings(model=str(WEIGHTS / "sam")), str(tmp_path / "original.pth")
    port = TransformersSam(settings)
    torch.save(original_sam(port.model).state_dict(), checkpoint)

    def blank():
        model = original_sam(port.model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        return model

    monkeypatch.setitem(sam_model_registry, "vit_b", blank)
    return port, OriginalSam(ModelSettings(model=checkpoint), "vit_b")


def test_grounding_dino_gives_the_same_boxes_and_scores(detectors):
    port, original = detectors
    for scene in SCENES:
        nouns = list(dict.fromkeys(s.tag for s in scene.subjects))
        ours, theirs = port([scene.image], [nouns])[0].detections, original([scene.image], [nouns])[0].detections
        assert ours
        assert [d.phrase for d in ours] == [d.phrase for d in theirs]
        side = max(scene.image.shape)
        np.testing.assert_allclose([d.box for d in ours], [d.box for d in theirs], atol=side * TOLERANCE + 0.01)
        np.testing.assert_allclose([d.score for d in ours], [d.score for d in theirs], atol=2 * TOLERANCE)
        np.testing.assert_allclose([d.text_score for d in ours], [d.text_score for d in theirs], atol=2 * TOLERANCE)


sides = st.integers(1, 4000)


@given(sides, sides, st.integers(32, 900), st.integers(1000, 3000))
def test_images_are_resized_to_the_originals_sizes(width, height, short_side, long_side):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(original_transforms.F, "resize", lambda image, size: SimpleNamespace(size=size[::-1]))
        image = SimpleNamespace(size=(width, height))
        resized, _ = original_transforms.resize(image, None, short_side, long_side)
    expected = tuple(max(1, side) for side in resized.size[::-1])
    assert scaled_size(height, width, short_side, long_side) == expected


def test_without_padding_images_are_seen_at_their_own_size_and_share_a_batch_only_with_such(detectors):
    port, _ = detectors
    exact = Asking(128, 256, pad_multiple=1, separator="period", floor=0.0, most=30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(port, "_asking", exact)
        pixels, mask = port._pixels([np.zeros((100, 130, 3), np.uint8)])
        assert pixels.shape[2:] == mask.shape[1:] == port.padded_size(100, 130) == (128, 166)
        assert mask.all()
    assert port.padded_size(100, 130) == (128, 192)


def scored(port: Any, probabilities: list[list[float]], phrases: list[str]) -> list[Detection]:
    """What the backend makes of such token probabilities, one row per query, in the order of the prompt's tokens."""
    table = torch.zeros(1, len(probabilities), 256)
    table[0, :, 1 : 1 + len(probabilities[0])] = torch.tensor(probabilities)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(port, "_forward", lambda *_: (table, torch.full((1, len(probabilities), 4), 0.5)))
        return list(port([SCENES[0].image], [phrases])[0].detections)


def test_a_box_knows_the_best_tokens_score_its_whole_phrases_and_its_best_rivals(detectors):
    # The toy tokenizer knows "mug", and spells "ox" as two pieces: [CLS] mug . o ##x .
    first, second = scored(detectors[0], [[0.1, 0.9, 0.8, 0.2, 0.9], [0.6, 0.9, 0.5, 0.3, 0.9]], ["mug", "ox"])
    assert (first.phrase, first.score, first.text_score, first.rival_score) == (1, 0.8, 0.5, 0.1)
    assert (second.phrase, second.score, second.text_score, second.rival_score) == (0, 0.6, 0.6, 0.5)
    (alone,) = scored(detectors[0], [[0.6]], ["mug"])
    assert (alone.score, alone.text_score, alone.rival_score) == (0.6, 0.6, 0.0)


def test_grounding_dino_does_not_care_who_shares_its_batch(detectors):
    port, _ = detectors
    images = [render_scene(seed, size=(128, 128 + seed), split="heldout").image for seed in range(1, 5)]
    nouns = [["mug"], ["mug", "fish"], ["teapot", "house", "car"], ["cat"]]
    together = port(images, nouns)
    for image, words, batched in zip(images, nouns, together, strict=True):
        (alone,) = port([image], [words])
        theirs = [d.score for d in batched.detections]
        np.testing.assert_allclose([d.score for d in alone.detections], theirs, atol=2 * TOLERANCE)


def test_sam_gives_the_same_masks(segmenters):
    port, original = segmenters
    images, boxes = [s.image for s in SCENES], [[p.box for p in s.subjects] for s in SCENES]
    with torch.inference_mode():
        pixels = port._pixels(images)
        torch.testing.assert_close(port._encode(pixels), original._encode(pixels), atol=TOLERANCE, rtol=TOLERANCE)
    for ours, theirs in zip(port(images, boxes), original(images, boxes), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.predicted_iou == pytest.approx(b.predicted_iou, abs=2 * TOLERANCE)
            assert a.stability == pytest.approx(b.stability, abs=2e-3)
            assert iou(a, b) > 1 - 2e-3


def iou(a: Segment, b: Segment) -> float:
    pair = [s.mask.to_coco() for s in (a, b)]
    return float(coco_mask.iou(pair[:1], pair[1:], [0])[0, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_moves_masks_little_in_either_implementation(segmenters, tmp_path, monkeypatch, dtype):
    images, boxes = [s.image for s in SCENES], [[p.box for p in s.subjects] for s in SCENES]
    exact = [s for found in segmenters[0](images, boxes) for s in found]
    monkeypatch.setattr(sam, "dtype_of", lambda _: dtype)
    port = TransformersSam(ModelSettings(model=str(WEIGHTS / "sam")))
    original = OriginalSam(ModelSettings(model=str(tmp_path / "original.pth")), "vit_b")
    for half in (port, original):
        found = [s for found in half(images, boxes) for s in found]
        assert np.mean([iou(a, b) for a, b in zip(exact, found, strict=True)]) > 0.98
        assert {p.dtype for p in half.model.mask_decoder.parameters()} == {torch.float32}


def test_half_precision_moves_boxes_little(monkeypatch):
    nouns = [list(dict.fromkeys(s.tag for s in scene.subjects)) for scene in SCENES[1:2]]

    def best(dtype):
        monkeypatch.setattr(grounding_dino, "dtype_of", lambda _: dtype)
        asking = Asking(128, 256, pad_multiple=32, separator="period", floor=0.5, most=50)
        detect = TransformersGroundingDino(ModelSettings(model=str(WEIGHTS / "grounding-dino")), asking)
        return {d.phrase: d for d in reversed(detect([SCENES[1].image], nouns)[0].detections)}

    exact, half = best(torch.float32), best(torch.bfloat16)
    assert exact.keys() == half.keys() and exact
    for phrase, d in exact.items():
        np.testing.assert_allclose(half[phrase].box, d.box, atol=2.0)


def test_an_image_without_nouns_has_no_boxes_and_leaves_its_neighbor_alone(detectors):
    port, _ = detectors
    image = SCENES[1].image
    none, some = port([image, image], [[], ["mug"]])
    (alone,) = port([image], [["mug"]])
    assert none.detections == ()
    assert [d.score for d in some.detections] == pytest.approx([d.score for d in alone.detections], abs=2 * TOLERANCE)


def test_output_that_is_no_number_is_an_error_and_no_empty_image(detectors, segmenters, monkeypatch):
    port, _ = detectors
    monkeypatch.setattr(port, "_forward", lambda *_: (torch.full((1, 3, 256), torch.nan), torch.zeros(1, 3, 4)))
    with pytest.raises(FloatingPointError):
        port([SCENES[1].image], [["mug"]])
    monkeypatch.setattr(segmenters[0], "_decode", lambda *_: (torch.full((1, 8, 8), torch.nan), torch.zeros(1)))
    with pytest.raises(FloatingPointError):
        segmenters[0]([SCENES[1].image], [[(0.0, 0.0, 9.0, 9.0)]])


def test_groundingdino_is_imported_without_yapf_and_its_cache_of_pickles(tmp_path):
    code = "import sys; from datapipe.backends.grounding_dino import import_original; "
    code += "assert import_original().build_model; assert not [name for name in sys.modules if 'yapf' in name]"
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", code], env=os.environ | home, cwd=PROJECT, check=True)
    assert not list(tmp_path.glob("cache/**/*.pickle"))


def test_the_methods_that_groundingdino_py_misses_are_given_back_as_they_were():
    from transformers import BertConfig, BertModel

    from datapipe.backends.grounding_dino import _restore_bert_methods

    _restore_bert_methods()
    sizes = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 9}
    bert = BertModel(BertConfig(num_hidden_layers=1, num_attention_heads=1, **sizes))
    mask = torch.tensor([[1, 1, 0]])
    wide = bert.get_extended_attention_mask(mask, (1, 3), None)
    assert wide.shape == (1, 1, 1, 3)
    assert wide.flatten().tolist() == [0.0, 0.0, torch.finfo(torch.float32).min]
    assert bert.get_extended_attention_mask(mask[:, None].expand(1, 3, 3), (1, 3), None).shape == (1, 1, 3, 3)
    assert bert.get_head_mask(None, 2) == [None, None]
