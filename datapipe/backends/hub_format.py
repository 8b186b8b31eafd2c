"""A model's folder in hub format: whether its files are whole, and what makes it this model and no other."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
"""Lists the files that hold the tensors, where there are several."""

_TOKENIZERS = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
_READ_TOO = (".jinja", ".json", ".model", ".txt")
"""Endings of what decides, besides the weights, what a model answers: configuration, tokenizer, generation settings,
image processor and chat template."""
_LFS_POINTER = b"version https://git-lfs"


def folder_problem(folder: Path, processor: bool, tokenizer: bool) -> str | None:
    """Why the folder cannot be loaded as far as its files tell, with what to do; None when they are whole. Reads no
    tensor. `processor`, `tokenizer`: whether the model needs them."""
    names = {path.name for path in folder.iterdir()}
    for path in sorted(folder.glob("*.json")):
        if problem := _json_problem(path):
            return f"{path.name} {problem}"
    if "config.json" not in names:
        return "the folder holds no config.json; it must be in hub format (save_pretrained)"
    if problem := names_problem(names, processor, tokenizer):
        return problem
    for name in _weight_files(folder):
        if name not in names:
            return f"{name} is missing, which {INDEX} lists; download it again"
        if problem := _safetensors_problem(folder / name):
            return f"{name} {problem}"
    return None


def names_problem(names: Iterable[str], processor: bool, tokenizer: bool) -> str | None:
    """The same from the names of the files alone."""
    names = set(names)
    if not names & {WEIGHTS, INDEX}:
        others = sorted(n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")))
        if others:
            return (
                f"has its weights as {others[0]} only, and files that can run code are not loaded; "
                f"convert them to {WEIGHTS} (save_pretrained), or take a revision that has it"
            )
        return f"holds no weights ({WEIGHTS}); download them"
    if processor and not names & set(_PROCESSORS):
        return f"comes without an image processor ({' or '.join(_PROCESSORS)}); download it from the model's page"
    # Without its files transformers makes a tokenizer that knows no word, and says nothing.
    if tokenizer and not names & set(_TOKENIZERS):
        return f"comes without a tokenizer ({_TOKENIZERS[0]}, {_TOKENIZERS[1]} or the like); download it"
    return None


def model_type(config: Path) -> str | None:
    """The kind of model that a config.json describes; None when it does not say."""
    tree = json.loads(config.read_text("utf-8"))
    return str(tree["model_type"]) if isinstance(tree, dict) and "model_type" in tree else None


def deciding_files(names: Iterable[str]) -> list[str]:
    """Of the files of a model's folder, named relative to it, those that decide what the model answers."""
    return [
        name
        for name in names
        if not any(part.startswith(".") for part in name.split("/"))
        and (name.endswith(_READ_TOO) or ("/" not in name and name.endswith(".safetensors")))
    ]


def folder_digest(folder: Path) -> str:
    """The first 16 digits of the SHA-256 of all files that decide what the model answers, with their names."""
    names = deciding_files(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    return digest_of(folder, sorted(folder / name for name in names))


def digest_of(root: Path, files: Sequence[Path]) -> str:
    """The first 16 digits of the SHA-256 of the files and, when they are several, of their names below `root`."""
    stats = [(path, path.stat()) for path in files]
    return _digest(str(root), tuple((str(path), stat.st_mtime_ns, stat.st_size) for path, stat in stats))


@functools.cache
def _digest(root: str, files: tuple[tuple[str, int, int], ...]) -> str:
    """The files are read again only when a time of change or a size differs."""
    digest = hashlib.sha256()
    for path, _, size in files:
        if path != root:
            digest.update(f"{Path(path).relative_to(root).as_posix()}\0{size}\0".encode())
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def _weight_files(folder: Path) -> Iterator[str]:
    if (folder / WEIGHTS).exists():
        yield WEIGHTS
        return
    index = json.loads((folder / INDEX).read_text("utf-8"))
    yield from sorted(set(index["weight_map"].values()))


def _json_problem(path: Path) -> str | None:
    data = path.read_bytes()
    if data.startswith(_LFS_POINTER):
        return _POINTER
    try:
        tree = json.loads(data)
    except ValueError as error:  # of JSON and of UTF-8
        return f"is no JSON ({error}); download it again"
    if path.name == INDEX and not isinstance(tree.get("weight_map") if isinstance(tree, dict) else None, dict):
        return "has no weight_map; download it again"
    return None


_POINTER = "is a git-LFS pointer and not the file; `git lfs pull` in its folder fetches that"


def _safetensors_problem(path: Path) -> str | None:
    """A safetensors file is 8 bytes of the header's length, the header in JSON, and the tensors."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(len(_LFS_POINTER))
        if not first:
            return "is empty; download it again"
        if first == _LFS_POINTER:
            return _POINTER
        length = int.from_bytes(first[:8], "little")
        if length > size - 8:
            return f"is cut short or no safetensors file ({size:,} bytes); download it again"
        file.seek(8)
        header = file.read(length)
    try:
        tensors = json.loads(header)
        wanted = 8 + length + max((t["data_offsets"][1] for n, t in tensors.items() if n != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        return "is no safetensors file; download it again"
    if size != wanted:
        return f"has {size:,} bytes where {wanted:,} belong; download it again"
    return None
