"""Going on from weights that were trained with fewer latent channels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

MOMENTS = ("encoder.conv_out", "quant_conv")  # an autoencoder's layers of all means, then all log variances


@torch.no_grad()
def begin_from(model: nn.Module, source: Mapping[str, Tensor]) -> None:
    """Copies `source` into `model`, in place, whose latents may have more channels than those of `source`.

    At first the added channels say nothing to the layers that read latents, and the known ones are as they were. What
    makes the added ones keeps its fresh weights, in an encoder as large as the others': next to latents that are much
    larger, noise would drown theirs.
    """
    state = model.state_dict()
    if state.keys() != source.keys():
        raise ValueError(f"weights of another architecture: {sorted(state.keys() ^ source.keys())[:4]}")
    for name, wide in state.items():
        narrow = source[name].to(wide.dtype)
        moments = name.startswith(MOMENTS)
        rows = _shared(len(wide), len(narrow), moments)
        if wide.ndim == 1:
            wide[rows] = narrow
        else:
            if moments:
                added, known = wide[len(narrow) // 2 : len(wide) // 2], narrow[: len(narrow) // 2]
                added *= known.square().mean().sqrt() / added.square().mean().sqrt()
            wide[rows] = 0
            wide[rows[:, None], _shared(wide.shape[1], narrow.shape[1], moments)] = narrow


def _shared(wide: int, narrow: int, moments: bool) -> Tensor:
    """Where the channels of a layer lie among those of a wider one: in front, of moments in front of either half."""
    if moments and wide != narrow:
        return torch.cat([torch.arange(narrow // 2), wide // 2 + torch.arange(narrow // 2)])
    return torch.arange(narrow)
