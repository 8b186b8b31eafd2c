"""Location control: the boxes become a mask channel beside the noisy latent."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def cells_reached(boxes: Tensor, present: Tensor, height: int, width: int) -> Tensor:
    """The latent pixels that a subject's box touches; all of them for a slot without a subject.

    boxes: (B, K, 4) float, xyxy, 0..1 of the image; present: (B, K) bool; height, width: of the latent. Returns
    (B, K, height, width) bool.
    """
    x1, y1, x2, y2 = boxes.float().unsqueeze(-1).unbind(-2)
    column = torch.arange(width, device=boxes.device)
    row = torch.arange(height, device=boxes.device)
    in_columns = (column < x2 * width) & (column + 1 > x1 * width)
    in_rows = (row < y2 * height) & (row + 1 > y1 * height)
    return (in_rows.unsqueeze(-1) & in_columns.unsqueeze(-2)) | ~present[..., None, None]


def cells_of_grid(cells: Tensor, downsampling: int) -> Tensor:
    """`cells_reached`, (B, K, h, w), on a coarser grid, a cell of which is reached where one of its latent pixels is.
    Returns (B, S, K) bool, for S = ceil(h / downsampling) · ceil(w / downsampling) cells in row-major order."""
    pooled = functional.max_pool2d(cells.float(), downsampling, ceil_mode=True)
    return pooled.flatten(2).transpose(1, 2) > 0


def location_mask(boxes: Tensor, present: Tensor, height: int, width: int) -> Tensor:
    """m = ∏ₖ (1 − boxₖ): 1 on the background, 0 inside a box (Subject-Diffusion, location control).

    boxes: (B, K, 4) float, xyxy, 0..1 of the image; present: (B, K) bool; height, width: of the latent.
    Returns (B, 1, height, width) float32. A latent pixel is inside when its center is: nearest resizing.
    """
    x1, y1, x2, y2 = (boxes.float() * present.unsqueeze(-1)).unbind(-1)
    x = (torch.arange(width, device=boxes.device) + 0.5) / width
    y = (torch.arange(height, device=boxes.device) + 0.5) / height
    in_columns = (x >= x1.unsqueeze(-1)) & (x < x2.unsqueeze(-1))
    in_rows = (y >= y1.unsqueeze(-1)) & (y < y2.unsqueeze(-1))
    inside = (in_rows.unsqueeze(-1) & in_columns.unsqueeze(-2)).any(dim=1, keepdim=True)
    return (~inside).float()


class LocationConv(nn.Conv2d):
    """The UNet's first convolution with one more input channel, the location mask, whose weights start at zero."""

    @classmethod
    def like(cls, conv_in: nn.Conv2d) -> LocationConv:
        """The base's convolution, widened by the mask channel."""
        kernel, padding = conv_in.kernel_size, conv_in.padding
        # torch types what a convolution holds as tuples of any length.
        wide = cls(conv_in.in_channels + 1, conv_in.out_channels, kernel, padding=padding)  # type: ignore[arg-type]
        with torch.no_grad():
            wide.weight.zero_()
            wide.weight[:, : conv_in.in_channels] = conv_in.weight
            if wide.bias is not None and conv_in.bias is not None:
                wide.bias.copy_(conv_in.bias)
        return wide

    def forward(self, latents: Tensor, location: Tensor | None = None) -> Tensor:
        """latents: (B, C, H, W); location: (B, 1, H, W), or None for no location: a channel of zeros.

        Two convolutions rather than one over five channels: the sum is the same, and with the mask's weights at zero
        it equals the base's bit for bit, whatever order a kernel sums channels in.
        """
        channels = latents.shape[1]
        features = functional.conv2d(latents, self.weight[:, :channels], self.bias, padding=self.padding)
        if location is None:
            return features
        return features + functional.conv2d(location.to(latents.dtype), self.weight[:, channels:], padding=self.padding)
