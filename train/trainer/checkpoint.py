"""Checkpoints: folders that are whole or not there. Nothing in them is executed: safetensors and JSON.

checkpoints/step-00001000/
    weights.safetensors  average.safetensors  optimizer.safetensors
    checkpoint.json      step, state of the stream, running figures; sizes and hashes of the others
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from subject_diffusion.errors import SddError
from subject_diffusion.storage import PARTIAL, whole_folder
from train.trainer.run_folder import CHECKPOINT_RECORD

_ALWAYS = {"step", "files", "recipe", "changes", "sources", "frozen", "stream"}


class CheckpointError(SddError):
    """A checkpoint is damaged, or belongs to another run."""


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], record: Mapping[str, Any]
) -> Path:
    """tensors: file's stem -> name -> tensor on the CPU; record: plain JSON."""
    final = folder / f"step-{step:08d}"
    files = {}
    with whole_folder(final) as partial:  # one of the same step, by a run that went on from before it, gives way
        for stem, named in tensors.items():
            path = partial / f"{stem}.safetensors"
            save_file({name: t.contiguous() for name, t in named.items()}, path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        (partial / CHECKPOINT_RECORD).write_text(json.dumps({"step": step, "files": files, **record}, indent=1))
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Whole ones, oldest first. What a killed run left half-written is removed."""
    for partial in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(partial)
    return sorted(folder.glob("step-*"))


def read_record(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself. Raises CheckpointError."""
    try:
        record: dict[str, Any] = json.loads((path / CHECKPOINT_RECORD).read_text())
        missing = _ALWAYS - record.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise _unreadable(path, error) from None
    if missing:
        raise CheckpointError(f"checkpoint {path}: has no {min(missing)}; go on with the release that wrote it")
    return record


def load_checkpoint(
    path: Path, only: Collection[str] | None = None
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by file's stem, and the record. only: the stems of the files that are wanted. Raises CheckpointError
    where a file is missing, cut short or changed."""
    remedy = _remedy(path)
    try:
        record = read_record(path)
        tensors = {}
        for name, expected in record["files"].items():
            if only is not None and name.removesuffix(".safetensors") not in only:
                continue
            if Path(name).name != name:
                raise CheckpointError(f"checkpoint {path}: names the file {name} of another folder; {remedy}")
            if (path / name).stat().st_size != expected["bytes"] or _sha256(path / name) != expected["sha256"]:
                raise CheckpointError(f"checkpoint {path}: {name} is not what was written; {remedy}")
            tensors[name.removesuffix(".safetensors")] = load_file(path / name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise _unreadable(path, error) from None
    return tensors, record


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"checkpoint {path}: cannot be read ({error}); {_remedy(path)}")


def _remedy(path: Path) -> str:
    return f"remove {path} to go on from the one before it"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
