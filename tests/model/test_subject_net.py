"""The trainable subset."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from model import ModelError, SubjectDiffusion, SubjectNet
from model.base import load_subject_net
from model.subject_net import block_configs
from model.unet import admit_subjects
from tests.model.bases import awaken, settings


def test_on_stable_diffusion_2_it_is_as_large_as_the_paper_says() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True, sample_size=64
        )
        admit_subjects(unet)
        net = SubjectNet(
            settings=settings(max_subjects=2).model_dump(mode="json"),
            text_config={
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 23,
                "num_attention_heads": 16,
                "vocab_size": 49408,
            },
            block_configs=block_configs(unet),
            latent_channels=4,
            stem_channels=320,
            image_width=1024,
            patch_width=1280,
        )

    def millions(*modules: torch.nn.Module) -> float:
        return round(sum(p.numel() for module in modules for p in module.parameters()) / 1e6, 1)

    assert len(net.blocks) == 16
    assert millions(*(block.adapter for block in net.blocks)) == 211.2
    assert millions(*(layer for block in net.blocks for layer in (block.to_k, block.to_v))) == 25.6
    assert millions(net.text_encoder) == 340.4
    assert 578 < millions(net) < 586


def test_what_is_saved_is_what_is_read(sd1: Path, clip: Path, tmp_path: Path) -> None:
    net = awaken(SubjectDiffusion.from_base(sd1, settings(), image_encoder=clip)).subject_net
    net.save_pretrained(tmp_path)
    again = load_subject_net(tmp_path)
    assert again.config.settings == net.config.settings
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))
    assert again.state_dict().keys() == net.state_dict().keys()


def test_a_net_of_an_earlier_release_is_refused_in_one_line(sd1: Path, clip: Path, tmp_path: Path) -> None:
    SubjectDiffusion.from_base(sd1, settings(), image_encoder=clip).subject_net.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["settings"]["adapter_reach"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"its config\.json lacks adapter_reach: an earlier release wrote it"):
        load_subject_net(tmp_path)
