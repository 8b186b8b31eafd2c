"""Training: batches of the stream become updates of the subject model."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, distributed, nn

from datapipe.errors import RunError
from datapipe.schema import IDENTITIES
from model import SubjectDiffusion, SubjectDiffusionPipeline, SubjectNet, TrainingBatch, min_snr_weight
from train.cache import ShardCache
from train.cases import load_cases
from train.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from train.examples import TrainingExamples, check_entities
from train.loader import StreamLoader
from train.pairs import Pairs
from train.reader import Batch
from train.recipe import OptimizerSettings, TrainRecipe
from train.sharing import accumulating, any_rank, gathered, gathered_by_name, like, mean_over_ranks, share
from train.stream import CACHE, CACHE_BYTES, Stream
from train.throughput import Throughput
from train.validation import draw_samples, grid
from train.watch import Screen, Watch, watch

CHECKPOINTS = "checkpoints"
PIPELINE = "pipeline"
STOP = "stop"
"""A file of this name in the run's folder asks it to save and end."""

_MEAN_LOSS_SHARE = 0.02  # of the newest step, in the running mean that an exploding loss is held against


class Trainer:
    """One process's part of a run."""

    def __init__(self, recipe: TrainRecipe, out: Path, device: torch.device, cache: Path = CACHE) -> None:
        """Raises SddError."""
        self.recipe, self.out, self.device, self.cache = recipe, out, device, cache
        self.rank = distributed.get_rank() if distributed.is_initialized() else 0
        self.dtype = getattr(torch, recipe.run.precision)
        if recipe.run.threads:
            torch.set_num_threads(recipe.run.threads)
        torch.manual_seed(recipe.seed)
        self.model = SubjectDiffusion.from_base(recipe.base, recipe.model, recipe.image_encoder, self.dtype)
        self.model.to(device).train()
        if recipe.run.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self.shared = share(self.model, recipe.run.strategy)
        self.named = {n: p for n, p in self.model.subject_net.named_parameters() if p.requires_grad}
        o = recipe.optimizer
        self.optimizer = torch.optim.AdamW(self.named.values(), o.lr, o.betas, weight_decay=o.weight_decay)
        self.average = {n: p.detach().clone() for n, p in self.named.items()} if o.ema else self.named
        ranks = distributed.get_world_size() if distributed.is_initialized() else 1
        self.throughput = Throughput(device, self.dtype, ranks)
        self.loader = self._loader()
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.mean_loss: float | None = None
        self._resume()

    def run(self, screen: Screen | None = None) -> bool:
        """Trains to the last step and writes the pipeline; or, asked to stop, saves and returns False. screen: where
        the first rank says how far it is."""
        s = self.recipe.run
        batches = self._counted(self._batches())
        with watch(self.out, self.step, self.rank == 0, s.wandb_project, screen) as watched:
            while self.step < self.recipe.optimizer.steps:
                figures = self._update(batches)
                self.step += 1
                watched.at(self.step)
                last = self.step == self.recipe.optimizer.steps
                if self.step % s.log_every == 0 or last:
                    watched.scalars(self.step, figures | self.throughput.look())
                stopped = any_rank(self.rank == 0 and (self.out / STOP).exists(), self.device)
                if self.step % s.checkpoint_every == 0 or last or stopped:
                    self._save(watched)
                if stopped and not last:
                    return False
                if self.step % self.recipe.validation.every == 0 or last:
                    self._validate(watched)
        self._write_pipeline()
        return True

    def _update(self, batches: Iterator[Batch]) -> dict[str, float]:
        """One step: accumulates the gradient of `batch_size` images, and follows it. Returns what the log shows."""
        o = self.recipe.optimizer
        parts = o.batch_size // (self.recipe.run.micro_batch * self.loader.stream.plan.ranks)
        terms = torch.zeros(3, device=self.device)
        for part in range(parts):
            batch = self.throughput.waiting(lambda: next(batches))
            with accumulating(self.shared, last=part == parts - 1):
                terms += self._backward(batch, parts)
        loss, diffusion, attention = mean_over_ranks(terms / parts).tolist()
        norm = gathered(nn.utils.clip_grad_norm_(self.named.values(), o.clip_norm)).item()
        rate = o.lr * lr_factor(self.step, o)
        if self._usable(loss, norm):
            self.mean_loss = (
                loss if self.mean_loss is None else self.mean_loss + _MEAN_LOSS_SHARE * (loss - self.mean_loss)
            )
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self._follow()
        self.optimizer.zero_grad()
        return {
            "loss/total": loss,
            "loss/diffusion": diffusion,
            "loss/attention": attention,
            "optimizer/lr": rate,
            "optimizer/gradient_norm": norm,
            "optimizer/skipped": float(self.skipped),
        }

    def _backward(self, batch: Batch, parts: int) -> Tensor:
        """(3,): the micro-batch's loss, and its terms."""
        training_batch = self._training_batch(batch)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            losses = self.shared(training_batch)
        diffusion = losses.diffusion
        if self.recipe.optimizer.min_snr:
            snr = self.model.signal_to_noise(training_batch.timesteps)
            diffusion = diffusion * min_snr_weight(snr, self.recipe.optimizer.min_snr, self.model.prediction_type)
        attention = losses.attention.mean()
        loss = diffusion.mean() + self.recipe.model.attention_weight * attention
        (loss / parts).backward()
        self.throughput.add(len(batch["key"]))
        return torch.stack([loss, losses.diffusion.mean(), attention]).detach()

    def _counted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, once the operations of the first are counted. What is counted is computed by other kernels,
        whose rounding differs, so it is thrown away."""
        first = next(batches)
        with accumulating(self.shared, last=True):  # FSDP2 keeps gradients not yet exchanged where nothing clears them
            self.throughput.count(lambda: self._backward(first, 1), len(first["key"]))
        self.optimizer.zero_grad()
        self.throughput.forget()
        if self.recipe.run.compile:
            self.model.compile()
        return itertools.chain([first], batches)

    def _training_batch(self, batch: Batch) -> TrainingBatch:
        model, factor = self.model, self.model.latent_factor
        on = {n: v.to(self.device, non_blocking=True) for n, v in batch.items() if isinstance(v, Tensor)}
        classes, patches = model.encode_references(on["references"], on["present"])
        noise = on["noise"][:, 0] + self.recipe.optimizer.offset_noise * on["offset"]
        training_batch = TrainingBatch(
            latents=model.encode_images(on["image"], on["noise"][:, 1]),
            noise=noise,
            timesteps=(on["timestep_draw"] * model.num_train_timesteps).long().clamp(max=model.num_train_timesteps - 1),
            condition_draw=on["condition_draw"],
            prompts=model.prompt_tokenizer(batch["caption"], [[t for t in tags if t] for tags in batch["tags"]]),
            classes=classes,
            patches=patches,
            boxes=on["boxes"],
            masks=nn.functional.avg_pool2d(on["masks"].float(), factor),
            present=on["present"],
        )
        return training_batch.to(self.device, non_blocking=True)

    def _usable(self, loss: float, norm: float) -> bool:
        """Whether a step may be followed. Raises RunError when too many in a row may not."""
        o = self.recipe.optimizer
        exploded = self.mean_loss is not None and loss > o.exploding * self.mean_loss
        if math.isfinite(loss) and math.isfinite(norm) and not exploded:
            self.skipped_in_a_row = 0
            return True
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= o.most_skipped:
            raise RunError(
                f"step {self.step}: loss {loss:.3g}, gradient norm {norm:.3g}, where the loss was "
                f"{self.mean_loss or math.nan:.3g} on average, {self.skipped_in_a_row} times in a row; lower "
                "optimizer.lr, or set run.precision=float32"
            )
        return False

    @torch.no_grad()
    def _follow(self) -> None:
        """The average moves towards the weights."""
        if self.recipe.optimizer.ema:
            decay = min(self.recipe.optimizer.ema, (1 + self.step) / (10 + self.step))
            for name, parameter in self.named.items():
                self.average[name].lerp_(parameter.detach(), 1 - decay)

    def _loader(self) -> StreamLoader:
        r, side = self.recipe, self.recipe.examples.size_px
        factor = self.model.latent_factor
        if side % factor:
            raise RunError(f"examples.size_px {side}: the base's autoencoder takes multiples of {factor}")
        latent = (self.model.vae.config.latent_channels, side // factor, side // factor)
        cache = ShardCache(self.cache.expanduser(), CACHE_BYTES)
        check_entities(r.sources, cache)
        self.pairs = Pairs(r.sources, cache)
        examples = TrainingExamples(r.examples, r.model.max_subjects, self.model.reference_size, latent, self.pairs)
        ranks = distributed.get_world_size() if distributed.is_initialized() else 1
        stream = Stream(r.sources, ranks * r.run.micro_batch, examples, seed=r.seed, window=r.window, cache=self.cache)
        return StreamLoader(stream, r.run.loader_workers, pin_memory=self.device.type == "cuda")

    def _batches(self) -> Iterator[Batch]:
        while True:
            yield from self.loader

    def _save(self, watched: Watch) -> None:
        state = self.optimizer.state
        moments = {
            f"{n}.{moment}": state[p][moment]
            for n, p in self.named.items()
            for moment in ("exp_avg", "exp_avg_sq", "step")
            if p in state
        }
        tensors = {
            "weights": gathered_by_name(self.named.items()),
            "average": gathered_by_name(self.average.items()) if self.recipe.optimizer.ema else {},
            "optimizer": gathered_by_name(moments.items()),
        }
        record = {
            "stream": self.loader.state_dict(),
            "pairs": self.pairs.fingerprint,
            "mean_loss": self.mean_loss,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }
        if self.rank == 0:
            path = save_checkpoint(self.out / CHECKPOINTS, self.step, tensors, record, self.recipe.run.keep_checkpoints)
            watched.say(f"saved {path}")
        if distributed.is_initialized():
            distributed.barrier()

    def _resume(self) -> None:
        """From the newest checkpoint, if there is one."""
        if distributed.is_initialized():
            distributed.barrier()  # none looks while another removes what was left half-written
        found = checkpoints(self.out / CHECKPOINTS)
        if not found:
            return
        tensors, record = load_checkpoint(found[-1])
        if record["pairs"] != self.pairs.fingerprint:
            raise RunError(
                f"{found[-1]} was learnt with other identities: {IDENTITIES} of a source has changed; put back what it "
                "was, or name another --out"
            )
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(like(tensors["weights"][name], parameter))
                if self.recipe.optimizer.ema:
                    self.average[name].copy_(like(tensors["average"][name], parameter))
        moments = tensors["optimizer"]
        state = {
            i: {
                "step": moments[f"{n}.step"],
                "exp_avg": like(moments[f"{n}.exp_avg"], p),
                "exp_avg_sq": like(moments[f"{n}.exp_avg_sq"], p),
            }
            for i, (n, p) in enumerate(self.named.items())
            if f"{n}.step" in moments
        }
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.loader.load_state_dict(record["stream"])
        self.step, self.mean_loss = record["step"], record["mean_loss"]
        self.skipped, self.skipped_in_a_row = record["skipped"], record["skipped_in_a_row"]

    def _averaged_net(self) -> SubjectNet | None:
        """What is sampled with, on the first rank. All ranks must ask."""
        weights = gathered_by_name(self.average.items())
        if self.rank:
            return None
        net: SubjectNet = SubjectNet.from_config(self.model.subject_net.config)
        net.load_state_dict(weights, strict=False)
        net.eval().requires_grad_(False)
        return net

    def _validate(self, watched: Watch) -> None:
        """Rank 0 draws the grid; the others wait."""
        net = self._averaged_net()
        v, r = self.recipe.validation, self.recipe
        if net is not None:
            cases = load_cases(v.path or r.sources[0].path, v.images, r.examples, (1, r.model.max_subjects), self.cache)
            pipeline = SubjectDiffusionPipeline.from_model(self.model, net.to(self.device))
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                sheet = grid(cases, [draw_samples(pipeline, cases, v)])
            path = self.out / f"validation-{self.step:08d}.png"
            sheet.save(path)
            watched.picture(self.step, sheet)
            watched.say(f"drawn {path}")
        if distributed.is_initialized():
            distributed.barrier()
        self.throughput.forget()

    def _write_pipeline(self) -> None:
        net = self._averaged_net()
        if net is None:
            return
        r = self.recipe
        background = r.examples.reference.background
        pipeline = SubjectDiffusionPipeline.from_base(r.base, r.image_encoder, net, background)
        write_whole(pipeline, self.out / PIPELINE)


def write_whole(pipeline: SubjectDiffusionPipeline, folder: Path) -> None:
    """`save_pretrained`, under another name until it is complete."""
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def lr_factor(step: int, settings: OptimizerSettings) -> float:
    """The learning rate of a step (0 is the first), as a share of `lr`: a linear rise, then constant or cosine."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))
