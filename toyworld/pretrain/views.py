"""What the toy models see in training: crops of rendered scenes, resized as the hub's image processors would."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


def random_windows(boxes: NDArray[np.float32], size: int, rng: np.random.Generator, keep: bool) -> NDArray[np.float32]:
    """One crop window for each scene, the whole image for about a third of them.

    boxes: (B, N, 4) xyxy in pixels, rows of NaN where a scene has fewer than N subjects. With `keep` a window cuts no
    subject, so that the caption stays true; without it a window is at least half as wide and as high as the image.
    Returns (B, 4) xyxy in pixels.
    """
    count = len(boxes)
    if keep:
        limit = np.concatenate([np.nanmin(boxes[:, :, :2], axis=1), np.nanmax(boxes[:, :, 2:], axis=1)], axis=1)
        limit = np.clip(limit, 0, size)
    else:
        origin = rng.uniform(0, size / 2, (count, 2))
        limit = np.concatenate([origin, origin + size / 2], axis=1)
    full = np.tile(np.array([0, 0, size, size], dtype=np.float64), (count, 1))
    windows = full + (limit - full) * rng.uniform(0, 1, (count, 4))
    windows[rng.random(count) < 0.35] = full[0]
    return windows.astype(np.float32)


def sampling_grid(windows: Tensor, size: int, out: int, stretch: bool) -> Tensor:
    """Where each output pixel lies in the source, for grid_sample (align_corners=False).

    windows: (B, 4) xyxy, pixels of the source of side `size`. With `stretch` the window fills the output (BLIP, CLIP);
    else its longer side does, from the top left corner, and what is beyond it falls outside (SAM). Returns
    (B, out, out, 2); coordinates beyond the window are moved out of the source, where grid_sample gives 0.
    """
    corner, extent = windows[:, :2], windows[:, 2:] - windows[:, :2]
    scale = extent if stretch else extent.amax(dim=1, keepdim=True).expand(-1, 2)
    unit = (torch.arange(out, dtype=torch.float32) + 0.5) / out
    axis = corner[:, None] + unit[None, :, None] * scale[:, None]  # (B, out, 2)
    axis = torch.where(axis <= corner[:, None] + extent[:, None] + 1e-3, axis, torch.full_like(axis, 9.0 * size))
    axis = axis * (2.0 / size) - 1.0
    across = axis[:, None, :, 0].expand(-1, out, -1)
    down = axis[:, :, None, 1].expand(-1, -1, out)
    return torch.stack([across, down], dim=-1)


def view_pixels(
    images: NDArray[np.uint8], grid: Tensor, mean: list[float], std: list[float], rng: np.random.Generator
) -> Tensor:
    """Images (B, H, W, 3) uint8 through a grid (B, h, w, 2): normalized (B, 3, h, w) float32, 0 outside the source.

    Brightness and contrast vary by 10 % and half of the images get faint noise, as JPEG and resizing do to web images.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    count = len(images)
    gain = torch.from_numpy(rng.uniform(0.9, 1.1, (count, 1, 1, 1)).astype(np.float32))
    lift = torch.from_numpy(rng.uniform(-0.05, 0.05, (count, 1, 1, 1)).astype(np.float32))
    noise = rng.uniform(0, 0.03, (count, 1, 1, 1)) * (rng.random((count, 1, 1, 1)) < 0.5)
    pixels = pixels * gain + lift
    grain = rng.standard_normal((count, 1, *pixels.shape[2:]), dtype=np.float32)
    pixels += torch.from_numpy(noise.astype(np.float32)) * torch.from_numpy(grain)
    normal = (pixels.clamp(0, 1) - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    return nn.functional.grid_sample(
        normal, grid, mode="bilinear", padding_mode="border", align_corners=False
    ) * _inside(grid)


def view_labels(labels: NDArray[np.uint8], grid: Tensor) -> Tensor:
    """Integer maps (B, C, H, W) uint8 through a grid (B, h, w, 2), nearest; (B, C, h, w) float32, 0 outside."""
    source = torch.from_numpy(np.ascontiguousarray(labels)).float()
    return nn.functional.grid_sample(source, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def _inside(grid: Tensor) -> Tensor:
    """(B, 1, h, w) float32: 1 where the grid (B, h, w, 2) lies in the source."""
    return (grid.abs().amax(dim=-1) <= 1.0).float()[:, None]
