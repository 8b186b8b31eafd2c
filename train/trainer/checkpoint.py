"""Checkpoints: folders that are whole or not there, to which every rank writes its part. Nothing in them is executed:
safetensors and JSON.

checkpoints/step-00001000/
    shard-00002-model-00001-of-00003.safetensors   what the second rank wrote of the weights; 2: average, 3: optimizer
    checkpoint.json      step, state of the stream, running figures; sizes and hashes of the others
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, distributed
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from subject_diffusion.errors import RunError, SddError
from subject_diffusion.storage import PARTIAL, named_errors
from train.trainer.parallel import list_of_ranks, own_part, rank_and_count, rank_and_count_on_node, send_parts
from train.trainer.run_folder import CHECKPOINT_RECORD

KINDS = ("weights", "average", "optimizer")
"""First parts of the tensors' names: weights/conv_in.weight."""

_ALWAYS = {"step", "files", "recipe", "changes", "sources", "frozen", "stream"}
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError,
               CheckpointException)  # fmt: skip

# One process needs no process group.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class CheckpointError(SddError):
    """A checkpoint is damaged, or belongs to another run."""


def write_part(
    folder: Path, part: Mapping[str, Tensor], names: Collection[str], group: distributed.ProcessGroup | None
) -> dict[str, dict[str, Any]]:
    """Writes what this rank has, on the CPU, of the tensors of these names. Returns its files, with sizes and hashes.
    Collective call. Raises OSError, SafetensorError or CheckpointException."""
    kinds = {name: 1 + KINDS.index(name.split("/")[0]) for name in names}
    writer = HuggingFaceStorageWriter(str(folder), kinds, save_distributed=True)
    save(dict(part), storage_writer=writer, process_group=group, no_dist=group is None)
    own = folder.glob(f"shard-{rank_and_count()[0] + 1:05d}-*.safetensors")
    return {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in own}


def checkpoints(folder: Path) -> list[Path]:
    """Whole ones, oldest first. What a killed run left half-written is removed. Raises RunError where it cannot be."""
    for partial in folder.glob(f"{PARTIAL}*"):
        with named_errors(str(partial), RunError):
            shutil.rmtree(partial)
    return sorted(folder.glob("step-*"))


def read_record(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself. Raises CheckpointError, also where there are tensors that it does not name:
    torch would read them with the others."""
    try:
        record: dict[str, Any] = json.loads((path / CHECKPOINT_RECORD).read_text())
        missing = _ALWAYS - record.keys()
        named = set(record.get("files", {}))
        if not missing and not any(name.startswith("shard-") for name in named):
            missing = {"shards"}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise _unreadable(path, error) from None
    if missing:
        raise CheckpointError(f"checkpoint {path}: has no {min(missing)}; go on with the release that wrote it")
    for left in sorted({file.name for file in path.glob("*.safetensors")} - named):
        raise CheckpointError(
            f"checkpoint {path}: {left} is not in its {CHECKPOINT_RECORD}; a killed run may have left it there: "
            "remove this file"
        )
    return record


def load_checkpoint(path: Path, only: Collection[str] = KINDS) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Whole tensors by kind, and the record; by this process alone. only: the kinds that are wanted. Raises
    CheckpointError where a file is missing, cut short or changed."""
    record = read_record(path)
    wanted = [f"-model-{1 + KINDS.index(kind):05d}-of-" for kind in only]
    try:
        _check_files(path, {n: f for n, f in record["files"].items() if any(mark in n for mark in wanted)})
        found = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
        whole: dict[str, Any] = {
            name: torch.empty(tensor.size, dtype=tensor.properties.dtype)
            for name, tensor in found.items()
            if isinstance(tensor, TensorStorageMetadata) and name.split("/")[0] in only
        }
        load(whole, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None
    by_kind: dict[str, dict[str, Tensor]] = {kind: {} for kind in only}
    for name, tensor in whole.items():
        kind, _, own = name.partition("/")
        by_kind[kind][own] = tensor
    return by_kind, record


def saved_names(path: Path, record: Mapping[str, Any], copied: bool) -> set[str]:
    """The names of all tensors in a checkpoint whose files are whole; each rank looks at some of them. copied: each
    machine has files of its own, at which its ranks look. Collective call. Raises CheckpointError."""
    rank, ranks = rank_and_count_on_node() if copied else rank_and_count()
    errors, names = [], set()
    try:
        _check_files(path, dict(sorted(record["files"].items())[rank::ranks]))
        names = set(HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata)
    except _UNREADABLE as error:
        errors = [_unreadable(path, error)]
    except CheckpointError as error:
        errors = [error]
    for first in list_of_ranks(errors):
        raise first
    return names


def load_into(path: Path, state: Mapping[str, Tensor]) -> None:
    """Fills these tensors in place. Each rank reads the shards that it has, and its part of what all have whole, which
    it sends to the others. Collective call. Raises CheckpointError."""
    try:
        load(own_part(state), storage_reader=HuggingFaceStorageReader(str(path)))
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None
    send_parts(state)


def _check_files(path: Path, files: Mapping[str, Any]) -> None:
    for name, expected in files.items():
        if Path(name).name != name:
            raise CheckpointError(f"checkpoint {path}: names the file {name} of another folder; {_remedy(path)}")
        if (path / name).stat().st_size != expected["bytes"] or _sha256(path / name) != expected["sha256"]:
            raise CheckpointError(f"checkpoint {path}: {name} is not what was written; {_remedy(path)}")


def cause(error: BaseException) -> BaseException:
    """What has failed on a rank, where that is what torch's collective functions raise."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def _unreadable(path: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(f"checkpoint {path}: cannot be read ({cause(error)}); {_remedy(path)}")


def _remedy(path: Path) -> str:
    return f"remove {path} to go on from the one before it"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
