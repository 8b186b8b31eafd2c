"""Which `pip install` helps where a package is missing that the base installation leaves out."""

from __future__ import annotations

import importlib.util

_OF_PACKAGE = {
    "av": "video",
    "datasets": "hf",
    "faiss": "pairs",
    "gcsfs": "gs",
    "gradio": "page",
    "groundingdino": "original",
    "httpx2": "label",
    "openai": "label",
    "peft": "train",
    "s3fs": "s3",
    "segment_anything": "original",
    "spacy": "label",
}
_SHARED = {
    "accelerate",
    "diffusers",
    "h11",
    "huggingface_hub",
    "pandas",
    "protego",
    "ray",
    "safetensors",
    "scipy",
    "tensorboard",
    "torch",
    "torchvision",
    "transformers",
}
"""Packages of more than one extra: what was asked for says which is meant."""
_ALONE = {"groundingdino": "groundingdino-py==0.4.0", "gradio": "gradio==6.31.0 hf-gradio==0.4.1"}
"""What is installed after its extra, without the dependencies that it asks for."""
_TELLS = {"label": ("torch", "transformers"), "train": ("torch", "diffusers", "ray"), "page": ("gradio", "torch")}
"""Packages of an extra that are looked for before anything else is done."""


def require(extra: str) -> None:
    """Raises ModuleNotFoundError at once where an extra is not installed, before arguments or files are judged."""
    for package in _TELLS[extra]:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(_help(package, extra), name=package)


def help_for(error: ImportError, extra: str = "train") -> str | None:
    """One line, or None when the package is not one that an extra brings.

    extra: the one to install where several would bring the package.
    """
    package = (error.name or "").partition(".")[0]
    extra = _OF_PACKAGE.get(package, extra if package in _SHARED else "")
    if not extra:
        return None
    return _help(package, extra)


def _help(package: str, extra: str) -> str:
    line = f"{package} is not installed; in the project's folder, pip install '.[{extra}]' brings it"
    alone = _ALONE.get(package)
    return line if alone is None else f"{line}, and then pip install --no-deps {alone}"
