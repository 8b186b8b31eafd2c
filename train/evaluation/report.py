"""What an evaluation was asked and what it found: typed, and as the JSON and the picture that a run keeps."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from rich.table import Table
from scipy import stats

from datapipe.pairs.settings import EmbedSettings
from datapipe.recipe import Recipe
from datapipe.shards.store import Store
from subject_diffusion.settings import Settings, StringSet
from train.evaluation.cases import Case
from train.evaluation.metrics import METRICS, Scores
from train.trainer.recipe import ValidationSettings
from train.trainer.validation import grid

REPORT = "report.json"
RESAMPLES = 2000
TEXT = "text"
"""The one metric of a whole sample: how well it matches its caption."""

Way = Literal["subject", "shuffled", "base", "true"]
"""How a case is drawn: with its references, with those of another case, by the base model, or not at all: true images
show what can be reached."""
_HEADINGS = {"subject": "drawn", "shuffled": "other's reference", "base": "base model", "true": "true image"}
"""Headings of the columns of pictures."""


class IdentityEncoder(EmbedSettings):
    """The encoder that tells individuals apart. The toy world's own has learned from rough drawings, too."""

    key: ClassVar[str] = "--identity-encoder"
    model: str = "toyworld/weights/identity-of-samples"


class Evaluation(Settings):
    """What is asked of a run."""

    data: str
    """Dataset of images that the run has not seen."""
    images: int = Field(ge=2)
    """How many of them."""
    subjects: int = Field(1, ge=1)
    """Subjects of each; images with fewer are left out."""
    tags: StringSet | None = None
    """Only subjects of these tags; default: all."""
    labels: Recipe
    """Its detector and segmenter find the subjects in the samples."""
    ways: tuple[Way, ...] = ("subject", "shuffled", "base", "true")
    identity_encoder: IdentityEncoder = IdentityEncoder()


@dataclass(frozen=True)
class Mean:
    """With its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Scored:
    """One image of each way of drawing. `samples`, `scores`: by way; those of every subject."""

    case: Case
    samples: dict[str, Image.Image]
    scores: dict[str, list[Scores]]
    text: dict[str, float]
    """Cosine of CLIP's embeddings of sample and caption."""
    chance: float
    """`identity` of a guess, mean over the subjects."""


@dataclass(frozen=True)
class Group:
    """Scores of some of the images, by way of drawing and by metric. chance: `identity` of a guess."""

    images: int
    chance: float
    means: dict[str, dict[str, Mean]]
    gains: dict[str, dict[str, Mean]]
    """How much better `subject` is, image by image, by "subject over" the other way."""
    per_image: dict[str, dict[str, list[float]]]

    @classmethod
    def of(cls, scored: Sequence[Scored]) -> Group:
        values = {way: _values(scored, way) for way in scored[0].samples}
        gains = {
            f"subject over {way}": {
                name: mean_over_images(metric.better * (values["subject"][name] - others[name]))
                for name, metric in METRICS.items()
            }
            for way, others in values.items()
            if way not in ("subject", "true")
        }
        means = {way: {name: mean_over_images(v) for name, v in named.items()} for way, named in values.items()}
        per_image = {way: {name: v.tolist() for name, v in named.items()} for way, named in values.items()}
        return cls(len(scored), float(np.mean([s.chance for s in scored])), means, gains, per_image)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Group:
        means, gains = (
            {way: {name: Mean(**mean) for name, mean in named.items()} for way, named in tree[part].items()}
            for part in ("means", "gains")
        )
        return cls(tree["images"], tree["chance"], means, gains, tree["per_image"])


@dataclass(frozen=True)
class Report:
    """asked: the question; drawn: how the samples were; groups: by name, "all" first."""

    asked: Evaluation
    drawn: ValidationSettings
    groups: dict[str, Group]

    def to_json(self) -> dict[str, Any]:
        return {
            "asked": self.asked.model_dump(mode="json"),
            "drawn": self.drawn.model_dump(mode="json"),
            "groups": {name: dataclasses.asdict(group) for name, group in self.groups.items()},
        }

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Report:
        return cls(
            Evaluation.model_validate(tree["asked"]),
            ValidationSettings.model_validate(tree["drawn"]),
            {name: Group.from_json(group) for name, group in tree["groups"].items()},
        )

    def tables(self) -> list[Table]:
        """One per group, for the terminal."""
        shown = []
        for name, group in self.groups.items():
            metrics = list(next(iter(group.means.values())))
            title = f"{name}: {group.images} images; identity by chance {group.chance:.3f}"
            table = Table("", *metrics, title=title, title_justify="left", box=None)
            for way, by_metric in (group.means | group.gains).items():
                table.add_row(way, *(str(by_metric[m]) if m in by_metric else "" for m in metrics))
            shown.append(table)
        return shown


def compared(reports: Mapping[str, Report]) -> Table:
    """What each of several models reached with its references, by its name. reports: of the same question."""
    metrics = [*METRICS, TEXT]
    table = Table("", *metrics, box=None)
    for name, report in reports.items():
        means = report.groups["all"].means["subject"]
        table.add_row(name, *(str(means[metric]) for metric in metrics))
    return table


def grouped(scored: Sequence[Scored], new_tags: frozenset[str]) -> dict[str, Group]:
    """new_tags: nouns that were never a reference in training; images with one are a group of their own."""
    groups: dict[str, list[Scored]] = {"all": list(scored)}
    if new_tags:
        new = [s for s in scored if any(x.tag in new_tags for x in s.case.subjects)]
        groups["new nouns"] = new
        groups["known nouns"] = [s for s in scored if s not in new]
    return {name: Group.of(members) for name, members in groups.items() if len(members) > 1}


def _values(scored: Sequence[Scored], way: str) -> dict[str, NDArray[np.float64]]:
    """Each metric, (N,): per image, the mean over its subjects."""
    values = {name: np.array([np.mean([s[name] for s in image.scores[way]]) for image in scored]) for name in METRICS}
    return {**values, TEXT: np.array([image.text[way] for image in scored])}


def mean_over_images(values: NDArray[np.float64]) -> Mean:
    """values: (N,), one per image. The interval is that of a bootstrap over images."""
    if np.ptp(values) == 0:
        return Mean(*[float(values[0])] * 3)
    interval = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return Mean(float(values.mean()), float(interval.low), float(interval.high))


def write_report(report: Report, scored: Sequence[Scored], out: Path, pictures: int = 12) -> None:
    """`report.json`, and `samples.png`: references | boxes | a column per way."""
    Store(str(out)).put(REPORT, json.dumps(report.to_json(), indent=1).encode())
    some = scored[:pictures]
    columns = {_HEADINGS[way]: [s.samples[way] for s in some] for way in some[0].samples}
    grid([s.case for s in some], columns).save(out / "samples.png")


def read_report(out: Path, asked: Evaluation, drawn: ValidationSettings) -> Report | None:
    """The report in a folder; None where there is none, or one on something else, on pictures drawn otherwise, or by
    other metrics."""
    path = out / REPORT
    if not path.exists():
        return None
    report = Report.from_json(json.loads(path.read_text()))
    measured = report.groups["all"].means["subject"].keys() == {*METRICS, TEXT}
    return report if measured and (report.asked, report.drawn.sampling()) == (asked, drawn.sampling()) else None
