"""A small Grounding DINO, trained from scratch on rendered scenes.

    python -m toyworld.pretrain.grounding --steps 4500 --seed 0

The architecture is the hub's, with every option of the original Swin-T config, so that groundingdino-py can hold the
same weights. What makes it learn within an hour on a CPU is used in training only: a backbone that first learns to name
what lies under each of its cells, the same naming at the encoder's output, supervision of every encoder token, and
queries that begin at disturbed true boxes (Li et al. 2022, DN-DETR).
"""

from __future__ import annotations

import argparse
import copy
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertTokenizerFast,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
)

from subject_diffusion.loading_bars import no_loading_bars
from toyworld.pretrain.card import WEIGHTS, save_pretrained, write_scores
from toyworld.pretrain.command import parser
from toyworld.pretrain.detection_loss import decoder_loss, encoder_loss, match, overlap, token_worth
from toyworld.pretrain.grounding_batch import CELL, GroundingBatch, batch_drawer
from toyworld.pretrain.loop import LoopSettings, fast_precision, seconds_spent, train
from toyworld.pretrain.scenes import CACHE, MOST, SceneSet, load_scenes
from toyworld.pretrain.vocabulary import build_tokenizer
from toyworld.render import NOUNS

STRIDES = (CELL, 2 * CELL, 4 * CELL)  # of the three feature levels
GROUPS = 3  # groups of disturbed queries
THRESHOLD = 0.3

_WIDTH = 128
_SWIN = {
    "model_type": "swin",
    "patch_size": 8,
    "embed_dim": 48,
    "depths": [2, 4, 2, 1],
    "num_heads": [2, 4, 8, 16],
    "mlp_ratio": 2.0,
    "window_size": 4,
    "image_size": 128,
    "drop_path_rate": 0.0,
    "out_indices": [2, 3, 4],
}
_BERT = {
    "model_type": "bert",
    "hidden_size": _WIDTH // 2,
    "intermediate_size": _WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def build_grounder(tokenizer: BertTokenizerFast) -> nn.Module:
    """GroundingDinoForObjectDetection with fresh weights, 4.0 M parameters."""
    config = GroundingDinoConfig(
        backbone_config=dict(_SWIN),
        text_config={**_BERT, "vocab_size": len(tokenizer)},
        d_model=_WIDTH,
        encoder_layers=2,
        encoder_ffn_dim=2 * _WIDTH,
        encoder_attention_heads=4,
        encoder_n_points=2,
        decoder_layers=2,
        decoder_ffn_dim=2 * _WIDTH,
        decoder_attention_heads=4,
        num_queries=20,
        num_feature_levels=len(STRIDES),
        dropout=0.0,
        fusion_droppath=0.0,
        disable_custom_kernels=True,
    )
    # Eager is the fastest in the backbone. The text encoder must not be: eager BERT adds Grounding DINO's boolean mask
    # to its scores, where sdpa, which `from_pretrained` gives, masks by it.
    attention = {"": "eager", "backbone_config": "eager", "text_config": "sdpa"}
    model: nn.Module = GroundingDinoForObjectDetection._from_config(config, attn_implementation=attention)
    _start_doubtful(model)
    return model


@torch.no_grad()
def _start_doubtful(model: Any) -> None:
    """Sets the norms before the query-token products so that every logit begins near -4.

    The contrastive head is a bare product without scale or bias: at width 128 its logits would begin at about +-11.
    """
    core = model.model
    text = core.encoder.layers[-1].text_enhancer_layer.layer_norm_after
    lean = (4.0 / len(text.weight)) ** 0.5
    text.weight.fill_(0.2)
    text.bias.fill_(lean)
    for norm in (core.enc_output_norm, core.decoder.layer_norm):
        norm.bias.fill_(-lean)
    for layer in core.encoder.layers:
        layer.fusion_layer.vision_param.fill_(0.1)
        layer.fusion_layer.text_param.fill_(0.1)


def build_processor(tokenizer: BertTokenizerFast) -> GroundingDinoProcessor:
    return GroundingDinoProcessor(
        GroundingDinoImageProcessor(size={"shortest_edge": 128, "longest_edge": 224}), tokenizer
    )


class NamingBackbone(nn.Module):
    """The Swin backbone with a head that names what lies under each of its cells, from all three levels."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList(nn.Conv2d(width, len(NOUNS) + 1, 1) for width in backbone.channels)

    def forward(self, batch: GroundingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        with fast_precision():
            maps = self.backbone(batch.pixels).feature_maps
            logits = [head(features).float() for head, features in zip(self.heads, maps, strict=True)]
        size = logits[0].shape[-2:]
        total = sum((nn.functional.interpolate(coarse, size, mode="bilinear") for coarse in logits[1:]), logits[0])
        loss, right = naming_loss(total.flatten(2).transpose(1, 2), batch.cells.flatten(1))
        return loss, {"named": right}


def naming_loss(logits: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each cell's noun, background at 0.3, and the share of subjects' cells that are right.

    logits: (B, S, nouns + 1); cells: (B, S) int64.
    """
    weight = torch.ones(logits.shape[-1])
    weight[0] = 0.3
    loss = nn.functional.cross_entropy(logits.transpose(1, 2), cells, weight=weight)
    right = ((logits.argmax(-1) == cells) & (cells > 0)).sum() / (cells > 0).sum().clamp(min=1)
    return loss, right


class GroundingInTraining(nn.Module):
    """Grounding DINO with the naming head at its encoder's output, and disturbed queries beside the decoder's own."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.naming = nn.Linear(model.config.d_model, len(NOUNS) + 1)
        self._disturbed: Tensor | None = None
        self._starts: Tensor | None = None
        # The decoder repeats the prompt's mask num_queries times; one row broadcasts over the disturbed queries too.
        model.model.decoder.config = copy.copy(model.config)
        model.model.decoder.config.num_queries = 1
        model.model.decoder.register_forward_pre_hook(self._add_disturbed, with_kwargs=True)

    def _add_disturbed(self, _: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Appends GROUPS groups of queries, which see only their own group, to the decoder's own queries."""
        assert self._disturbed is not None
        own, extra = given["inputs_embeds"], self._disturbed.shape[1]
        content = own[:, torch.randint(own.shape[1], (extra,))]
        group = torch.cat([torch.zeros(own.shape[1]), 1 + torch.arange(extra) // (extra // GROUPS)])
        hidden = (group[:, None] != group[None]).to(own.dtype) * torch.finfo(own.dtype).min
        self._starts = torch.cat([given["reference_points"], self._disturbed.to(given["reference_points"])], dim=1)
        return args, given | {
            "inputs_embeds": torch.cat([own, content], dim=1),
            "reference_points": self._starts,
            "self_attn_mask": hidden[None, None],
        }

    def forward(self, batch: GroundingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        self._disturbed = disturbed(batch.boxes, batch.real)
        with fast_precision():
            seen = self.model.model(
                batch.pixels,
                batch.tokens,
                attention_mask=batch.asked.long(),
                pixel_mask=inside(batch.pixels.shape[2], batch.pixels.shape[3], batch.sizes),
            )
            named = self.naming(seen.encoder_last_hidden_state_vision[:, : batch.cells[0].numel()])
        text = seen.encoder_last_hidden_state_text.float()
        naming, right = naming_loss(named.float(), batch.cells.flatten(1))
        asked, told = batch.asked, (batch.boxes, batch.phrases, batch.real, batch.asked)

        centers, levels = token_places(batch.pixels.shape[2], batch.pixels.shape[3], batch.sizes)
        worth = token_worth(centers, levels, batch.boxes, batch.real)
        proposals = seen.enc_outputs_class[..., : text.shape[1]].float()
        logits = proposals.masked_fill(~asked[:, None], -20.0)
        loss = encoder_loss(logits, seen.enc_outputs_coord_logits.float().sigmoid(), worth, *told)
        measures = {"proposing": loss.detach(), "named": right}

        own = self.model.config.num_queries
        assert self._starts is not None
        start = self._starts.float()
        taught = own + torch.arange(GROUPS * MOST).view(GROUPS, MOST)
        for layer in range(seen.intermediate_hidden_states.shape[1]):
            hidden = seen.intermediate_hidden_states[:, layer].float()
            logits = (hidden @ text.transpose(1, 2)).masked_fill(~asked[:, None], -20.0)
            predicted = (self.model.bbox_embed[layer](hidden) + torch.logit(start, eps=1e-5)).sigmoid()
            chosen = match(logits[:, :own], predicted[:, :own], batch.boxes, batch.phrases, batch.real)
            told_own, iou = decoder_loss(logits[:, :own], predicted[:, :own], chosen, *told)
            told_disturbed = sum(
                decoder_loss(logits[:, group], predicted[:, group], torch.arange(MOST).expand_as(chosen), *told)[0]
                for group in taught
            )
            loss = loss + told_own + told_disturbed / GROUPS
            start = seen.intermediate_reference_points[:, layer].float()
        return loss + 2 * naming, measures | {"matched": told_own.detach(), "iou": iou}


def disturbed(boxes: Tensor, real: Tensor) -> Tensor:
    """GROUPS copies of the true boxes, moved and scaled by up to 40 % of their sides; unused rows anywhere.

    boxes: (B, MOST, 4) cxcywh; real: (B, MOST). Returns (B, GROUPS * MOST, 4) within the image.
    """
    copies, kept = boxes.repeat(1, GROUPS, 1), real.repeat(1, GROUPS)
    noise = 0.4 * (2 * torch.rand_like(copies) - 1)
    moved = torch.cat([copies[..., :2] + noise[..., :2] * copies[..., 2:], copies[..., 2:] * (1 + noise[..., 2:])], -1)
    anywhere = 0.1 + 0.5 * torch.rand_like(copies)
    return torch.where(kept[..., None], moved, anywhere).clamp(0.01, 0.99)


def inside(height: int, width: int, sizes: Tensor) -> Tensor:
    """(B, height, width) int64: 1 where a padded view shows its image, 0 in its padding; sizes: (B, 2)."""
    rows, columns = torch.arange(height) < sizes[:, :1], torch.arange(width) < sizes[:, 1:]
    return (rows[:, :, None] & columns[:, None]).long()


def token_places(height: int, width: int, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Centers (B, S, 2) in units of each view without padding, and feature levels (S,), of the encoder's tokens.

    sizes: (B, 2) height and width of the views in a batch of `height` and `width`.
    """
    centers, levels = [], []
    for level, stride in enumerate(STRIDES):
        rows, columns = -(-height // stride), -(-width // stride)
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        centers.append((torch.stack([x.flatten(), y.flatten()], dim=1) + 0.5) * stride)
        levels.append(torch.full((rows * columns,), level))
    return torch.cat(centers) / sizes[:, None].flip(-1), torch.cat(levels)


def _loss(model: nn.Module, batch: GroundingBatch) -> tuple[Tensor, dict[str, Tensor]]:
    result: tuple[Tensor, dict[str, Tensor]] = model(batch)
    return result


@torch.no_grad()
def evaluate(
    model: Any, processor: Any, scenes: SceneSet, threshold: float = THRESHOLD, batch: int = 25
) -> dict[str, float]:
    """Recall and precision at IoU 0.5, each scene prompted with its caption's nouns: `mug . fish .`.

    A query's noun is the one whose token scores highest, its score that token's sigmoid; doubles are not suppressed. A
    box is right if an object of its noun that no better box has taken overlaps it by at least 0.5.
    """
    model.eval()
    found = kept = shown = 0
    for first in range(0, len(scenes), batch):
        rows = range(first, min(first + batch, len(scenes)))
        nouns = [list(dict.fromkeys(scenes.nouns[row, : scenes.counts[row]].tolist())) for row in rows]
        texts = [" . ".join(NOUNS[noun] for noun in listed) + " ." for listed in nouns]
        given = processor(
            images=[scenes.images[row].copy() for row in rows], text=texts, padding=True, return_tensors="pt"
        )
        seen = model(**given)
        side = scenes.images.shape[1]
        for row, listed, logits, boxes in zip(rows, nouns, seen.logits, seen.pred_boxes, strict=True):
            score, which = logits[:, 1 : 1 + 2 * len(listed) : 2].sigmoid().max(dim=1)
            order = score.argsort(descending=True)
            order = order[score[order] > threshold]
            count = int(scenes.counts[row])
            true = torch.from_numpy(scenes.boxes[row, :count] / side)
            true = torch.cat([(true[:, :2] + true[:, 2:]) / 2, true[:, 2:] - true[:, :2]], dim=1)
            iou = overlap(boxes[order][:, None], true[None])[0]
            iou[
                torch.tensor(listed)[which[order]][:, None] != torch.from_numpy(scenes.nouns[row, :count].copy())[None]
            ] = 0
            free = torch.ones(count, dtype=torch.bool)
            for candidate in iou:
                best = (candidate * free).argmax()
                if (candidate * free)[best] >= 0.5:
                    free[best] = False
            found, kept, shown = found + int((~free).sum()), kept + len(order), shown + count
    return {"recall": found / shown, "precision": found / max(kept, 1), "threshold": threshold}


def export(trained: GroundingInTraining, processor: GroundingDinoProcessor, folder: Path) -> Any:
    """Writes the folder in hub format, file by file, so that a reader never sees half a file. Returns a plain model."""
    model: Any = build_grounder(processor.tokenizer)
    model.load_state_dict(trained.model.state_dict())
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    save_pretrained(model, processor, draft)
    folder.mkdir(parents=True, exist_ok=True)
    for path in draft.iterdir():
        path.chmod(0o644)
        os.replace(path, folder / path.name)
    draft.rmdir()
    return model.eval()


def pretrain(args: argparse.Namespace) -> float:
    """Trains the backbone to name, then the whole; writes the weights to args.out. Returns seconds of wall clock."""
    tokenizer = build_tokenizer()
    processor = build_processor(tokenizer)
    scenes, heldout = load_scenes(args.scenes), load_scenes(args.heldout, "heldout")
    draw = batch_drawer(scenes, tokenizer, args.batch, args.seed)
    model: Any = build_grounder(tokenizer)

    backbone = model.model.backbone.conv_encoder.model
    first = LoopSettings(args.naming_steps, lr=2e-3, warmup=100, clip=5.0, ema=0.995, seed=args.seed)
    named: Any = train(NamingBackbone(backbone), draw, _loss, first, args.work / "backbone")
    backbone.load_state_dict(named.backbone.state_dict())

    def show(averaged: nn.Module, step: int) -> None:
        assert isinstance(averaged, GroundingInTraining)
        scores = evaluate(export(averaged, processor, args.out), processor, heldout)
        print(f"step {step} {scores}", flush=True)

    then = LoopSettings(args.steps, lr=1e-3, warmup=200, clip=5.0, seed=args.seed, checkpoint_s=300)
    train(GroundingInTraining(model), draw, _loss, then, args.work / "whole", show)
    return seconds_spent(args.work / "backbone") + seconds_spent(args.work / "whole")


@no_loading_bars()
def main() -> None:
    options = parser(__doc__, steps=4500, out=WEIGHTS / "grounding-dino", work=CACHE / "grounding")
    options.add_argument("--naming-steps", type=int, default=2400, help="steps of the backbone alone, before")
    options.add_argument("--batch", type=int, default=32)
    args = options.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    wall_clock_s = pretrain(args)
    model = GroundingDinoForObjectDetection.from_pretrained(args.out, dtype=torch.float32)
    processor = GroundingDinoProcessor.from_pretrained(args.out)
    scores = evaluate(model, processor, load_scenes(args.heldout, "heldout"))
    print(scores)
    write_scores(args.out, "grounding", args, wall_clock_s, scores)


if __name__ == "__main__":
    main()
