"""Images are normalized to the bits that plain arithmetic gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from datapipe.backends import grounding_dino, sam
from datapipe.backends.pixels import fill_normalized, on_device


@pytest.mark.parametrize(
    ("scale", "module"), [(np.float32(255), grounding_dino), (np.float32(1), sam)], ids=["grounding dino", "sam"]
)
@pytest.mark.parametrize("size", [(40, 56), (96, 130)], ids=["shrunk", "enlarged"])
def test_looking_levels_up_gives_the_bits_of_computing_them(scale, module, size):
    image = np.random.default_rng(0).integers(0, 256, (64, 88, 3), np.uint8)
    height, width = size
    target = np.zeros((3, 100, 140), np.float32)
    fill_normalized(target, image, height, width, module._NORMALIZED)
    resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR), np.float32)
    expected = np.zeros_like(target)
    expected[:, :height, :width] = ((resized / scale - module._MEAN) / module._STD).transpose(2, 0, 1)
    np.testing.assert_array_equal(target, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_comes_to_the_gpu_is_what_was_sent():
    sent = torch.randn(4, 3, 256, 256)
    assert torch.equal(on_device(sent, torch.device("cuda")).cpu(), sent)
