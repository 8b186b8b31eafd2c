"""Where models come from: a folder in hub format, an original checkpoint file, or a hub id at a revision."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field

from datapipe.errors import BackendError
from datapipe.settings import Settings

if TYPE_CHECKING:
    import torch

Dtype = Literal["float32", "bfloat16", "float16"]
Loaded = TypeVar("Loaded")

_PROJECT = Path(__file__).parents[2]


class ModelSettings(Settings):
    """What every model stage has in common. Subclasses give `model` its default."""

    model: str
    """Hub id, or folder in hub format (relative to the working directory or to this project), or checkpoint file."""
    revision: str | None = None
    """Commit, tag or branch of a hub id; none: main."""
    dtype: Dtype = "float32"
    """Of weights and activations on a GPU; a CPU computes in float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    micro_batch: int = Field(8, ge=1)
    """Images that go through the model at once."""


def device_of(settings: ModelSettings) -> torch.device:
    """Raises BackendError when a GPU is asked for where there is none."""
    import torch

    if settings.device == "cuda" and not torch.cuda.is_available():
        raise BackendError(f"{settings.model}: device cuda is asked for and no GPU is visible; use auto or cpu")
    return torch.device("cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu")


def dtype_of(settings: ModelSettings) -> torch.dtype:
    """The settings' on a GPU, else float32."""
    import torch

    # Many CPU kernels lack half precision.
    return getattr(torch, settings.dtype) if device_of(settings).type == "cuda" else torch.float32


def locate(settings: ModelSettings) -> str:
    """The local path of the model if it is one, else its hub id."""
    for path in (Path(settings.model), _PROJECT / settings.model):
        if path.exists():
            return str(path)
    return settings.model


def identity(settings: ModelSettings) -> str:
    """What is recorded of a model: "id@revision", or for local weights "path@" and the start of their SHA-256."""
    place = Path(locate(settings))
    if not place.exists():
        return f"{settings.model}@{settings.revision or 'main'}"
    weights = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    return f"{settings.model}@{_digest(tuple((str(p), p.stat().st_mtime_ns) for p in weights))}"


@functools.cache
def _digest(files: tuple[tuple[str, int], ...]) -> str:
    """Of the files' content; read again only when a time of change differs."""
    digest = hashlib.sha256()
    for path, _ in files:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def check_model(settings: ModelSettings, key: str, file: str = "config.json") -> None:
    """Makes sure, cheaply, that a model in hub format is there or can be fetched. Raises BackendError. `key`: of the
    recipe, for the message."""
    if settings.device == "cuda":
        device_of(settings)
    place = Path(locate(settings))
    if place.is_file():
        raise BackendError(
            f"{key} {settings.model}: a file, where a folder in hub format is wanted; for an original checkpoint set "
            f"{key.partition('.')[0]}.backend"
        )
    if place.is_dir():
        if (place / file).exists():
            return
        raise BackendError(
            f"{key} {settings.model}: the folder holds no {file}; it must be in hub format (save_pretrained)"
        )
    if settings.model.count("/") != 1 or settings.model.startswith((".", "/", "~")):
        raise BackendError(
            f"{key} {settings.model}: no such folder or file; download the weights there, or give a hub id"
        )
    fetch_from_hub(settings, key, file)


def check_checkpoint(settings: ModelSettings, key: str) -> None:
    """Makes sure, cheaply, that a checkpoint file of an original implementation is there. Raises BackendError."""
    if settings.device == "cuda":
        device_of(settings)
    if not settings.model.endswith((".pth", ".pt")) or not Path(locate(settings)).is_file():
        raise BackendError(
            f"{key} {settings.model}: no such .pth file, and this backend wants an original checkpoint; "
            f"download it there, or set {key.partition('.')[0]}.backend=transformers"
        )


def fetch_from_hub(settings: ModelSettings, key: str, file: str) -> str:
    """The local path of one file of a hub repository. Raises BackendError."""
    from huggingface_hub import hf_hub_download

    try:
        return str(hf_hub_download(settings.model, file, revision=settings.revision))
    except Exception as error:  # the hub client raises its own, requests' and httpx's classes, and OSError
        raise BackendError(
            f"{key} {settings.model}: not here and not to be had from the hub ({type(error).__name__}); "
            f"download it where there is a connection and give its folder"
        ) from None


def load(settings: ModelSettings, loader: Callable[..., Loaded], **options: Any) -> Loaded:
    """Calls a `from_pretrained` on the model. Never runs code that comes with it. Raises BackendError."""
    try:
        return loader(locate(settings), revision=settings.revision, trust_remote_code=False, **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise BackendError(f"{settings.model}: cannot be loaded: {_one_line(error)}") from error


def load_checkpoint(settings: ModelSettings, model: torch.nn.Module, may_miss: str = "$^") -> None:
    """Puts the tensors of an original checkpoint into a model. Runs no code of the file. Raises BackendError.

    `may_miss`: pattern of the names that the checkpoint need not hold. Names that the model does not know are left out:
    published checkpoints have some.
    """
    import torch

    try:
        tree = torch.load(locate(settings), map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises over bytes that are no checkpoint is of any class
        raise BackendError(f"{settings.model}: no readable checkpoint of tensors alone: {_one_line(error)}") from error
    state = tree.get("model", tree) if isinstance(tree, dict) else {}
    state = {str(name).removeprefix("module."): tensor for name, tensor in state.items()}
    try:
        missing, _ = model.load_state_dict(state, strict=False)
    except (RuntimeError, AttributeError) as error:
        raise BackendError(
            f"{settings.model}: a checkpoint of another size of model; check its settings: {_one_line(error)}"
        ) from error
    missing = [name for name in missing if not re.search(may_miss, name)]
    if missing:
        raise BackendError(
            f"{settings.model}: lacks {len(missing)} of the model's tensors (such as {missing[0]}); "
            f"is it a checkpoint of this model?"
        )


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def load_model(settings: ModelSettings, loader: Callable[..., Any], **options: Any) -> Any:
    """A transformers model in evaluation mode, on its device in its dtype, from safetensors only."""
    model = load(settings, loader, use_safetensors=True, dtype=dtype_of(settings), **options)
    return model.to(device_of(settings)).eval()
