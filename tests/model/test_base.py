"""What can be started from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from transformers import CLIPModel

from model.base import load_base, load_image_encoder
from model.errors import ModelError
from model.reference import encode_references, reference_tensor

TOY_CLIP = Path(__file__).parents[2] / "toyworld" / "weights" / "clip"


@pytest.mark.parametrize("folder", ["toy", "tiny"])
def test_references_are_encoded_as_clip_itself_encodes_images(folder: str, clip: Path) -> None:
    path = TOY_CLIP if folder == "toy" else clip
    encoder, processor = load_image_encoder(path)
    side = encoder.config.image_size
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))
    stock = CLIPModel.from_pretrained(path, dtype=torch.float32).eval()
    pixels = processor(image, return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = stock.visual_projection(stock.vision_model(pixels).pooler_output)
        patches = stock.vision_model(pixels).last_hidden_state[:, 1:]
        mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
        slots, present = reference_tensor(image).expand(2, 2, -1, -1, -1), torch.tensor([[True, False], [False, True]])
        found = encode_references(encoder, slots, present, mean, std)
    for of_slots, of_clip in zip(found, (expected, patches), strict=True):
        torch.testing.assert_close(of_slots[present], of_clip.expand(2, *of_clip.shape[1:]), rtol=1e-4, atol=1e-4)


def test_a_base_of_flow_matching_is_refused_in_one_line(sd1: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sd1, tmp_path / "base"))
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"][1] = "FlowMatchEulerDiscreteScheduler"
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="its scheduler is FlowMatchEulerDiscreteScheduler, of flow matching") as error:
        load_base(folder)
    assert "\n" not in str(error.value)
