"""Each measure against a slow and obvious version, and against the libraries that have it."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import stats
from torch.nn import functional

from subject_diffusion.errors import BackendError
from tests.train.benchmark.folders import CLIP
from train.benchmark.backbones import Backbone, PatchBackbone, Preprocessing
from train.benchmark.options import BackboneSettings, parse_backbones
from train.benchmark.result import cluster_mean
from train.benchmark.scores import copy_paste, cosines, margin, masked_max_cosine, patch_mask


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def picture(width: int = 70, height: int = 50, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def test_cosines_are_those_of_each_pair():
    generated, photographs = unit(5, seed=1), unit(3, 5, seed=2)
    for found, photograph in zip(cosines(generated, list(photographs)), photographs, strict=True):
        angle = math.acos(float((generated * photograph).sum()))
        assert found == pytest.approx(math.cos(angle), abs=1e-6)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_the_masked_maximum_cosine_is_the_mean_of_the_best_matches_of_the_subjects_patches(n, m, seed):
    reference, generated = unit(n, 4, seed=seed), unit(m, 4, seed=seed + 1)
    mask = np.random.default_rng(seed).random(n) < 0.5
    mask[seed % n] = True
    best = [
        max(sum(float(a) * float(b) for a, b in zip(r, g, strict=True)) for g in generated)
        for r, inside in zip(reference, mask, strict=True)
        if inside
    ]
    assert masked_max_cosine(reference, mask, generated) == pytest.approx(sum(best) / len(best), abs=1e-5)


def test_the_masked_maximum_cosine_ignores_the_background_of_the_reference_and_where_the_subject_is():
    subject, background = unit(3, 8, seed=1), unit(5, 8, seed=2)
    reference, mask = torch.cat([subject, background]), np.arange(8) < 3
    elsewhere = torch.cat([unit(5, 8, seed=3), subject.flip(0)])
    assert masked_max_cosine(reference, mask, elsewhere) == pytest.approx(1, abs=1e-6)
    assert masked_max_cosine(reference, mask, background) < 0.9


def test_a_mask_by_patches_has_those_half_covered_or_else_the_most_covered():
    mask = np.zeros((8, 12), bool)
    mask[:4, :4], mask[4:8, 4:6] = True, True  # one patch whole, one by half
    mask[0, 11] = True
    assert patch_mask(mask, (2, 3)).tolist() == [True, False, False, False, True, False]
    lone = np.zeros((8, 12), bool)
    lone[7, 0] = True
    assert patch_mask(lone, (2, 3)).tolist() == [False, False, False, True, False, False]


def test_the_margin_is_the_lead_over_the_nearest_look_alike():
    assert margin([0.8, 0.6], [[0.1, 0.2], [0.5, 0.7]]) == pytest.approx(0.7 - 0.6)


def test_copy_paste_is_1_for_the_reference_minus_1_for_another_photograph_and_0_half_way():
    shown, other = torch.tensor([1.0, 0]), torch.tensor([0, 1.0])
    half_way = functional.normalize(torch.tensor([1.0, 1.0]), dim=0)
    assert copy_paste(shown, shown, [other]) == pytest.approx(1)
    assert copy_paste(other, shown, [other]) == pytest.approx(-1)
    assert copy_paste(half_way, shown, [other]) == pytest.approx(0, abs=1e-6)
    third = unit(6, seed=1)
    a, b = unit(6, seed=2), unit(6, seed=3)
    angles = {k: math.acos(float(u @ v)) for k, (u, v) in {"gr": (third, a), "gt": (third, b), "rt": (a, b)}.items()}
    assert copy_paste(third, a, [b]) == pytest.approx((angles["gt"] - angles["gr"]) / angles["rt"], abs=1e-5)


def test_an_interval_draws_whole_clusters():
    rng = np.random.default_rng(1)
    values = np.concatenate([rng.normal(level, 0.01, 20) for level in (0.2, 0.5, 0.9, 0.4)])
    clusters = [number // 20 for number in range(80)]
    found = cluster_mean(values, clusters)
    expected = stats.bootstrap(
        (values.reshape(4, 20).mean(axis=1),), np.mean, n_resamples=9999, method="percentile", rng=rng
    ).confidence_interval
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.03)
    alone = cluster_mean(values, [0] * 80)  # of one cluster, the values are drawn
    assert found.high - found.low > 2 * (alone.high - alone.low) > 0
    single = cluster_mean(np.array([0.3]), ["a"])
    assert (single.low, single.mean, single.high) == pytest.approx((0.3, 0.3, 0.3))


@pytest.mark.parametrize(("size", "resized"), [((70, 50), (51, 37)), ((33, 91), (37, 102)), ((32, 32), (37, 37))])
def test_preprocessing_resizes_the_shorter_side_and_keeps_the_middle(size, resized):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    found = Preprocessing(37, 32, mean, std)(picture(*size))
    left, top = (round((side - 32) / 2) for side in resized)
    middle = picture(*size).resize(resized, Image.Resampling.BICUBIC).crop((left, top, left + 32, top + 32))
    expected = (np.asarray(middle, np.float32) / 255 - np.array(mean)) / np.array(std)
    assert np.allclose(found.permute(1, 2, 0), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["dino", "dino8"])
def test_dino_is_the_class_token_of_the_hubs_vit(backbones, name):
    pictures = [picture(64, 64, seed) for seed in range(3)]
    backbone = Backbone("dino", BackboneSettings(model=str(backbones / name)))
    model = transformers.ViTModel.from_pretrained(backbones / name, add_pooling_layer=False).eval()
    pixels = torch.stack([backbone.preprocessing(p) for p in pictures])
    with torch.no_grad():
        token = model(pixels).last_hidden_state[:, 0]
    assert torch.allclose(backbone.images(pictures), token / token.norm(dim=-1, keepdim=True), atol=1e-5)
    assert backbone.preprocessing.crop_px == 32 and backbone.preprocessing.resize_px == 37


def test_weights_have_a_hash_of_what_was_loaded_whatever_the_folder(backbones, tmp_path):
    dino = Backbone("dino", BackboneSettings(model=str(backbones / "dino")))
    model = transformers.ViTModel.from_pretrained(backbones / "dino", add_pooling_layer=False)
    for name, factor in (("same", 1.0), ("other", 1.001)):
        with torch.no_grad():
            model.layernorm.weight.mul_(factor)
        model.save_pretrained(tmp_path / name)
        transformers.AutoImageProcessor.from_pretrained(backbones / "dino").save_pretrained(tmp_path / name)
    same, other = (Backbone("dino", BackboneSettings(model=str(tmp_path / n))) for n in ("same", "other"))
    assert dino.weights == same.weights != other.weights


def test_dinov2_and_siglip_2_see_pictures_of_any_shape(backbones):
    pictures = [picture(70, 40), picture(30, 90, 1)]
    dinov2 = Backbone("dinov2", BackboneSettings(model=str(backbones / "dinov2"))).images(pictures)
    assert dinov2.shape == (2, 16) and torch.allclose(dinov2.norm(dim=1), torch.ones(2), atol=1e-5)
    siglip = PatchBackbone(BackboneSettings(model=str(backbones / "siglip2")))
    both, alone = siglip.patches(pictures), siglip.patches(pictures[:1])
    assert all(len(p.features) == p.grid[0] * p.grid[1] <= 16 for p in both)
    assert both[0].grid[1] > both[0].grid[0] and both[1].grid[1] < both[1].grid[0]
    assert torch.allclose(both[0].features, alone[0].features, atol=1e-5)


class BareClip(transformers.CLIPModel):  # type: ignore[misc]  # transformers is untyped
    """As of transformers 4, which torchmetrics is written for: features come bare."""

    def get_image_features(self, *args, **kwargs):
        return super().get_image_features(*args, **kwargs).pooler_output

    def get_text_features(self, *args, **kwargs):
        return super().get_text_features(*args, **kwargs).pooler_output


def test_clip_agrees_with_torchmetrics():
    multimodal = pytest.importorskip("torchmetrics.multimodal", reason="torchmetrics is not installed")
    captions = ["a red mug", "a fish on grass"]
    clip = Backbone("clip", BackboneSettings(model=str(CLIP)))
    side = clip.preprocessing.crop_px
    pictures = [picture(side, side, seed) for seed in range(2)]
    scorer = multimodal.CLIPScore(
        lambda: (BareClip.from_pretrained(CLIP), transformers.CLIPProcessor.from_pretrained(CLIP))
    )
    pixels = [torch.from_numpy(np.asarray(p).copy()).permute(2, 0, 1) for p in pictures]
    theirs = [float(scorer(p, caption)) / 100 for p, caption in zip(pixels, captions, strict=True)]
    ours = (clip.images(pictures) * clip.texts(captions)).sum(dim=1)
    assert [max(float(c), 0) for c in ours] == pytest.approx(theirs, abs=2e-3)
    between = max(float(scorer(pixels[0], pixels[1])) / 100, 0)
    assert cosines(clip.images(pictures)[0], [clip.images(pictures)[1]]) == pytest.approx([between], abs=2e-3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("dino", "write ROLE=MODEL"),
        ("vgg=folder", "write ROLE=MODEL"),
        ("dino={backbones}/siglip2", "a model of type siglip2, where vit is wanted"),
        ("dino={backbones}/none", "no such folder"),
        ("siglip2={backbones}/siglip2", "--labels"),
    ],
)
def test_a_backbone_that_cannot_be_is_told_without_loading_it(backbones, given, said):
    with pytest.raises(Exception, match=said):
        parse_backbones([given.format(backbones=backbones)], masks=False)


def test_two_backbones_of_a_role_and_one_with_missing_weights_are_refused(backbones, tmp_path):
    given = [f"dino={backbones / 'dino'}", f"dino={backbones / 'dino8'}"]
    with pytest.raises(Exception, match="there is a dino already"):
        parse_backbones(given, masks=False)
    folder = shutil.copytree(backbones / "dino", tmp_path / "dino")
    tensors = load_file(folder / "model.safetensors")
    del tensors["layernorm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BackendError, match=r"missing: 1 \(such as layernorm.weight\)"):
        Backbone("dino", BackboneSettings(model=str(folder)))
