"""Checkpoints are written while the training goes on, by the first rank."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from subject_diffusion.errors import RunError, one_line
from train.trainer.checkpoint import save_checkpoint
from train.trainer.logging import RunLogger
from train.trainer.run_folder import CHECKPOINTS
from train.trainer.run_storage import RunStorage


class CheckpointWriter:
    """One checkpoint at a time, in a thread; to be used as a context, which ends when the last one is whole."""

    def __init__(self, storage: RunStorage, keep: int, log: RunLogger) -> None:
        self._storage, self._keep, self._log = storage, keep, log
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

    def write(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], record: Mapping[str, Any]) -> None:
        """As `save_checkpoint`. Waits for the one before, and raises what that raised."""
        self.wait()
        self._writing = self._thread.submit(self._write, step, tensors, record)

    def _write(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], record: Mapping[str, Any]) -> None:
        storage = self._storage
        try:
            path = save_checkpoint(storage.local / CHECKPOINTS, step, tensors, record)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{storage.local}: no checkpoint could be written ({one_line(error)})") from None
        storage.publish(path)
        storage.publish(storage.local / "tensorboard")
        storage.keep_newest(self._keep)
        self._log.line(f"saved {storage.store.root}/{CHECKPOINTS}/{path.name}")
