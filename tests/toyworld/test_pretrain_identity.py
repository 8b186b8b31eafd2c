"""The encoder of identities: what it learns from, a few steps, and what `sdd pairs` makes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from datapipe.backends.patch_features import PatchFeatures
from datapipe.pairs.settings import EmbedSettings
from toyworld.pretrain import identity
from toyworld.pretrain.cutouts import Cutouts, draw_cutouts
from toyworld.pretrain.loop import LoopSettings, train
from toyworld.render import NOUNS


@pytest.fixture(scope="module")
def drawn() -> Cutouts:
    return draw_cutouts("train", 1, 1, 2, identity.SIDE, identity.BACKGROUND)


def test_every_individual_is_cut_out_of_as_many_scenes_as_asked(drawn: Cutouts) -> None:
    assert drawn.rgb.shape == (len(NOUNS), 1, 2, identity.SIDE, identity.SIDE, 3)
    share = (drawn.covered > 127).mean(axis=(3, 4))
    assert (share > 0.05).all() and (share < 1).all()
    outside = drawn.rgb[drawn.covered == 0]
    assert np.abs(outside - np.array(identity.BACKGROUND)).max() < 1
    one, other = drawn.rgb[:, 0, 0], drawn.rgb[:, 0, 1]
    assert (one != other).any(axis=(1, 2, 3)).all()


def test_two_views_of_an_individual_come_to_be_nearer_than_others_and_the_weights_load(
    drawn: Cutouts, tmp_path: Path
) -> None:
    groups = len(NOUNS) // identity.TOGETHER
    apart = Cutouts(*(part.reshape(groups, identity.TOGETHER, *part.shape[2:]) for part in (drawn.rgb, drawn.covered)))
    settings = LoopSettings(steps=12, lr=2e-3, warmup=2, ema=0.5)
    encoder = identity.build_encoder()
    batches = identity.batches(apart, 0, groups)
    before = identity.calibrated_loss(encoder, batches(0))[0].item()
    averaged = train(encoder, batches, identity.calibrated_loss, settings, tmp_path / "work")
    assert identity.calibrated_loss(averaged, batches(0))[0].item() < before

    identity.save_encoder(averaged, tmp_path / "weights")
    assert identity.evaluate(tmp_path / "weights", apart)["views"] == 2 * len(NOUNS)
    features = PatchFeatures(EmbedSettings(model=str(tmp_path / "weights")), identity.GRID)
    found = features([(drawn.rgb[0, 0, 0], drawn.covered[0, 0, 0] > 127)])
    assert features.side == identity.SIDE and np.linalg.norm(found[0].embedding) == pytest.approx(1, abs=1e-3)
