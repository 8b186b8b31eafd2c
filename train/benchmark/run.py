"""A benchmark from question to result: draw what is missing, then score."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from datapipe.backends.loading import ModelSettings, model_identity
from datapipe.recipe import Recipe
from train.benchmark.backbones import Backbone, PatchBackbone
from train.benchmark.drawing import check_drawing, claim, draw, drawn_by, path_of
from train.benchmark.faces import Faces
from train.benchmark.measure import Measuring, Pairing, measuring_code
from train.benchmark.options import BackboneSettings, Drawing, Share
from train.benchmark.protocol import Item, Protocol, Reference
from train.benchmark.result import Result, summarize
from train.benchmark.scores import Mask
from train.benchmark.seen import METRIC, Picture, Viewer
from train.evaluation.metrics import Locator
from train.evaluation.pictures import open_picture
from train.sampling.trained import find_model


@dataclass(frozen=True)
class Question:
    """A benchmark, and what its pictures are compared by. labels: whose detector and segmenter cut subjects out; None:
    nothing is; name: what the result is called."""

    protocol: Protocol
    labels: Recipe | None
    backbones: Mapping[str, BackboneSettings]
    pairing: Pairing
    name: str


def run_benchmark(asked: Question, drawing: Drawing, out: Path, share: Share) -> Result | None:
    """Draws what is missing, scores it and writes the result; None where other processes draw too. Raises SddError."""
    check_drawing(find_model(drawing.model), drawing.sampler, asked.protocol)
    protocol, labels = asked.protocol, finder_identity(asked.labels)
    drawn = drawn_by(drawing.model, protocol, drawing.sampler, drawing.seed, labels)
    claim(out, drawn, shared=share.of > 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mask_of = _masks(protocol, Locator(asked.labels) if asked.labels else None)
    draw(drawing.model, protocol, mask_of, drawing.sampler, drawing.seed, out, share, device)
    if share.of > 1:
        return None
    return score_pictures(asked, {item: path_of(out, item) for item in protocol.items}, drawn, drawing.seed, out)


def score_given(asked: Question, protocol: Protocol, pictures: Mapping[Item, Path], out: Path) -> Result:
    """Scores pictures that somebody else drew. protocol: what of the question's they answer. Raises SddError."""
    return score_pictures(dataclasses.replace(asked, protocol=protocol), pictures, {"pictures": "given"}, None, out)


def score_pictures(
    asked: Question, pictures: Mapping[Item, Path], drawn: dict[str, Any], seed: int | None, out: Path
) -> Result:
    """Scores the pictures of all items, and writes the result. drawn: how they came to be; seed: of those that were
    drawn here. Raises SddError."""
    viewer = load_viewer(asked.backbones, Locator(asked.labels) if asked.labels else None)
    measuring = Measuring(asked.protocol, viewer, asked.pairing)
    found = measuring.measure(lambda item: open_picture(pictures[item]).convert("RGB"))
    measured = {
        "protocol": asked.protocol.identity(),
        "pairing": asked.pairing,
        "backbones": viewer.identity(),
        "labels": finder_identity(asked.labels),
        "code": measuring_code(),
    }
    names = {role: backbone.model for role, backbone in asked.backbones.items()}
    files = {item: os.path.relpath(path, out) for item, path in pictures.items()}
    result = summarize(asked.name, measured, drawn, names, found, seed, files)
    result.write(out)
    return result


def load_viewer(backbones: Mapping[str, BackboneSettings], locate: Locator | None) -> Viewer:
    """Raises BackendError."""
    whole = {role: Backbone(role, settings) for role, settings in backbones.items() if role in METRIC}
    patches, faces = backbones.get(PatchBackbone.role), backbones.get(Faces.role)
    return Viewer(whole, PatchBackbone(patches) if patches else None, locate, Faces(faces) if faces else None)


def finder_identity(labels: Recipe | None) -> dict[str, Any] | None:
    """The detector and the segmenter with their settings, by weights rather than by where they lie."""
    if labels is None:
        return None
    return {name: _weights_not_paths(getattr(labels, name)) for name in ("ground", "segment")}


def _weights_not_paths(settings: ModelSettings) -> dict[str, Any]:
    return settings.identity() | {"model": model_identity(settings).rpartition("@")[2]}


def _masks(protocol: Protocol, locate: Locator | None) -> Callable[[Reference], Mask | None]:
    viewer = Viewer({}, None, locate)

    def mask_of(reference: Reference) -> Mask | None:
        noun = protocol.subjects[reference.subject].noun
        return viewer.mask(Picture(open_picture(reference.photograph).convert("RGB"), f"a photo of a {noun}", noun))

    return mask_of
