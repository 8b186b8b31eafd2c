"""A run's folder, where it may be a bucket: what is written there lies on this machine's disk first; of a checkpoint,
all that a machine goes on from is fetched, and removed when it is loaded."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock

from datapipe.shards.store import Store
from subject_diffusion.errors import RunError
from subject_diffusion.storage import named_errors, whole_folder
from train.stream.cache import retried
from train.stream.dataset import CACHE
from train.trainer.checkpoint import checkpoints
from train.trainer.run_folder import CHECKPOINT_RECORD, CHECKPOINTS, STOP

_COPIES = CACHE.parent / "runs"
_LAST = (CHECKPOINT_RECORD, "model_index.json")
"""Files that make their folder whole."""
_LOOK_EVERY_S = 10.0
"""Between two questions to a bucket whether the run is asked to stop."""


class RunStorage:
    """Local or in a bucket. Raises RunError."""

    def __init__(self, out: str | Path) -> None:
        self.store = Store(str(out))
        self.local = Path(out)
        """Where to write; what is written here has to be published."""
        if not self.store.local:
            self.local = _COPIES.expanduser() / hashlib.sha256(self.store.root.encode()).hexdigest()[:16]
            self.local.mkdir(parents=True, exist_ok=True)
        self._next_look_s = 0.0

    def publish(self, path: Path, name: str | None = None) -> None:
        """Copies a file or folder of `local` to where the run's folder is, a file perhaps under another name; of a
        folder, what makes it whole last."""
        if self.store.local:
            return
        files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
        for file in sorted(files, key=lambda p: p.name in _LAST):
            retried(self._upload, file, name or file.relative_to(self.local).as_posix())

    def checkpoints(self) -> list[str]:
        """Names of those that are whole, oldest first."""
        if self.store.local:
            return [path.name for path in checkpoints(self.local / CHECKPOINTS)]
        return sorted(record.split("/")[-2] for record in retried(self._records))

    def checkpoint(self, name: str) -> Path:
        """Its folder on this machine; of a bucket, the processes of a node fetch it once."""
        folder = self.local / CHECKPOINTS / name
        if not self.store.local:
            with FileLock(self.local / "checkpoints.lock"):
                retried(self._download, f"{CHECKPOINTS}/{name}", folder)
        return folder

    def forget(self, name: str) -> None:
        """Removes this machine's copy of a bucket's checkpoint, once all of its processes have loaded it."""
        if not self.store.local:
            shutil.rmtree(self.local / CHECKPOINTS / name, ignore_errors=True)

    def keep_newest(self, count: int) -> None:
        """Removes older checkpoints."""
        for name in self.checkpoints()[:-count]:
            if not self.store.local:
                # What makes it whole goes first, so that a killed run leaves no half for a whole.
                retried(self.store.remove, [f"{CHECKPOINTS}/{name}/{CHECKPOINT_RECORD}"])
                retried(self._remove, f"{CHECKPOINTS}/{name}")
            shutil.rmtree(self.local / CHECKPOINTS / name, ignore_errors=True)

    def ask_to_stop(self) -> None:
        self.store.put(STOP, b"")

    def asked_to_stop(self) -> bool:
        """Looks into a bucket every 10 seconds only."""
        if self.store.local:
            return self.store.exists(STOP)
        if time.monotonic() < self._next_look_s:
            return False
        self._next_look_s = time.monotonic() + _LOOK_EVERY_S
        self.store.file_system.invalidate_cache()
        try:
            return self.store.exists(STOP)
        except RunError:  # all ranks wait, and there is another look soon; a bucket that is gone fails a checkpoint
            return False

    def _upload(self, file: Path, name: str) -> None:
        with named_errors(f"{self.store.root}/{name}", RunError):
            self.store.file_system.put_file(str(file), self.store.path_of(name))

    def _download(self, name: str, folder: Path) -> None:
        """Unless it is here. Only what the checkpoint names is taken: a killed run of more ranks may have left more."""
        fs, here = self.store.file_system, folder / CHECKPOINT_RECORD
        with named_errors(self.store.root, RunError):
            record = fs.cat_file(self.store.path_of(f"{name}/{CHECKPOINT_RECORD}"))
            try:
                sizes = {Path(file).name: of["bytes"] for file, of in json.loads(record)["files"].items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                sizes = {}  # who reads the record says what is wrong with it
            if here.is_file() and here.read_bytes() == record and sizes == _sizes(folder, sizes):
                return
            with whole_folder(folder) as partial:
                for file in sizes:
                    fs.get_file(self.store.path_of(f"{name}/{file}"), str(partial / file))
                (partial / CHECKPOINT_RECORD).write_bytes(record)

    def _remove(self, name: str) -> None:
        # An attempt that failed may have removed everything.
        with named_errors(self.store.root, RunError), contextlib.suppress(FileNotFoundError):
            self.store.file_system.rm(self.store.path_of(name), recursive=True)

    def _records(self) -> list[str]:
        fs = self.store.file_system
        with named_errors(self.store.root, RunError):
            fs.invalidate_cache()
            return [str(p) for p in fs.glob(self.store.path_of(f"{CHECKPOINTS}/step-*/{CHECKPOINT_RECORD}"))]


def _sizes(folder: Path, names: Iterable[str]) -> dict[str, int]:
    """Bytes of the files that are there."""
    return {name: (folder / name).stat().st_size for name in names if (folder / name).is_file()}
