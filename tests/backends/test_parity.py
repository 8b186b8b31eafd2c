"""The same weights through both implementations of a model give the same boxes and masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection, SwinConfig

from datapipe.backends.grounding_dino import OriginalGroundingDino, TransformersGroundingDino
from datapipe.backends.loading import ModelSettings
from datapipe.backends.sam import OriginalSam, TransformersSam
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
    with torch.no_grad():
        for parameter in model.parameters():
            # Some begin at zero, which would hide a wrong name.
            parameter += 0.03 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def detectors(tmp_path_factory: pytest.TempPathFactory):
    folder, text_encoder = tmp_path_factory.mktemp("grounding-dino"), tmp_path_factory.mktemp("bert")
    save_random_grounding_dino(folder)
    settings = ModelSettings(model=str(folder))
    limits = {"short_side": 128, "long_side": 256, "floor": 0.0, "most": 30}
    port = TransformersGroundingDino(settings, **limits)
    port.model.model.text_backbone.save_pretrained(text_encoder)
    port.tokenizer.save_pretrained(text_encoder)
    with pytest.MonkeyPatch.context() as patch:
        model = original_grounding_dino(port.model, str(text_encoder), patch)
    original = OriginalGroundingDino.__new__(OriginalGroundingDino)
    super(OriginalGroundingDino, original).__init__(settings, **limits)
    original.model, original.tokenizer = model, model.tokenizer
    return port, original


def test_grounding_dino_gives_the_same_boxes_and_scores(detectors):
    port, original = detectors
    for scene in SCENES:
        nouns = list(dict.fromkeys(s.tag for s in scene.subjects))
        (ours,), (theirs,) = port([scene.image], [nouns]), original([scene.image], [nouns])
        assert ours
        assert [d.phrase for d in ours] == [d.phrase for d in theirs]
        side = max(scene.image.shape)
        np.testing.assert_allclose([d.box for d in ours], [d.box for d in theirs], atol=side * TOLERANCE + 0.01)
        np.testing.assert_allclose([d.score for d in ours], [d.score for d in theirs], atol=2 * TOLERANCE)
        np.testing.assert_allclose([d.text_score for d in ours], [d.text_score for d in theirs], atol=2 * TOLERANCE)


def test_grounding_dino_does_not_care_who_shares_its_batch(detectors):
    port, _ = detectors
    images = [render_scene(seed, size=(128, 128 + seed), split="heldout").image for seed in range(1, 5)]
    nouns = [["mug"], ["mug", "fish"], ["teapot", "house", "car"], ["cat"]]
    together = port(images, nouns)
    for image, words, batched in zip(images, nouns, together, strict=True):
        (alone,) = port([image], [words])
        np.testing.assert_allclose([d.score for d in alone], [d.score for d in batched], atol=2 * TOLERANCE)


def test_sam_gives_the_same_masks(tmp_path: Path):
    settings = ModelSettings(model=str(WEIGHTS / "sam"))
    port = TransformersSam(settings)
    original = OriginalSam.__new__(OriginalSam)
    super(OriginalSam, original).__init__(settings)
    original._use(original_sam(port.model))
    images, boxes = [s.image for s in SCENES], [[p.box for p in s.subjects] for s in SCENES]
    with torch.inference_mode():
        pixels = torch.stack([port._pixels(i) for i in images])
        torch.testing.assert_close(port._encode(pixels), original._encode(pixels), atol=TOLERANCE, rtol=TOLERANCE)
    for ours, theirs in zip(port(images, boxes), original(images, boxes), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.predicted_iou == pytest.approx(b.predicted_iou, abs=2 * TOLERANCE)
            assert a.stability == pytest.approx(b.stability, abs=2e-3)
            pair = [{"size": list(m.mask.size), "counts": m.mask.counts.encode()} for m in (a, b)]
            assert coco_mask.iou(pair[:1], pair[1:], [0])[0, 0] > 1 - 2e-3


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
