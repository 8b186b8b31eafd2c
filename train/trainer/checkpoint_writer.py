"""Checkpoints are written while the training goes on, by every rank its part."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from subject_diffusion.errors import RunError, one_line
from subject_diffusion.storage import PARTIAL, whole_folder
from train.trainer.checkpoint import cause, write_part
from train.trainer.logging import RunLogger
from train.trainer.parallel import background_group, list_of_ranks, own_part, rank_and_count
from train.trainer.run_folder import CHECKPOINT_RECORD, CHECKPOINTS
from train.trainer.run_storage import RunStorage


class CheckpointWriter:
    """One checkpoint at a time, in a thread; to be used as a context, which ends when the last one is whole. Collective
    calls: every rank must make them."""

    def __init__(self, storage: RunStorage, keep: int, log: RunLogger) -> None:
        self._storage, self._keep, self._log = storage, keep, log
        self._group = background_group()
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
        self.wait()

    def wait(self) -> None:
        """Until the one that is being written is whole. Raises RunError where it could not be."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def write(self, step: int, state: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """state: tensors by kind and name, whole or split among the ranks, of which this one copies its part; record:
        plain JSON. Waits for the one before, and raises what that raised."""
        self.wait()  # before there is another copy
        part = BlockingAsyncStager().stage(own_part(state))
        self._writing = self._thread.submit(self._write, step, part, list(state), record)

    def _write(self, step: int, part: Mapping[str, Tensor], names: Collection[str], record: Mapping[str, Any]) -> None:
        storage, first = self._storage, rank_and_count()[0] == 0
        final = storage.local / CHECKPOINTS / f"step-{step:08d}"
        with contextlib.ExitStack() as whole:
            with self._failing_together():
                # One of the same step, by a run that went on from before it, gives way.
                partial = whole.enter_context(whole_folder(final) if first else self._folder_for_part(final))
            with self._failing_together():
                own = write_part(partial, part, names, self._group)
                for file in own:
                    storage.publish(partial / file, f"{CHECKPOINTS}/{final.name}/{file}")
            files = {file: of for found in list_of_ranks([own], self._group) for file, of in found.items()}
            with self._failing_together():
                if first:
                    said = {"step": step, "files": files, **record}
                    (partial / CHECKPOINT_RECORD).write_text(json.dumps(said, indent=1))
                    whole.close()
                    storage.publish(final / CHECKPOINT_RECORD)
                    storage.publish(storage.local / "tensorboard")
                    storage.keep_newest(self._keep)
        if first:
            self._log.line(f"saved {storage.store.root}/{CHECKPOINTS}/{final.name}")

    @contextlib.contextmanager
    def _folder_for_part(self, final: Path) -> Iterator[Path]:
        """Where a rank that is not the first writes: the folder that all see, or one that it uploads from."""
        shared = final.with_name(PARTIAL + final.name)
        if self._storage.store.local:
            yield shared
            return
        own = shared.with_name(f"{shared.name}-{rank_and_count()[0]}")
        shutil.rmtree(own, ignore_errors=True)  # a killed run's shards would be taken for this one's
        own.mkdir(parents=True)
        try:
            yield own
        finally:
            shutil.rmtree(own, ignore_errors=True)

    @contextlib.contextmanager
    def _failing_together(self) -> Iterator[None]:
        """What fails here on one rank is a RunError on every rank, none of which then waits for that one. Collective:
        every rank must come by."""
        errors = []
        try:
            yield
        except RunError as error:
            errors = [error]
        except (Exception, CheckpointException) as error:  # whatever it is, the others would wait for it
            errors = [RunError(f"{self._storage.local}: no checkpoint could be written ({one_line(cause(error))})")]
        for first in list_of_ranks(errors, self._group):
            raise first
