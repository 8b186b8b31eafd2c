"""The encoder of identities: what it learns from, a few steps, and what `sdd pairs` makes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from datapipe.backends.patch_features import PatchFeatures
from datapipe.pairs.settings import EmbedSettings
from toyworld.pretrain import identity
from toyworld.pretrain.cutouts import Cutouts, draw_cutouts
from toyworld.pretrain.loop import LoopSettings, train
from toyworld.render import NOUNS


@pytest.fixture(scope="module")
def drawn() -> Cutouts:
    return draw_cutouts("train", 1, 1, 2, identity.SIDE, identity.BACKGROUND)


@pytest.fixture(scope="module")
def redrawn() -> Cutouts:
    return draw_cutouts("train", 1, 1, 2, identity.SIDE, identity.BACKGROUND, redrawn=1.0)


def test_every_individual_is_cut_out_of_as_many_scenes_as_asked(drawn: Cutouts) -> None:
    assert drawn.rgb.shape == (len(NOUNS), 1, 2, identity.SIDE, identity.SIDE, 3)
    share = (drawn.covered > 127).mean(axis=(3, 4))
    assert (share > 0.05).all() and (share < 1).all()
    outside = drawn.rgb[drawn.covered == 0]
    assert np.abs(outside - np.array(identity.BACKGROUND)).max() < 1
    one, other = drawn.rgb[:, 0, 0], drawn.rgb[:, 0, 1]
    assert (one != other).any(axis=(1, 2, 3)).all()


def test_a_redrawn_subject_keeps_its_silhouette_and_its_colors_roughly(drawn: Cutouts, redrawn: Cutouts) -> None:
    assert (redrawn.covered == drawn.covered).all() and (redrawn.rgb != drawn.rgb).any(axis=(3, 4, 5)).all()
    inside = (drawn.covered == 255)[..., None]
    colors, drawn_colors = (np.mean(c.rgb, axis=(3, 4), where=inside).reshape(-1, 3) for c in (redrawn, drawn))
    apart = np.linalg.norm(colors[:, None] - drawn_colors[None], axis=-1)
    itself = np.diagonal(apart)
    assert (apart > itself[:, None]).mean() > 0.9, "nearer to its own drawing than to others'"


def test_a_redrawn_view_is_told_from_others_of_its_noun() -> None:
    one = torch.eye(4).expand(3, 4, 4)  # each of three nouns has four individuals, all apart
    assert identity.right_of_noun(one, one, 3) == 1.0
    assert identity.right_of_noun(one, one.flip(1), 3) == 0.0


def test_two_views_of_an_individual_come_to_be_nearer_than_others_and_the_weights_load(
    drawn: Cutouts, redrawn: Cutouts, tmp_path: Path
) -> None:
    groups = len(NOUNS) // identity.TOGETHER
    apart, rough = (
        Cutouts(*(part.reshape(groups, identity.TOGETHER, *part.shape[2:]) for part in (cut.rgb, cut.covered)))
        for cut in (drawn, redrawn)
    )
    settings = LoopSettings(steps=12, lr=2e-3, warmup=2, ema=0.5)
    encoder = identity.build_encoder()
    batches = identity.batches(apart, 0, groups)
    before = identity.calibrated_loss(encoder, batches(0))[0].item()
    averaged = train(encoder, batches, identity.calibrated_loss, settings, tmp_path / "work")
    assert identity.calibrated_loss(averaged, batches(0))[0].item() < before

    identity.save_encoder(averaged, tmp_path / "weights")
    scores = identity.evaluate(tmp_path / "weights", apart, rough)
    assert scores["views"] == 2 * len(NOUNS)
    features = PatchFeatures(EmbedSettings(model=str(tmp_path / "weights")), identity.GRID)
    found = features([(drawn.rgb[0, 0, 0], drawn.covered[0, 0, 0] > 127)])
    assert features.side == identity.SIDE and np.linalg.norm(found[0].embedding) == pytest.approx(1, abs=1e-3)
