"""Training: batches of the stream become updates of the subject model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model import SubjectDiffusion, SubjectDiffusionPipeline, SubjectNet
from subject_diffusion.errors import RunError
from train.evaluation.cases import load_cases
from train.stream.buckets import BucketedOrder
from train.stream.dataset import CACHE
from train.stream.reader import Replaced
from train.trainer.checkpoint import read_record, saved_names
from train.trainer.checkpoint_writer import CheckpointWriter
from train.trainer.data import held_out_batches, open_loader, open_pairs, through_epochs
from train.trainer.encode import encode
from train.trainer.examples import ExampleBatch
from train.trainer.guard import LossGuard
from train.trainer.held_out import held_out_losses
from train.trainer.logging import MeansSinceLastLine, ProgressDisplay, RunLogger, run_logger
from train.trainer.losses import LOSSES, ForwardPass, total_and_losses
from train.trainer.low_rank import add_low_rank
from train.trainer.model_folder import model_folder
from train.trainer.optimization import (
    MovingAverage,
    adamw,
    freeze,
    lr_factor,
    restore_state,
    start_from,
    state_of,
)
from train.trainer.parallel import (
    accumulating,
    any_rank,
    barrier,
    gathered,
    gathered_by_name,
    list_of_ranks,
    mean_over_ranks,
    of_first_rank,
    rank_and_count,
    share,
)
from train.trainer.pipeline import check_same_base, net_with, trained_weights, write_pipeline
from train.trainer.recipe import TrainRecipe
from train.trainer.resume import (
    changed_settings,
    check_same_data,
    frozen_fingerprint,
    newest_for_all,
    source_records,
)
from train.trainer.run_folder import PIPELINE
from train.trainer.run_storage import RunStorage
from train.trainer.throughput import Throughput
from train.trainer.validation import draw_samples, grid

_MOST_NAMED = 3  # corrupt samples of one step


class Trainer:
    """One process's part of a run."""

    def __init__(self, recipe: TrainRecipe, out: str | Path, device: torch.device, cache: Path = CACHE) -> None:
        """out: the run's folder, perhaps in a bucket. Raises SddError."""
        self.recipe, self.device, self.cache = recipe, device, cache
        self.storage = RunStorage(out)
        self.out = self.storage.local
        self.rank, self.ranks = rank_and_count()
        self.dtype = getattr(torch, recipe.run.precision)
        if recipe.run.threads:
            torch.set_num_threads(recipe.run.threads)
        if device.index is not None:
            torch.cuda.set_device(device)
        torch.manual_seed(recipe.seed)
        self.model = self._model()
        self.shared = share(self.model, recipe.run.strategy, self.dtype)
        self.named = {n: p for n, p in self.model.subject_net.named_parameters() if p.requires_grad}
        self.optimizer = adamw(self.named, recipe.optimizer)
        self.average = MovingAverage(self.named, recipe.optimizer.ema, recipe.run.ema_on_cpu)
        self.guard = LossGuard(recipe.optimizer)
        self.means = MeansSinceLastLine()
        self.replaced = 0
        self.throughput = Throughput(device, self.dtype, self.ranks)
        self.pairs = open_pairs(recipe, cache)
        self.loader = open_loader(recipe, self.model, self.pairs, cache, self.ranks, device.type == "cuda")
        self.sources = source_records(self.loader.stream, self.pairs)
        self.frozen = frozen_fingerprint(self.model.vae, self.model.unet, self.model.image_encoder)
        self.step = 0
        self.changes: list[dict[str, Any]] = []
        order = self.loader.stream.plan.order
        self.news = [order.described()] if isinstance(order, BucketedOrder) else []
        self._resume()

    def run(self, display: ProgressDisplay | None = None) -> bool:
        """Trains to the last step and writes the pipeline; or, asked to stop, saves and returns False. display: where
        the first rank shows how far it is."""
        s, steps = self.recipe.run, self.recipe.optimizer.steps
        batches = self._counted(through_epochs(self.loader))
        with (
            run_logger(self.recipe, self.storage, self.step, self.rank == 0, display) as log,
            CheckpointWriter(self.storage, s.keep_checkpoints, log) as writer,
        ):
            for news in self.news:
                log.line(news)
            while self.step < steps:
                newest = self._update(batches, log)
                self.step += 1
                log.advance_to(self.step)
                last = self.step == steps
                if self.step % s.log_every == 0 or last:
                    log.scalars(self.step, self.means.take() | newest | self.throughput.look())
                stopped = any_rank(self.rank == 0 and self.storage.asked_to_stop(), self.device)
                if self.step % s.checkpoint_every == 0 or last or stopped:
                    self._save(writer)
                if stopped and not last:
                    return False
                if self.step % self.recipe.validation.every == 0 or last:
                    self._validate(log)
        net = self._averaged_net()
        if net is not None:
            write_pipeline(self.recipe, net, self.out / PIPELINE)
            self.storage.publish(self.out / PIPELINE)
        return True

    def _update(self, batches: Iterator[ExampleBatch], log: RunLogger) -> dict[str, float]:
        """One step: accumulates the gradient of `batch_size` images, and follows it. Returns what the log shows of the
        newest step alone; `means` has what it shows of all, without those that are not followed."""
        o = self.recipe.optimizer
        found = self._accumulate(batches, log)
        with self.throughput.phase("update"):
            norm = gathered(nn.utils.clip_grad_norm_(self.named.values(), o.clip_norm)).item()
            rate = o.lr * lr_factor(self.step, o)
            if self.guard.allows(self.step, found["loss/total"], found["loss/diffusion"], norm):
                for group in self.optimizer.param_groups:
                    group["lr"] = rate * group["factor"]
                self.optimizer.step()
                self.average.follow(self.step)
                self.means.add(found | {"optimizer/gradient_norm": norm})
            self.optimizer.zero_grad()
        return {
            "optimizer/lr": rate,
            "optimizer/skipped": float(self.guard.skipped),
            "replaced_samples": float(self.replaced),
        }

    def _accumulate(self, batches: Iterator[ExampleBatch], log: RunLogger) -> dict[str, float]:
        """The gradient of one step, micro-batch by micro-batch. Returns the total loss, each loss, and the share of
        images with subjects, by the log's names, as means over all images of all ranks."""
        parts = self.recipe.optimizer.batch_size // (self.recipe.run.micro_batch * self.ranks)
        figures = torch.zeros(1 + len(LOSSES), device=self.device)
        data = torch.zeros(2)
        replaced: list[Replaced] = []
        for part in range(parts):
            batch = self.throughput.waiting(lambda: next(batches))
            replaced += batch["replaced"]
            data += torch.tensor([batch["present"].any(dim=1).float().mean(), len(batch["replaced"])])
            with accumulating(self.shared, last=part == parts - 1):
                figures += self._backward(batch, parts)
        figures = torch.cat([figures, data.to(self.device)])
        *losses, with_subjects, corrupt = mean_over_ranks(figures / parts).tolist()
        if corrupt:
            self._name_replaced(log, replaced)
        names = ("loss/total", *(f"loss/{name}" for name in LOSSES))
        return dict(zip(names, losses, strict=True)) | {"images_with_subjects": with_subjects}

    def _name_replaced(self, log: RunLogger, replaced: list[Replaced]) -> None:
        """Collective call: every rank must make it."""
        everywhere = list_of_ranks(replaced)
        self.replaced += len(everywhere)
        for one in everywhere[:_MOST_NAMED]:
            log.line(f"corrupt sample {one.key} of {one.shard}: {one.reason}; another one is learned in its place")

    def _backward(self, batch: ExampleBatch, parts: int) -> Tensor:
        """Adds a micro-batch's share, 1 / parts, to the gradient. Returns its total loss and its losses, (1 + L,)."""
        with self.throughput.phase("encode"):
            encoded = encode(self.model, batch, self.device, self.recipe.optimizer.offset_noise)
        with self.throughput.phase("learn"):
            with self._autocast():
                found = self.shared(encoded)
            total, losses = total_and_losses(ForwardPass(self.recipe, self.model, encoded, found))
            (total / parts).backward()  # type: ignore[no-untyped-call]  # torch's own
        self.throughput.add(len(batch["key"]))
        return torch.cat([total.detach()[None], losses])

    def _counted(self, batches: Iterator[ExampleBatch]) -> Iterator[ExampleBatch]:
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

    def _model(self) -> SubjectDiffusion:
        r = self.recipe
        base, clip = model_folder("base", r.base), model_folder("image_encoder", r.image_encoder)
        model = SubjectDiffusion.from_base(base, r.model, clip, self.dtype)
        if r.optimizer.text_encoder_rank:
            add_low_rank(model.subject_net, r.optimizer.text_encoder_rank)
        freeze(model.subject_net, r.optimizer.lr_factors)
        model.to(self.device).train()
        if r.run.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        return model

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _save(self, writer: CheckpointWriter) -> None:
        """Collective call: every rank must make it."""
        record = {
            "stream": self.loader.state_dict(),
            "recipe": self.recipe.model_dump(mode="json"),
            "changes": self.changes,
            "sources": self.sources,
            "frozen": self.frozen,
            "replaced": self.replaced,
            **self.guard.state_dict(),
        }
        state = state_of(self.model.subject_net, self.named, self.average, self.optimizer)
        writer.write(self.step, state, record)

    def _resume(self) -> None:
        """Goes on from the newest checkpoint, if there is one. Collective call: every rank must make it."""
        first = self.rank == 0
        name = newest_for_all(self.storage)
        if name is None:
            if self.recipe.init_from is not None:
                weights = trained_weights(Path(self.recipe.init_from)) if first else None
                start_from(weights, self.model.subject_net, self.average)
                if first:
                    check_same_base(Path(self.recipe.init_from), self.model, self.frozen)
            return
        path = self.storage.checkpoint(name)
        record = of_first_rank(read_record(path) if first else None)
        check_same_data(record["sources"], self.sources)
        if record["frozen"] != self.frozen:
            raise RunError(
                f"{name} of {self.storage.store.root} was learned on another base or image encoder than "
                f"{self.recipe.base} and {self.recipe.image_encoder}: their weights differ; name the same ones, or "
                "another --out"
            )
        saved = saved_names(path, record, copied=not self.storage.store.local)
        restore_state(path, saved, self.model.subject_net, self.named, self.average, self.optimizer)
        barrier()  # all have read it
        self.storage.forget(name)
        stream, now = record["stream"], self.loader.state_dict()
        self.guard.load_state_dict(record)
        self.replaced = record["replaced"]
        self.step = record["step"]
        if stream["fingerprint"] != now["fingerprint"]:  # of more sources, other shares or, with buckets, other steps
            stream = now | {"epoch": stream["epoch"] + 1}
            self.news.append(f"from step {self.step} on, samples come in another order: a new epoch begins")
        self.loader.load_state_dict(stream)
        self.changes = record["changes"]
        changed = changed_settings(TrainRecipe.model_validate(record["recipe"]), self.recipe)
        if changed:
            self.changes = [*self.changes, {"step": self.step, **changed}]
            self.news += [f"from step {self.step} on, {key} {was!r} -> {now!r}" for key, (was, now) in changed.items()]

    def _averaged_net(self) -> SubjectNet | None:
        """What is sampled with, on the first rank. Collective call: every rank must make it."""
        everything = dict(self.model.subject_net.named_parameters())
        weights = gathered_by_name((everything | dict(self.average.weights)).items())
        return net_with(weights, self.model.subject_net) if self.rank == 0 else None

    def _validate(self, log: RunLogger) -> None:
        """The first rank draws the grid; the others wait. Collective call: every rank must make it."""
        net = self._averaged_net()
        v, r = self.recipe.validation, self.recipe
        if net is not None:
            cases = load_cases(v.path or r.sources[0].path, v.images, r.examples, (1, r.model.max_subjects), self.cache)
            pipeline = SubjectDiffusionPipeline.from_model(self.model, net.to(self.device))
            with self._autocast():
                sheet = grid(cases, {"drawn": draw_samples(pipeline, cases, v)})
            path = self.out / f"validation-{self.step:08d}.png"
            sheet.save(path)
            self.storage.publish(path)
            log.image(self.step, sheet)
            log.line(f"drawn {path}")
            if v.path:
                log.scalars(self.step, self._held_out_losses(v.path, net))
        barrier()
        self.throughput.forget()

    def _held_out_losses(self, path: str, net: SubjectNet) -> dict[str, float]:
        m = self.model
        parts = {"tokenizer": m.tokenizer, "scheduler": m.scheduler, "image_processor": m.image_processor}
        averaged = SubjectDiffusion(m.vae, m.unet, m.image_encoder, net, **parts).to(self.device)
        with self._autocast():
            return held_out_losses(averaged, held_out_batches(self.recipe, averaged, path, self.cache), self.device)
