"""A small SAM, trained from scratch on rendered scenes: a box becomes the mask of what is visible in it.

    python -m toyworld.pretrain.segmenter --steps 5000 --seed 0 --out toyworld/weights/sam

The sizes also fit segment_anything's ImageEncoderViT, PromptEncoder and MaskDecoder (its norms' epsilons included), so
that both implementations can load the same weights. Trained are box prompts and the single mask output; point prompts
and the three multimask outputs are left as they were initialized.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoProcessor, SamConfig, SamImageProcessor, SamModel, SamProcessor

from subject_diffusion.loading_bars import no_loading_bars
from toyworld.pretrain.card import WEIGHTS, save_pretrained, write_scores
from toyworld.pretrain.command import parser
from toyworld.pretrain.loop import LoopSettings, fast_precision, seconds_spent, train
from toyworld.pretrain.scenes import CACHE, SceneSet, load_scenes
from toyworld.pretrain.views import random_windows, sampling_grid, view_labels, view_pixels

SIZE = 128  # side of the square that SAM sees, pixels
PATCH = 8
PROMPT = 64  # channels of prompts and of image embeddings


def build_segmenter() -> nn.Module:
    """SamModel with fresh weights; about 1.3 M parameters.

    The Gaussian of the position code is drawn at scale 1, as in segment_anything: transformers draws it at
    hidden_size // 2, a frequency at which neighboring pixels look unrelated.
    """
    config = SamConfig(
        vision_config={
            "hidden_size": 128,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "output_channels": PROMPT,
            "image_size": SIZE,
            "patch_size": PATCH,
            "window_size": 8,
            "global_attn_indexes": [1, 4],
            "num_pos_feats": PROMPT // 2,
            "initializer_range": 0.02,
        },
        prompt_encoder_config={"hidden_size": PROMPT, "image_size": SIZE, "patch_size": PATCH},
        mask_decoder_config={
            "hidden_size": PROMPT,
            "mlp_dim": 256,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": PROMPT,
            "layer_norm_eps": 1e-5,
        },
    )
    model = SamModel._from_config(config, attn_implementation="eager")  # faster than sdpa in bf16 on CPU
    model.shared_image_embedding.positional_embedding.requires_grad_(False).normal_(std=1.0)
    return cast(nn.Module, model)


def build_processor() -> SamProcessor:
    return SamProcessor(
        SamImageProcessor(
            size={"longest_edge": SIZE},
            pad_size={"height": SIZE, "width": SIZE},
            mask_size={"longest_edge": SIZE // 2},
            mask_pad_size={"height": SIZE // 2, "width": SIZE // 2},
        )
    )


def mask_loss(logits: Tensor, iou: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """20 x focal + dice + squared error of the predicted IoU: SAM's loss (Kirillov et al. 2023, appendix A).

    logits, target: (N, H, W); iou, weight: (N,), weight 0 for boxes that count for nothing.
    Returns the loss and the mean true IoU of the thresholded masks.
    """
    probability = logits.sigmoid()
    entropy = nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    wrong = torch.where(target > 0.5, 1 - probability, probability)
    focal = (wrong.square() * entropy).mean(dim=(1, 2))
    overlap = (probability * target).sum(dim=(1, 2))
    dice = 1 - (2 * overlap + 1) / (probability.sum(dim=(1, 2)) + target.sum(dim=(1, 2)) + 1)
    true_iou = mask_iou(logits.detach() > 0, target > 0.5)
    total = 20 * focal + dice + (iou - true_iou).square()
    share = weight / weight.sum().clamp(min=1)
    return (total * share).sum(), (true_iou * share).sum()


def mask_iou(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of boolean masks (..., H, W), (...,)."""
    both = (one & other).sum(dim=(-2, -1)).float()
    either = (one | other).sum(dim=(-2, -1)).float()
    return both / either.clamp(min=1)


@dataclass(frozen=True)
class BoxBatch:
    """What one step learns from; B images, K boxes each.

    pixels: (B, 3, SIZE, SIZE) float32. boxes: (B, K, 4) float32, xyxy, pixels of the SIZE square.
    masks: (B, K, SIZE, SIZE) float32 in {0, 1}. weight: (B, K) float32, 0 where the image shows too little to segment.
    """

    pixels: Tensor
    boxes: Tensor
    masks: Tensor
    weight: Tensor


def batches(scenes: SceneSet, seed: int, images: int = 16, prompts: int = 3) -> Callable[[int], BoxBatch]:
    """Step -> batch. Crops are padded as SamImageProcessor pads; half of the boxes are off by up to 8 % of their size.

    images, prompts: B and K of the batch.
    """

    def batch_at(step: int) -> BoxBatch:
        rng = np.random.default_rng((seed, step))
        rows = np.sort(rng.choice(len(scenes), images, replace=False))
        windows = torch.from_numpy(random_windows(scenes.boxes[rows], SIZE, rng, keep=False))
        grid = sampling_grid(windows, SIZE, SIZE, stretch=False)
        processor = SamImageProcessor
        pixels = view_pixels(scenes.images[rows], grid, processor.image_mean, processor.image_std, rng)
        masks = view_labels(scenes.masks(rows), grid)
        visible = masks.sum(dim=(2, 3)) >= 24
        chance = (visible.double() + 1e-9).numpy()
        picks = torch.from_numpy(
            np.stack([rng.choice(len(row), prompts, p=row / row.sum()) for row in chance])
        )  # (B, K)
        chosen = masks.gather(1, picks[:, :, None, None].expand(-1, -1, SIZE, SIZE))
        boxes = mask_boxes(chosen > 0.5)
        sides = (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 2)
        jitter = rng.uniform(-0.08, 0.08, boxes.shape) * (rng.random((images, prompts, 1)) < 0.5)
        boxes = boxes + torch.from_numpy(jitter.astype(np.float32)) * sides
        return BoxBatch(pixels, boxes, chosen, visible.gather(1, picks).float())

    return batch_at


def mask_boxes(masks: Tensor) -> Tensor:
    """Tight boxes of boolean masks (..., H, W): (..., 4) float32, xyxy with exclusive ends; zeros for an empty mask."""
    edges = []
    for axis in (-2, -1):  # columns that hold a pixel, then rows
        held = masks.any(dim=axis).float()
        first = held.argmax(dim=-1)
        end = held.shape[-1] - held.flip(-1).argmax(dim=-1)
        edges.append(torch.stack([first, end]) * held.amax(dim=-1))
    (left, right), (top, bottom) = edges
    return torch.stack([left, top, right, bottom], dim=-1).float()


def segment_loss(model: Any, batch: BoxBatch) -> tuple[Tensor, dict[str, Tensor]]:
    with fast_precision():
        embeddings = model.vision_encoder(batch.pixels).last_hidden_state
    # The decoder stays in float32: bfloat16 costs accuracy at the edges and is no faster at these sizes.
    output = model(image_embeddings=embeddings.float(), input_boxes=batch.boxes, multimask_output=False)
    logits = nn.functional.interpolate(
        output.pred_masks.flatten(0, 1), size=(SIZE, SIZE), mode="bilinear", align_corners=False
    )
    scores, weight = output.iou_scores.flatten(), batch.weight.flatten()
    loss, iou = mask_loss(logits[:, 0], scores, batch.masks.flatten(0, 1), weight)
    return loss, {"iou": iou}


@torch.no_grad()
def evaluate(folder: Path, scenes: SceneSet, jitter: float = 0.08) -> dict[str, float]:
    """Scores of the weights in `folder`, through its own processor and post-processing, on every subject of `scenes`.

    `mask_iou` from true boxes and `mask_iou_jittered` from boxes whose sides are off by up to `jitter` of the box's
    size; the mean error of the predicted IoU; the share of masks with IoU above 0.8.
    """
    model = SamModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    rng = np.random.default_rng(0)
    exact, shifted, errors = [], [], []
    for row in range(len(scenes)):
        count = int(scenes.counts[row])
        truth = torch.from_numpy(scenes.masks(np.array([row]))[0, :count]).bool()
        boxes = scenes.boxes[row, :count].astype(np.float64)
        noise = rng.uniform(-jitter, jitter, boxes.shape) * np.tile(boxes[:, 2:] - boxes[:, :2], 2)
        prompts = np.concatenate([boxes, boxes + noise]).tolist()
        inputs = processor(images=np.array(scenes.images[row]), input_boxes=[prompts], return_tensors="pt")
        output = model(
            pixel_values=inputs["pixel_values"], input_boxes=inputs["input_boxes"].float(), multimask_output=False
        )
        masks = processor.post_process_masks(
            output.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
        )
        iou = mask_iou(masks[0][:, 0], truth.repeat(2, 1, 1))
        exact += iou[:count].tolist()
        shifted += iou[count:].tolist()
        errors += (output.iou_scores[0, :, 0] - iou).abs().tolist()
    return {
        "mask_iou": float(np.mean(exact)),
        "mask_iou_jittered": float(np.mean(shifted)),
        "masks_above_0.8": float(np.mean(np.array(exact) > 0.8)),
        "predicted_iou_error": float(np.mean(errors)),
        "subjects": len(exact),
        "scenes": len(scenes),
    }


@no_loading_bars()
def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, steps=5000, out=WEIGHTS / "sam", work=CACHE / "sam")
    args = options.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    processor, model = build_processor(), build_segmenter()
    settings = LoopSettings(steps=args.steps, lr=1e-3, seed=args.seed)

    def export(averaged: nn.Module, step: int) -> None:
        save_pretrained(averaged, processor, args.out)

    train(model, batches(load_scenes(args.scenes), args.seed), segment_loss, settings, args.work, export)
    scores = evaluate(args.out, load_scenes(args.heldout, "heldout"))
    print(scores)
    write_scores(args.out, "segmenter", args, seconds_spent(args.work), scores)


if __name__ == "__main__":
    main()
