"""Does a trained pipeline follow its references? Samples of held-out images' captions and subjects, scored beside those
of the base model, which sees no reference, and beside those drawn with somebody else's reference."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from rich.progress import track
from rich.table import Table
from scipy import stats

from datapipe.recipe import Recipe
from datapipe.settings import Settings
from datapipe.shards.store import Store
from model import Subject, SubjectDiffusionPipeline
from train.cases import Case, load_cases
from train.launch import read_recipe
from train.recipe import ValidationSettings
from train.sampling import finished_pipeline, sampling_device
from train.subject_scores import Clip, Locator, SubjectScore, score_subjects
from train.validation import draw_base, draw_samples, grid

REPORT = "report.json"
RESAMPLES = 2000
METRICS = tuple(field.name for field in dataclasses.fields(SubjectScore))
BETTER = {"clip": 1, "colour": -1, "pattern": -1, "found": 1}
"""Whether more of it is better."""


Way = Literal["subject", "shuffled", "base"]
"""How a case is drawn: with its references, with somebody else's, by the base model."""


class Evaluation(Settings):
    """What is asked of a run."""

    data: str
    """Dataset of images that the run has not seen."""
    images: int = Field(ge=2)
    """How many of them."""
    subjects: int = Field(1, ge=1)
    """Subjects of each; images with fewer are left out."""
    tags: frozenset[str] | None = None
    """Only subjects of these tags; none: of all."""
    labels: Recipe
    """Its detector and segmenter find the subjects in the samples."""
    ways: tuple[Way, ...] = ("subject", "shuffled", "base")


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
    """One image of each way of drawing. `samples`, `scores`: by way; scores of every subject."""

    case: Case
    samples: dict[str, Image.Image]
    scores: dict[str, list[SubjectScore]]
    text: dict[str, float]
    """Cosine of CLIP's embeddings of sample and caption."""


def evaluate_run(run: Path, asked: Evaluation, out: Path) -> dict[str, Any]:
    """Of a finished run's pipeline. Writes the report and returns its groups. Raises SddError."""
    recipe = read_recipe(run)
    pipeline, device = finished_pipeline(run), sampling_device(recipe)
    if recipe.run.threads:  # this process has the cores of all that trained to itself
        torch.set_num_threads(recipe.run.threads * recipe.run.workers)
    cases = load_cases(asked.data, asked.images, recipe.examples, (asked.subjects, asked.subjects), tags=asked.tags)
    clip = Clip(recipe.image_encoder, device)
    scored = evaluate(pipeline, asked.ways, cases, recipe.validation, asked.labels, clip, device)
    known = [source.keep.tags for source in recipe.sources]
    shown = {s.tag for case in cases for s in case.subjects}
    new = frozenset(t for t in shown if all(k is not None and t not in k for k in known))
    groups = report(scored, new)
    write_report(asked, recipe.validation, groups, scored, out)
    return groups


def evaluate(
    pipeline: Path,
    ways: Sequence[Way],
    cases: Sequence[Case],
    settings: ValidationSettings,
    labels: Recipe,
    clip: Clip,
    device: torch.device,
) -> list[Scored]:
    """Draws every case in each way, from the same noise, and scores it against the case's own references."""
    subject = SubjectDiffusionPipeline.from_pretrained(pipeline).to(device)
    samples: dict[str, list[Image.Image]] = {}
    for way in ways:
        if way == "base":
            base = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None, requires_safety_checker=False)
            samples[way] = draw_base(base.to(device), cases, settings)
        else:
            samples[way] = draw_samples(subject, shuffled(cases) if way == "shuffled" else cases, settings)
    locate = Locator(labels)
    found = []
    for i, case in enumerate(track(cases, "scoring", transient=True)):
        drawn = {way: images[i] for way, images in samples.items()}
        embeddings = clip.images(list(drawn.values())) @ clip.texts([case.caption])[0]
        scores = {way: score_subjects(case.subjects, image, case.caption, locate, clip) for way, image in drawn.items()}
        found.append(Scored(case, drawn, scores, dict(zip(drawn, embeddings.tolist(), strict=True))))
    return found


def shuffled(cases: Sequence[Case]) -> list[Case]:
    """The same prompts, tags and boxes; each subject's reference is the next one of the same tag in another case, or of
    any tag where there is none."""
    everyone = [(i, s) for i, case in enumerate(cases) for s in case.subjects]

    def another(number: int, subject: Subject) -> Subject:
        here = next(k for k, (_, s) in enumerate(everyone) if s is subject)
        others = [(i, s) for i, s in everyone[here + 1 :] + everyone[:here] if i != number]
        same = [s for _, s in others if s.tag == subject.tag]
        chosen = same[0] if same else others[0][1]
        return dataclasses.replace(subject, image=chosen.image, mask=chosen.mask)

    return [
        dataclasses.replace(case, subjects=tuple(another(i, s) for s in case.subjects)) for i, case in enumerate(cases)
    ]


def report(scored: Sequence[Scored], new_tags: frozenset[str]) -> dict[str, Any]:
    """Means by group of images, way and metric; and how much better `subject` is than the others, image by image.

    new_tags: nouns that were never a reference in training; images with one are a group of their own. Plain JSON.
    """
    groups: dict[str, list[Scored]] = {"all": list(scored)}
    if new_tags:
        new = [s for s in scored if any(x.tag in new_tags for x in s.case.subjects)]
        groups["new nouns"] = new
        groups["known nouns"] = [s for s in scored if s not in new]
    return {name: _group(members) for name, members in groups.items() if len(members) > 1}


def _group(scored: Sequence[Scored]) -> dict[str, Any]:
    ways = list(scored[0].samples)
    values = {way: {m: _per_image(scored, way, m) for m in METRICS} for way in ways}
    for way in ways:
        values[way]["text"] = np.array([s.text[way] for s in scored])
    means = {
        way: {m: dataclasses.asdict(mean_of(v)) for m, v in by_metric.items()} for way, by_metric in values.items()
    }
    gains = {
        f"subject over {way}": {
            m: dataclasses.asdict(mean_of(sign * (values["subject"][m] - values[way][m]))) for m, sign in BETTER.items()
        }
        for way in ways
        if way != "subject"
    }
    per_image = {way: {m: v.tolist() for m, v in by_metric.items()} for way, by_metric in values.items()}
    return {"images": len(scored), "means": means, "gains": gains, "per_image": per_image}


def _per_image(scored: Sequence[Scored], way: str, metric: str) -> NDArray[np.float64]:
    return np.array([np.mean([getattr(score, metric) for score in s.scores[way]]) for s in scored])


def mean_of(values: NDArray[np.float64]) -> Mean:
    """values: (N,), one an image. The interval is of a bootstrap over images."""
    if np.ptp(values) == 0:
        return Mean(*[float(values[0])] * 3)
    interval = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return Mean(float(values.mean()), float(interval.low), float(interval.high))


def tables(groups: dict[str, Any]) -> list[Table]:
    """Of a `report`, for the terminal."""
    shown = []
    for name, group in groups.items():
        metrics = list(next(iter(group["means"].values())))
        table = Table("", *metrics, title=f"{name}: {group['images']} images", title_justify="left", box=None)
        for way, by_metric in (group["means"] | group["gains"]).items():
            table.add_row(way, *(str(Mean(**by_metric[m])) if m in by_metric else "" for m in metrics))
        shown.append(table)
    return shown


def write_report(
    asked: Evaluation,
    drawn: ValidationSettings,
    groups: dict[str, Any],
    scored: Sequence[Scored],
    out: Path,
    pictures: int = 12,
) -> None:
    """`report.json`, and `samples.png`: references | boxes | a column a way. drawn: how the samples were."""
    written = {"asked": asked.model_dump(mode="json"), "drawn": drawn.model_dump(mode="json"), "groups": groups}
    Store(str(out)).put(REPORT, json.dumps(written, indent=1).encode())
    some = scored[:pictures]
    columns = [[s.samples[way] for s in some] for way in some[0].samples]
    grid([s.case for s in some], columns).save(out / "samples.png")


def read_report(out: Path, asked: Evaluation, drawn: ValidationSettings) -> dict[str, Any] | None:
    """The groups of a report that `evaluate_run` wrote; None where there is none, or of something else."""
    path = out / REPORT
    if not path.exists():
        return None
    written = json.loads(path.read_text())
    groups: dict[str, Any] = written["groups"]
    of = Evaluation.model_validate(written["asked"]), ValidationSettings.model_validate(written["drawn"])
    return groups if of == (asked, drawn) else None
