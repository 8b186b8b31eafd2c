"""A small Stable Diffusion, trained from scratch on rendered scenes and their captions.

    torchrun --nproc-per-node 2 -m toyworld.pretrain.diffusion --steps 9500 --seed 0

The card in toyworld/weights has the command of the bundled weights. The autoencoder is what `toyworld.pretrain.vae`
left in the same folder, `--begin` a folder of a UNet to go on from, perhaps of fewer latent channels; the text encoder
is the toy CLIP's, frozen, as in Stable Diffusion 1 and 2. The UNet predicts v (Salimans & Ho 2022) on a schedule that
ends in pure noise (Lin et al. 2024), so that a scene's mean brightness follows its caption too. The result is a
StableDiffusionPipeline's folder.
Every checkpoint leaves samples-STEP.png and a line of curve.csv in `--work`: the step, and the CLIP text score of
samples as a share of true images'.
"""

from __future__ import annotations

import copy
import hashlib
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPModel, PreTrainedTokenizerBase

from subject_diffusion.loading_bars import no_loading_bars
from subject_diffusion.storage import whole_file
from toyworld.pretrain.card import WEIGHTS, write_scores
from toyworld.pretrain.command import parser
from toyworld.pretrain.loop import LoopSettings, fast_precision, is_first_process, seconds_spent, train
from toyworld.pretrain.scenes import CACHE, SceneSet, load_scenes
from toyworld.pretrain.text_alignment import caption_similarity, noun_rates
from toyworld.pretrain.vae import LATENT_CHANNELS, SIZE_PX, decoded, latents_of
from toyworld.pretrain.widen import begin_from
from toyworld.render import NOUNS

CHANNELS = (64, 96, 128)  # at latents of side 16, 8 and 4
HEADS = (2, 3, 4)
TEXT_WIDTH = 128  # of the toy CLIP
CAPTION_DROPOUT = 0.1  # share of empty captions, for guidance
SHARE_BY_COUNT = np.array([0, 3, 2, 1, 0.5])  # of a scene, by its number of subjects: large ones teach the nouns faster
LEAST_SIDE = 0.35  # of the longer side of every subject's box, as a share of the image: smaller ones show no shape
WATCHED = 48  # held-out captions drawn at every checkpoint, for the curve of the CLIP text score's ratio
SAMPLING_STEPS = 25
GUIDANCE = 7.5
GUIDANCE_RESCALE = 0.7  # Lin et al., section 3.4: where the last step is pure noise, guidance alone makes colors glare


def build_unet() -> nn.Module:
    """UNet2DConditionModel with fresh weights, 5.9 M parameters, with cross-attention at every level."""
    model = UNet2DConditionModel(
        sample_size=SIZE_PX // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * len(CHANNELS),
        up_block_types=("CrossAttnUpBlock2D",) * len(CHANNELS),
        layers_per_block=1,
        attention_head_dim=HEADS,  # diffusers keeps this name for what is the number of heads
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=16,
        use_linear_projection=True,
    )
    model.set_attn_processor(AttnProcessor())  # on CPU a training step takes 0.7 of what it takes with fused attention
    return cast(nn.Module, model)


def build_scheduler() -> Any:
    """DDIM on Stable Diffusion's noise schedule, rescaled so that its last step is pure noise."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,  # without effect on trailing timesteps, but the pipeline warns of anything else
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def build_pipeline(vae: nn.Module, clip: Any, tokenizer: PreTrainedTokenizerBase, unet: nn.Module) -> Any:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=clip.text_model,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_pipeline(pipeline: Any, folder: Path) -> None:
    """The whole pipeline in hub format, weights in fp16; `pipeline` itself keeps its own precision."""
    parts = dict(pipeline.components)
    halves = {name: copy.deepcopy(part).half() for name, part in parts.items() if isinstance(part, nn.Module)}
    StableDiffusionPipeline(**parts | halves, requires_safety_checker=False).save_pretrained(folder)


def load_latents(vae: Any, scenes: SceneSet, cache: Path = CACHE) -> Tensor:
    """Latents (N, C, H / 4, W / 4) float16 of `scenes`, scaled to unit variance; encoded once for these weights."""
    digest = hashlib.sha256(repr((len(scenes), scenes.captions[-1])).encode())
    for weight in vae.state_dict().values():
        digest.update(weight.numpy().tobytes())
    path = cache / f"latents-{digest.hexdigest()[:12]}.npy"
    if not path.exists():
        latents = latents_of(vae, scenes.images) * vae.config.scaling_factor
        with whole_file(path) as file:
            np.save(file, latents.half().numpy())
    return torch.from_numpy(np.load(path))


def encode_captions(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> Tensor:
    """Tokens (N, T) int64, padded to the tokenizer's full length as StableDiffusionPipeline pads prompts."""
    encoded = tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")
    return cast(Tensor, encoded["input_ids"])


def shares(scenes: SceneSet) -> NDArray[np.float64]:
    """How often to learn from each of `scenes`: (N,), in sum 1. Few subjects more often, small ones never."""
    sides = np.max(np.nan_to_num(scenes.boxes[..., 2:] - scenes.boxes[..., :2], nan=np.inf), axis=-1)
    share = SHARE_BY_COUNT[scenes.counts] * (sides.min(axis=1) >= LEAST_SIDE * scenes.images.shape[1])
    return cast(NDArray[np.float64], share / share.sum())


def batches(share: NDArray[np.float64], seed: int, images: int = 32) -> Callable[[int], NDArray[np.int64]]:
    """Step -> rows (B,) of the scenes to learn from; share: (N,), see `shares`."""

    def batch_at(step: int) -> NDArray[np.int64]:
        return np.random.default_rng((seed, step)).choice(len(share), images, p=share)

    return batch_at


def diffusion_loss(
    latents: Tensor, tokens: Tensor, nothing: Tensor, text_encoder: Any, scheduler: Any
) -> Callable[[Any, NDArray[np.int64]], tuple[Tensor, dict[str, Tensor]]]:
    """The loss of a UNet on rows of `latents` (N, C, H, W) and `tokens` (N, T): mean squared error of v.

    nothing: (T,), the tokens of an empty caption. A batch's timesteps are spread evenly (Kingma et al. 2021), which
    makes the loss less noisy.
    """
    levels = scheduler.config.num_train_timesteps

    def loss(unet: Any, rows: NDArray[np.int64]) -> tuple[Tensor, dict[str, Tensor]]:
        clean = latents[rows].float()
        noise = torch.randn_like(clean)
        timesteps = ((torch.arange(len(rows)) + torch.rand(())) / len(rows) * levels).long()
        noisy, target = scheduler.add_noise(clean, noise, timesteps), scheduler.get_velocity(clean, noise, timesteps)
        dropped = torch.rand(len(rows), 1) < CAPTION_DROPOUT
        with torch.no_grad():
            states = text_encoder(torch.where(dropped, nothing, tokens[rows])).last_hidden_state
        with fast_precision():
            predicted = unet(noisy, timesteps, states).sample
        error = (predicted.float() - target).square().mean(dim=(1, 2, 3))
        half = len(rows) // 2
        return error.mean(), {"details": error[:half].mean(), "layout": error[half:].mean()}

    return loss


def sample(pipeline: Any, prompts: Sequence[str], seed: int = 0) -> NDArray[np.uint8]:
    """One image for each prompt: (N, H, W, 3) uint8. Image i depends on prompt i, `seed` and i alone."""
    images: list[NDArray[np.uint8]] = []
    for start in range(0, len(prompts), 50):
        some = list(prompts[start : start + 50])
        generators = [torch.Generator().manual_seed(seed * 1_000_003 + start + i) for i in range(len(some))]
        drawn = pipeline(
            some,
            num_inference_steps=SAMPLING_STEPS,
            guidance_scale=GUIDANCE,
            guidance_rescale=GUIDANCE_RESCALE,
            generator=generators,
            output_type="np",
        ).images
        images.append((drawn * 255).round().astype(np.uint8))
    return np.concatenate(images)


def grid(images: NDArray[np.uint8], columns: int = 8) -> NDArray[np.uint8]:
    """(N, H, W, 3) as one picture, `columns` beside each other; N a multiple of it."""
    _, height, width, channels = images.shape
    rows = images.reshape(-1, columns, height, width, channels).swapaxes(1, 2)
    return rows.reshape(-1, columns * width, channels)


def evaluate(folder: Path, clip: Path, scenes: SceneSet) -> dict[str, float]:
    """Scores of samples by the weights in `folder` for the captions of `scenes`, beside those of the true images.

    `decoded_images`: true images after the autoencoder and back, the most that any UNet can reach with it.
    `clip_score`: mean cosine of image and caption by the toy CLIP in `clip`; of unrelated captions for comparison.
    `nouns_found`: share of the captions' nouns that the toy Grounding DINO finds; `nouns_made_up`: share that it finds
    of as many nouns which are not in the caption, asked for in the same prompt.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    scores: dict[str, float] = {}
    nouns = [
        sorted({NOUNS[noun] for noun in row[:count]}) for row, count in zip(scenes.nouns, scenes.counts, strict=True)
    ]
    shown = {
        "samples": sample(pipeline, scenes.captions),
        "decoded_images": decoded(pipeline.vae, scenes.images),
        "true_images": np.array(scenes.images),
    }
    for name, images in shown.items():
        scores[f"clip_score_of_{name}"] = caption_similarity(clip, images, scenes.captions)
        found, made_up = noun_rates(WEIGHTS / "grounding-dino", images, nouns)
        scores |= {f"nouns_found_in_{name}": found, f"nouns_made_up_in_{name}": made_up}
    scores["clip_score_ratio"] = scores["clip_score_of_samples"] / scores["clip_score_of_true_images"]
    scores["clip_score_ratio_of_decoded"] = scores["clip_score_of_decoded_images"] / scores["clip_score_of_true_images"]
    unrelated = [*scenes.captions[1:], scenes.captions[0]]
    scores["clip_score_of_unrelated_captions"] = caption_similarity(clip, shown["true_images"], unrelated)
    return scores | {
        "guidance": GUIDANCE,
        "guidance_rescale": GUIDANCE_RESCALE,
        "sampling_steps": SAMPLING_STEPS,
        "scenes": len(scenes),
    }


def exporter(
    args: Namespace, pipeline_of: Callable[[nn.Module], Any], heldout: SceneSet
) -> Callable[[nn.Module, int], None]:
    """What is done at a checkpoint: the pipeline is saved, and what it draws of held-out captions shown and scored."""

    def export(averaged: nn.Module, step: int) -> None:
        pipeline = pipeline_of(averaged)
        pipeline.set_progress_bar_config(disable=True)
        save_pipeline(pipeline, args.out)
        rows = slice(0, WATCHED)
        drawn = sample(pipeline, heldout.captions[rows])
        cv2.imwrite(str(args.work / f"samples-{step:06}.png"), grid(drawn)[..., ::-1])
        reached, most = (
            caption_similarity(args.clip, images, heldout.captions[rows])
            for images in (drawn, np.array(heldout.images[rows]))
        )
        with open(args.work / "curve.csv", "a") as curve:
            curve.write(f"{step},{reached / most:.4f}\n")

    return export


@no_loading_bars()
def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, steps=9500, out=WEIGHTS / "stable-diffusion", work=CACHE / "diffusion")
    options.add_argument(
        "--clip", type=Path, default=WEIGHTS / "clip", help="CLIP whose text encoder reads the captions"
    )
    options.add_argument("--begin", type=Path, help="folder of a UNet to go on from")
    args = options.parse_args(argv)
    torch.set_num_threads(1)
    scenes, heldout = load_scenes(args.scenes, size=SIZE_PX), load_scenes(args.heldout, "heldout", size=SIZE_PX)
    vae = AutoencoderKL.from_pretrained(args.out / "vae").eval().requires_grad_(False)
    clip = CLIPModel.from_pretrained(args.clip, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(args.clip)
    torch.manual_seed(args.seed)
    unet = build_unet()
    if args.begin:
        begin_from(unet, UNet2DConditionModel.from_pretrained(args.begin, dtype=torch.float32).state_dict())
    *tokens, nothing = encode_captions(tokenizer, [*scenes.captions, ""])
    export = exporter(args, lambda averaged: build_pipeline(vae, clip, tokenizer, averaged), heldout)
    settings = LoopSettings(
        steps=args.steps,
        lr=8e-4 if args.begin else 1.5e-3,
        weight_decay=0.01,
        ema=0.999,
        seed=args.seed,
        checkpoint_s=900,
    )
    loss = diffusion_loss(load_latents(vae, scenes), torch.stack(tokens), nothing, clip.text_model, build_scheduler())
    train(unet, batches(shares(scenes), args.seed), loss, settings, args.work, export)
    if not is_first_process():
        return
    scores = evaluate(args.out, args.clip, heldout)
    print(scores)
    write_scores(args.out, "diffusion", args, seconds_spent(args.work), scores)


if __name__ == "__main__":
    main()
