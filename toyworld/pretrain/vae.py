"""The autoencoder of the small Stable Diffusion, trained from scratch on rendered scenes.

    python -m toyworld.pretrain.vae --steps 10000 --decoder-steps 6000 --seed 0 --out out/stable-diffusion

AutoencoderKL as Stable Diffusion's, but four times smaller on each side, not eight: images are of 64 px, and stripes
and dots of their subjects have a period of a few pixels. `--begin` goes on from an autoencoder that is there already,
of as many latent channels or fewer. The card in toyworld/weights has the command of the bundled weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn

from subject_diffusion.loading_bars import no_loading_bars
from toyworld.pretrain.card import WEIGHTS, save_half, write_scores
from toyworld.pretrain.command import parser
from toyworld.pretrain.loop import LoopSettings, fast_precision, is_first_process, seconds_spent, train
from toyworld.pretrain.perception import Perception
from toyworld.pretrain.scenes import CACHE, SceneSet, load_scenes
from toyworld.pretrain.widen import begin_from

CHANNELS = (16, 32, 64)  # at 1, 1/2 and 1/4 of the image's side
LATENT_CHANNELS = 16  # with 4, round trips lose a quarter of the CLIP text score, with 8 a twelfth
SIZE_PX = 64
"""Side of the images. Of 128 px, latents of the same size (8 times smaller, 16 channels) keep 0.53 of the CLIP text
score after five minutes' training on one core, of 64 px 0.70, and CLIP sees no more in the larger ones."""
KL_WEIGHT = 1e-6  # as Stable Diffusion's: it only keeps the latents' scale from drifting
LATENT_NOISE = 0.2  # most of it in training, in standard deviations: details that a UNet cannot predict count less
DECODER_NOISE = 0.1  # the same while the decoder alone is trained: some of what a UNet gets wrong
SUBJECT_WEIGHT = 3.0  # of an error on a subject's pixel, against 1 on the background's, whose grain no latent can hold
SUBJECT_SHARE = 0.3  # of all pixels, about
PERCEPTUAL_WEIGHT = 0.5  # of the distance that a recognizing network sees, see `Perception`
HALVED_WEIGHT = 0.25  # of halved latents' decoding to the halved image (Skorokhodov et al. 2025, arXiv 2502.14831)


def build_vae() -> nn.Module:
    """AutoencoderKL with fresh weights, 0.6 M parameters."""
    model = AutoencoderKL(
        block_out_channels=CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * len(CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(CHANNELS),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=2,  # more would hide the image's mean color from the last layer
        mid_block_add_attention=False,
        sample_size=SIZE_PX,
    )
    _begin_simply(model)
    return cast(nn.Module, model)


@torch.no_grad()
def _begin_simply(vae: Any) -> None:
    """Orthogonal convolutions, residual branches at zero, latents without noise.

    From diffusers' own start it still paints in two colors after 500 steps; from this one, in all.
    """
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight) if name.endswith("conv2") else nn.init.orthogonal_(module.weight)
            nn.init.zeros_(cast(Tensor, module.bias))
    vae.quant_conv.weight[LATENT_CHANNELS:] = 0
    vae.quant_conv.bias[LATENT_CHANNELS:] = -6


@dataclass(frozen=True)
class Pictures:
    """pixels: (B, 3, H, W) float32 in -1..1. weight: (B, 1, H, W) float32, of a pixel's error, about 1 on average."""

    pixels: Tensor
    weight: Tensor


def batches(scenes: SceneSet, seed: int, images: int = 4) -> Callable[[int], Pictures]:
    """Step -> scenes, half of them mirrored."""

    def batch_at(step: int) -> Pictures:
        rng = np.random.default_rng((seed, step))
        rows = np.sort(rng.choice(len(scenes), images, replace=False))
        pixels = to_pixels(scenes.images[rows])
        shown = torch.from_numpy(scenes.masks(rows)).amax(dim=1, keepdim=True).float()
        weight = (1 + (SUBJECT_WEIGHT - 1) * shown) / (1 + (SUBJECT_WEIGHT - 1) * SUBJECT_SHARE)
        mirrored = torch.from_numpy(rng.random(images) < 0.5)[:, None, None, None]
        return Pictures(*(torch.where(mirrored, each.flip(-1), each) for each in (pixels, weight)))

    return batch_at


def to_pixels(images: NDArray[np.uint8]) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float32 in -1..1."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


Loss = Callable[[Any, Pictures], tuple[Tensor, dict[str, Tensor]]]


def vae_loss(perception: Perception) -> Loss:
    """`painting_loss` of whole and of halved latents, the distance by `perception`, and the KL divergence.

    Latents that decode at half their size too, and under noise, are smooth, and a UNet learns them faster.
    """
    pool = nn.functional.avg_pool2d

    def loss(model: Any, batch: Pictures) -> tuple[Tensor, dict[str, Tensor]]:
        with fast_precision():
            posterior = model.encode(batch.pixels).latent_dist
            latents = posterior.sample()
            decoded = model.decode(_noisy(latents, LATENT_NOISE)).sample
            halved = model.decode(pool(latents, 2)).sample
            seen = perception(decoded, batch.pixels)
        whole = painting_loss(decoded.float(), batch.pixels, batch.weight)
        half = painting_loss(halved.float(), pool(batch.pixels, 2), pool(batch.weight, 2))
        divergence = posterior.kl().float().mean() / batch.pixels[0, 0].numel()
        total = whole + PERCEPTUAL_WEIGHT * seen + HALVED_WEIGHT * half + KL_WEIGHT * divergence
        return total, {"whole": whole, "half": half, "seen": seen, "kl": divergence}

    return loss


def decoder_loss(perception: Perception) -> Loss:
    """The first two of these alone: once the latents are settled, all of the decoder's power goes into whole images."""

    def loss(model: Any, batch: Pictures) -> tuple[Tensor, dict[str, Tensor]]:
        with fast_precision():
            with torch.no_grad():
                latents = model.encode(batch.pixels).latent_dist.mean
            decoded = model.decode(_noisy(latents, DECODER_NOISE)).sample
            seen = perception(decoded, batch.pixels)
        whole = painting_loss(decoded.float(), batch.pixels, batch.weight)
        return whole + PERCEPTUAL_WEIGHT * seen, {"whole": whole, "seen": seen}

    return loss


def _noisy(latents: Tensor, most: float) -> Tensor:
    """Latents (B, C, H, W) with noise of each image's own strength, `most` standard deviations at most."""
    strength = most * torch.rand(len(latents), 1, 1, 1) * latents.detach().float().std()
    return latents + strength * torch.randn_like(latents)


def painting_loss(one: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    """`pyramid_loss` plus `edge_loss` of two images (B, C, H, W), their pixels weighted by (B, 1, H, W)."""
    return pyramid_loss(one, other, weight) + edge_loss(one, other, weight)


def pyramid_loss(one: Tensor, other: Tensor, weight: Tensor, levels: int = 4) -> Tensor:
    """Mean squared differences of two images (B, C, H, W) at full size, halved, and so on `levels` times, in sum.

    Squared, for absolute ones are content with the two commonest colors; the background's grain averages out at the
    coarse levels.
    """
    pool = nn.functional.avg_pool2d
    scales = [2**level for level in range(levels)]
    return torch.stack([(pool(one - other, s).square() * pool(weight, s)).mean() for s in scales]).sum()


def edge_loss(one: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    """Mean absolute difference of two images' (B, C, H, W) gradients, across and down."""
    gap = one - other
    across, down = gap.diff(dim=-1).abs() * weight[..., 1:], gap.diff(dim=-2).abs() * weight[..., 1:, :]
    return across.mean() + down.mean()


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


@no_loading_bars()
def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, steps=10_000, out=WEIGHTS / "stable-diffusion", work=CACHE / "vae")
    options.add_argument("--decoder-steps", type=int, default=6000, help="after that, of the decoder alone")
    options.add_argument("--begin", type=Path, help="folder of an autoencoder to go on from")
    args = options.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    model: Any = build_vae()
    if args.begin:
        begin_from(model, AutoencoderKL.from_pretrained(args.begin, dtype=torch.float32).state_dict())
    perception = Perception()
    scenes, folder = load_scenes(args.scenes, size=SIZE_PX), args.out / "vae"

    def export(averaged: Any, step: int) -> None:
        spread = latents_of(averaged, scenes.images[:500]).std()
        averaged.register_to_config(scaling_factor=round(1 / float(spread), 4))
        save_half(averaged, folder)

    settings = LoopSettings(steps=args.steps, lr=1e-3 if args.begin else 2e-3, seed=args.seed)
    model = train(model, batches(scenes, args.seed), vae_loss(perception), settings, args.work, export)
    for part in (model.decoder, model.post_quant_conv):
        part.requires_grad_(True)
    settings = LoopSettings(steps=args.decoder_steps, lr=1e-3, seed=args.seed)
    train(model, batches(scenes, args.seed + 1), decoder_loss(perception), settings, args.work / "decoder", export)
    if not is_first_process():
        return
    scores = evaluate(folder, load_scenes(args.heldout, "heldout", size=SIZE_PX))
    print(scores)
    spent_s = seconds_spent(args.work) + seconds_spent(args.work / "decoder")
    write_scores(folder, "vae", args, spent_s, scores)


if __name__ == "__main__":
    main()
