"""The autoencoder of the small Stable Diffusion, trained from scratch on rendered scenes.

    python -m toyworld.pretrain.vae --steps 10000 --decoder-steps 6000 --seed 0 --out toyworld/weights/stable-diffusion

AutoencoderKL as Stable Diffusion's, but four times smaller on each side, not eight: images are of 64 px, and stripes
and dots of their subjects have a period of a few pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn

from toyworld.pretrain.card import WEIGHTS, save_half, write_scores
from toyworld.pretrain.command import parser
from toyworld.pretrain.loop import LoopSettings, seconds_spent, train
from toyworld.pretrain.scenes import CACHE, SceneSet, load_scenes

CHANNELS = (16, 32, 64)  # at 1, 1/2 and 1/4 of the image's side
LATENT_CHANNELS = 8  # with 4, round trips lose stripes, dots and faces, and a quarter of the CLIP text score
SIZE_PX = 64
"""Side of the images: a UNet for larger ones learns to draw too slowly on a CPU."""
KL_WEIGHT = 1e-6  # as Stable Diffusion's: it only keeps the latents' scale from drifting
LATENT_NOISE = 0.4  # most of it in training, in standard deviations: details that a UNet cannot predict count less
DECODER_NOISE = 0.2  # the same while the decoder alone is trained: some of what a UNet gets wrong
HALVED_WEIGHT = 0.25  # of halved latents' decoding to the halved image (Skorokhodov et al. 2025, arXiv 2502.14831)


def build_vae() -> nn.Module:
    """AutoencoderKL with fresh weights, 0.6 M parameters."""
    model = AutoencoderKL(
        block_out_channels=CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * len(CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(CHANNELS),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=2,  # more would hide the image's mean colour from the last layer
        mid_block_add_attention=False,
        sample_size=SIZE_PX,
    )
    _begin_simply(model)
    return cast(nn.Module, model)


@torch.no_grad()
def _begin_simply(vae: Any) -> None:
    """Orthogonal convolutions, residual branches at zero, latents without noise.

    From diffusers' own start it still paints in two colours after 500 steps; from this one, in all.
    """
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight) if name.endswith("conv2") else nn.init.orthogonal_(module.weight)
            nn.init.zeros_(cast(Tensor, module.bias))
    vae.quant_conv.weight[LATENT_CHANNELS:] = 0
    vae.quant_conv.bias[LATENT_CHANNELS:] = -6


def batches(scenes: SceneSet, seed: int, images: int = 4) -> Callable[[int], Tensor]:
    """Step -> (B, 3, H, W) float32 in -1..1, half of them mirrored."""

    def batch_at(step: int) -> Tensor:
        rng = np.random.default_rng((seed, step))
        pixels = to_pixels(scenes.images[np.sort(rng.choice(len(scenes), images, replace=False))])
        mirrored = torch.from_numpy(rng.random(images) < 0.5)
        return torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)

    return batch_at


def to_pixels(images: NDArray[np.uint8]) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float32 in -1..1."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def vae_loss(model: Any, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared error at four scales and absolute error of edges, of whole and of halved latents, plus the KL divergence.

    Latents that decode at half their size too, and under noise, are smooth, and a UNet learns them faster.
    """
    pool = nn.functional.avg_pool2d
    with torch.autocast("cpu", torch.bfloat16):
        posterior = model.encode(pixels).latent_dist
        latents = posterior.sample()
        strength = LATENT_NOISE * torch.rand(len(pixels), 1, 1, 1) * latents.detach().float().std()
        decoded = model.decode(latents + strength * torch.randn_like(latents)).sample
        halved = model.decode(pool(latents, 2)).sample
    whole, half = painting_loss(decoded.float(), pixels), painting_loss(halved.float(), pool(pixels, 2))
    divergence = posterior.kl().float().mean() / pixels[0, 0].numel()
    loss = whole + HALVED_WEIGHT * half + KL_WEIGHT * divergence
    return loss, {"whole": whole, "half": half, "kl": divergence}


def decoder_loss(model: Any, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """`painting_loss` alone: once the latents are settled, all of the decoder's power goes into whole images."""
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            latents = model.encode(pixels).latent_dist.mean
        strength = DECODER_NOISE * torch.rand(len(pixels), 1, 1, 1) * latents.float().std()
        decoded = model.decode(latents + strength * torch.randn_like(latents)).sample
    return painting_loss(decoded.float(), pixels), {}


def painting_loss(one: Tensor, other: Tensor) -> Tensor:
    """`pyramid_loss` plus `edge_loss` of two images (B, C, H, W)."""
    return pyramid_loss(one, other) + edge_loss(one, other)


def pyramid_loss(one: Tensor, other: Tensor, levels: int = 4) -> Tensor:
    """Mean squared differences of two images (B, C, H, W) at full size, halved, and so on `levels` times, in sum.

    Squared, for absolute ones are content with the two commonest colours; the background's grain averages out at the
    coarse levels.
    """
    gap = one - other
    return torch.stack([nn.functional.avg_pool2d(gap, 2**level).square().mean() for level in range(levels)]).sum()


def edge_loss(one: Tensor, other: Tensor) -> Tensor:
    """Mean absolute difference of two images' (B, C, H, W) gradients, across and down."""
    gap = one - other
    return gap.diff(dim=-1).abs().mean() + gap.diff(dim=-2).abs().mean()


@torch.no_grad()
def latents_of(vae: Any, images: NDArray[np.uint8]) -> Tensor:
    """Means of the latents of images (N, H, W, 3) uint8: (N, LATENT_CHANNELS, H / 4, W / 4) float32, not yet scaled."""
    parts = [vae.encode(to_pixels(images[start : start + 50])).latent_dist.mean for start in range(0, len(images), 50)]
    return torch.cat(parts)


@torch.no_grad()
def decoded(vae: Any, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images (N, H, W, 3) uint8 after the autoencoder and back."""
    parts = [vae.decode(some).sample for some in torch.split(latents_of(vae, images), 50)]
    pixels = (torch.cat(parts).clamp(-1, 1) + 1) * 127.5
    return pixels.round().byte().permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def evaluate(folder: Path, scenes: SceneSet) -> dict[str, float]:
    """PSNR in dB of what the weights in `folder` make of `scenes`: of whole images, and of subjects' pixels alone."""
    vae = AutoencoderKL.from_pretrained(folder, dtype=torch.float32).eval()
    whole, subjects = [], []
    for start in range(0, len(scenes), 50):
        rows = np.arange(start, min(start + 50, len(scenes)))
        decoded = vae.decode(latents_of(vae, scenes.images[rows])).sample.clamp(-1, 1)
        error = ((decoded - to_pixels(scenes.images[rows])) / 2).square().mean(dim=1)
        shown = torch.from_numpy(scenes.masks(rows)).amax(dim=1).bool()
        whole.append(error.mean(dim=(1, 2)))
        subjects.append((error * shown).sum(dim=(1, 2)) / shown.sum(dim=(1, 2)))
    return {
        "psnr_db": float(-10 * torch.cat(whole).log10().mean()),
        "psnr_db_of_subjects": float(-10 * torch.cat(subjects).log10().mean()),
        "scenes": len(scenes),
    }


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, steps=10_000, out=WEIGHTS / "stable-diffusion", work=CACHE / "vae")
    options.add_argument("--decoder-steps", type=int, default=6000, help="after that, of the decoder alone")
    args = options.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    model: Any = build_vae()
    scenes, folder = load_scenes(args.scenes, size=SIZE_PX), args.out / "vae"

    def export(averaged: Any, step: int) -> None:
        spread = latents_of(averaged, scenes.images[:500]).std()
        averaged.register_to_config(scaling_factor=round(1 / float(spread), 4))
        save_half(averaged, folder)

    settings = LoopSettings(steps=args.steps, lr=2e-3, seed=args.seed)
    model = train(model, batches(scenes, args.seed), vae_loss, settings, args.work, export)
    for part in (model.decoder, model.post_quant_conv):
        part.requires_grad_(True)
    settings = LoopSettings(steps=args.decoder_steps, lr=1e-3, seed=args.seed)
    train(model, batches(scenes, args.seed + 1), decoder_loss, settings, args.work / "decoder", export)
    scores = evaluate(folder, load_scenes(args.heldout, "heldout", size=SIZE_PX))
    print(scores)
    spent_s = seconds_spent(args.work) + seconds_spent(args.work / "decoder")
    write_scores(folder, "vae", args, spent_s, scores)


if __name__ == "__main__":
    main()
