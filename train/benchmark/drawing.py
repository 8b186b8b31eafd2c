"""The pictures of a benchmark, drawn by a pipeline, in any number of processes: only those that are missing."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.progress import track

from datapipe.shards.store import Store
from model import Subject
from subject_diffusion._version import __version__
from subject_diffusion.errors import RunError
from subject_diffusion.settings import leaves
from train.benchmark.options import Sampler, Share
from train.benchmark.protocol import Item, Protocol, Reference
from train.benchmark.scores import Mask
from train.evaluation.pictures import open_picture
from train.sampling.trained import TrainedModel, find_model
from train.trainer.pipeline import open_pipeline

DRAWN = "drawn.json"
IMAGES = "images"
TOGETHER = 8
"""Pictures that are drawn at once. Which ones is fixed, so that one that is drawn again is the same to the bit."""


def drawn_by(model: Path, protocol: Protocol, sampler: Sampler, seed: int, labels: Any) -> dict[str, Any]:
    """Everything that decides what is drawn, as JSON. labels: what cuts the references out. Raises SddError."""
    return {
        "model": find_model(model).digest()[:16],
        "sampler": sampler.model_dump(mode="json"),
        "seed": seed,
        "asked": protocol.identity()["asked"],
        "labels": labels,
        "version": __version__,
    }


def check_drawing(model: TrainedModel, sampler: Sampler, protocol: Protocol) -> None:
    """Raises RunError for what the model cannot draw."""
    for side in ("height", "width"):
        pixels = getattr(sampler, side)
        if pixels is not None and pixels % model.factor:
            raise RunError(f"--set {side}={pixels}: it must be a multiple of {model.factor}")
    most = max(len(item.references) for item in protocol.items)
    if most > model.max_subjects:
        raise RunError(f"{protocol.suite} has {most} subjects in a picture; the model takes {model.max_subjects}")


def claim(out: Path, drawn: dict[str, Any], shared: bool = False) -> None:
    """Makes the folder that of these pictures; raises RunError where it holds others. shared: other processes draw
    into it too, so that a claim holds though nothing is drawn yet: theirs may be about to."""
    path = out / DRAWN
    out.mkdir(parents=True, exist_ok=True)
    begun = path.exists() and any((out / IMAGES).glob("*/*"))
    if not (begun or shared):
        Store(str(out)).put(DRAWN, json.dumps(drawn, indent=1).encode())
        return
    if not begun:
        _claim_first(path, json.dumps(drawn, indent=1))
    before, now = (dict(leaves(tree)) for tree in (json.loads(path.read_text("utf-8")), drawn))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            advice = "name another --out" + ("" if begun else f", or, if nothing draws there, remove {path}")
            raise RunError(
                f"{out}: its pictures are drawn otherwise: {key} was {before.get(key)} and is now {now.get(key)}; "
                f"{advice}"
            )


def _claim_first(path: Path, text: str) -> None:
    """Writes the file, whole, unless it is there."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".claim-") as file, suppress(FileExistsError):
        file.write(text)
        file.flush()
        os.link(file.name, path)


def draw(
    model: Path,
    protocol: Protocol,
    mask_of: Callable[[Reference], Mask | None],
    sampler: Sampler,
    seed: int,
    out: Path,
    share: Share,
    device: torch.device,
) -> None:
    """Draws what is missing of this process's share. A picture appears whole or not at all. mask_of: where a
    reference's photograph shows its subject. Raises SddError."""
    missing = [batch for batch in _batches(protocol, share) if not all(path_of(out, item).exists() for item in batch)]
    if not missing:
        return
    pipe = open_pipeline(model).to(device)
    pipe.set_progress_bar_config(disable=True)
    shown: dict[Reference, Subject] = {}
    for batch in track(missing, f"drawing, {sum(map(len, missing)):,} pictures", transient=True):
        for reference in {r for item in batch for r in item.references} - shown.keys():
            noun = protocol.subjects[reference.subject].noun
            image = open_picture(reference.photograph).convert("RGB")
            shown[reference] = Subject(image, noun, mask=mask_of(reference), box=reference.box)
        images = pipe(
            [item.text for item in batch],
            subjects=[[shown[r] for r in item.references] for item in batch],
            generator=[torch.Generator().manual_seed(item.seed(seed)) for item in batch],
            **sampler.model_dump(),
        ).images
        for item, image in zip(batch, images, strict=True):
            _put(path_of(out, item), image)


def path_of(out: Path, item: Item) -> Path:
    """Where an item's picture is."""
    return out / IMAGES / item.file


def _batches(protocol: Protocol, share: Share) -> Iterator[tuple[Item, ...]]:
    for number, start in enumerate(range(0, len(protocol.items), TOGETHER)):
        if number % share.of == share.number - 1:
            yield protocol.items[start : start + TOGETHER]


def _put(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sink = io.BytesIO()
    image.save(sink, "PNG")
    Store(str(path.parent)).put(path.name, sink.getvalue())
