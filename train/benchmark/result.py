"""A result: what was measured, how, and every score with its interval; as the JSON that is kept and compared."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from datapipe.shards.store import Store
from subject_diffusion.errors import RunError
from train.benchmark.measure import TEXT, Measured, Pairing, Scored
from train.benchmark.protocol import Item
from train.evaluation.report import RESAMPLES, Mean

RESULT = "result.json"

Means = dict[str, Mean]
"""By measure."""


class _Protocol(BaseModel):
    groups: list[str] = Field(min_length=1)
    prompts: int
    images_per_prompt: int


class _Measured(BaseModel):
    protocol: _Protocol
    pairing: Pairing


class _Image(BaseModel):
    file: str
    group: str
    prompt: str
    index: int
    scores: dict[str, float]


class _Form(BaseModel):
    """What a comparison reads of a result's JSON."""

    name: str
    suite: str
    measured: _Measured
    drawn: dict[str, Any]
    backbones: dict[str, str]
    overall: dict[str, dict[str, float]]
    ceiling: dict[str, dict[str, float]]
    copied: dict[str, dict[str, float]]
    images: list[_Image] = Field(min_length=1)


@dataclass(frozen=True)
class Result:
    """measured: all that decides how pictures are scored, which two results must share to be compared; drawn: how the
    pictures came to be; images: for each, file, group, prompt, index, seed, subjects and scores."""

    name: str
    suite: str
    measured: dict[str, Any]
    drawn: dict[str, Any]
    backbones: dict[str, str]
    overall: Means
    ceiling: Means
    copied: Means
    subjects: dict[str, Means]
    prompts: dict[str, Means]
    images: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Result:
        _Form.model_validate(tree)
        fields = dict(tree)
        for name in ("overall", "ceiling", "copied"):
            fields[name] = _means(tree[name])
        for name in ("subjects", "prompts"):
            fields[name] = {key: _means(means) for key, means in tree[name].items()}
        return cls(**fields)

    def write(self, out: Path) -> None:
        Store(str(out)).put(RESULT, json.dumps(self.to_json(), indent=1).encode())


def read_result(path: Path) -> Result:
    """path: of the JSON, or of its folder. Raises RunError."""
    file = path / RESULT if path.is_dir() else path
    try:
        return Result.from_json(json.loads(file.read_text("utf-8")))
    except OSError:
        raise RunError(f"{path}: no {RESULT} there; `sdd evaluate --suite …` writes it") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RunError(f"{file}: not a result of `sdd evaluate` with a benchmark's suite") from None


def summarize(
    name: str,
    measured: dict[str, Any],
    drawn: dict[str, Any],
    backbones: dict[str, str],
    found: Measured,
    seed: int | None,
    files: Mapping[Item, str],
) -> Result:
    """files: of the pictures, seen from the result's folder.

    Intervals are of a bootstrap over what a score should hold beyond: overall over subjects, each with all of its
    pictures; a subject's over its prompts; a prompt's over subjects; a picture's over the photographs that it is
    compared with.
    """
    return Result(
        name,
        measured["protocol"]["suite"],
        measured,
        drawn,
        backbones,
        aggregate(found.pictures, _group),
        aggregate(found.ceiling, _group),
        aggregate(found.copied, _group),
        _by(found.pictures, _group, _prompt),
        _by(found.pictures, _template, _group),
        [_image(scored, seed, files[scored.item]) for scored in found.pictures],
    )


def aggregate(scored: Sequence[Scored], over: Callable[[Scored], Hashable]) -> Means:
    """Each measure's mean over pictures; over: by what the bootstrap draws."""
    values = [picture_values(s) for s in scored]
    return {
        name: cluster_mean(
            np.array([v[name] for v in values if name in v]),
            [over(s) for s, v in zip(scored, values, strict=True) if name in v],
        )
        for name in dict.fromkeys(name for v in values for name in v)
    }


def _by(scored: Sequence[Scored], key: Callable[[Scored], str], over: Callable[[Scored], Hashable]) -> dict[str, Means]:
    alike: dict[str, list[Scored]] = {}
    for one in scored:
        alike.setdefault(key(one), []).append(one)
    return {name: aggregate(some, over) for name, some in alike.items()}


def picture_values(scored: Scored) -> dict[str, float]:
    """One value of each measure: the mean over subjects of the mean over photographs."""
    names = dict.fromkeys(name for own in scored.by_subject for name in own)
    values = {n: float(np.mean([np.mean(own[n]) for own in scored.by_subject if n in own])) for n in names}
    return values if scored.text is None else {**values, TEXT: scored.text}


def cluster_mean(values: NDArray[np.float64], clusters: Sequence[Hashable]) -> Mean:
    """The mean of values (N,), with the 95 % interval of a percentile bootstrap that draws whole clusters; where there
    is one cluster, that draws values. A single value is its own interval."""
    keys = {key: number for number, key in enumerate(dict.fromkeys(clusters))}
    places = np.array([keys[key] for key in clusters]) if len(keys) > 1 else np.arange(len(values))
    sums, counts = np.bincount(places, weights=values), np.bincount(places)
    drawn = _draws(len(sums))
    low, high = np.quantile(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1), [0.025, 0.975])
    return Mean(float(values.mean()), float(low), float(high))


@functools.cache
def _draws(count: int) -> NDArray[np.int64]:
    """(RESAMPLES, count)."""
    return np.random.default_rng(0).integers(count, size=(RESAMPLES, count))


def _image(scored: Scored, seed: int | None, file: str) -> dict[str, Any]:
    item = scored.item
    spread = {name: [v for own in scored.by_subject for v in own.get(name, [])] for name in picture_values(scored)}
    values = picture_values(scored)
    intervals = {n: cluster_mean(np.array(v), range(len(v))) for n, v in spread.items() if len(v) > 1}
    return {
        "file": file,
        "group": item.group,
        "prompt": item.text,
        "index": item.index,
        "seed": None if seed is None else item.seed(seed),
        "scores": values,
        "intervals": {name: [mean.low, mean.high] for name, mean in intervals.items()},
        "subjects": [
            {"name": r.subject, "reference": r.photograph.name, "box": r.box, "scores": _plain(own)}
            for r, own in zip(item.references, scored.by_subject, strict=True)
        ],
    }


def _plain(own: Mapping[str, Iterable[float]]) -> dict[str, float]:
    return {name: float(np.mean(list(values))) for name, values in own.items()}


def _means(tree: Mapping[str, Any]) -> Means:
    return {name: Mean(**mean) for name, mean in tree.items()}


def _group(scored: Scored) -> str:
    return scored.item.group


def _prompt(scored: Scored) -> int:
    return scored.item.prompt


def _template(scored: Scored) -> str:
    return scored.item.template
