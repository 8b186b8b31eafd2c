"""Base and image encoder, wherever they are: a folder, a bucket, or a model of the hub; fetched once a node, unless it
has the folder on a disk of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from datapipe.backends.hub import HubModel
from datapipe.shards.store import Store
from subject_diffusion.errors import BackendError, RunError
from subject_diffusion.node_copy import node_copy, node_local
from subject_diffusion.packaged import local_path

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_READ = (".json", ".txt", ".safetensors")
"""Endings of what is loaded of a model's folder."""
_BESIDE_PARTS = ("model_index.json", "recipe.json")
"""What is loaded of a pipeline's folder itself."""


def check_model(key: str, where: str) -> None:
    """Whether there is such a model, without fetching it. key: the recipe's. Raises RunError."""
    if local_path(where).is_dir():
        return
    if "://" in where:
        Store(where, create=False)
        return
    missing = f"{key} {where}: no such folder"
    if not _HUB_ID.fullmatch(where):
        raise RunError(f"{missing}; download the model there, or set {key} to its folder, a bucket or a hub id")
    try:
        if HubModel(key, where, None).file_names() is None:
            model_folder(key, where)
    except BackendError as error:
        raise RunError(f"{missing}, and on the hub: {error}") from None


def model_folder(key: str, where: str) -> Path:
    """A model's folder on this machine, fetched if it is elsewhere. Raises RunError, BackendError."""
    if local_path(where).is_dir():
        return node_local(local_path(where), loaded_files, RunError, f"{key} {where}")
    return node_copy(where, loaded_files, RunError) if "://" in where else _from_hub(key, where)


def _from_hub(key: str, name: str) -> Path:
    from huggingface_hub import snapshot_download

    model = HubModel(key, name, None)
    files = model.file_names()
    try:
        if files is None:  # no connection
            return Path(snapshot_download(name, local_files_only=True))
        return Path(snapshot_download(name, allow_patterns=loaded_files(files)))
    except Exception as error:  # the hub client raises its own, the HTTP client's and the system's classes
        raise model.refused(error) from None


def loaded_files(names: Sequence[str]) -> list[str]:
    """Those of a folder's files that are loaded: not the weights in one file beside a pipeline's parts, nor in half
    precision beside the same ones in full."""
    parts = "model_index.json" in names
    return [
        name
        for name in names
        if name.endswith(_READ)
        and (("/" in name) == parts or name in _BESIDE_PARTS)
        and not name.startswith("safety_checker/")
        and not (".fp16." in name and name.replace(".fp16.", ".") in names)
    ]
