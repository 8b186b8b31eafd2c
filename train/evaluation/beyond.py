"""Beyond the paper: what it does not measure, measured where the truth is known.

Are several subjects confused? Is the way from text to image smooth? Is an attribute edited, and the rest kept? What
does identity cost in text?
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from rich.progress import track
from rich.table import Table

from datapipe.shards.store import Store
from model import SubjectDiffusionPipeline
from subject_diffusion.errors import RunError
from train.evaluation.cases import Case, find_cases
from train.evaluation.cutout import Cutout, colors_apart
from train.evaluation.metrics import Clip, Locator, find_cutouts
from train.evaluation.report import Evaluation, Mean, mean_over_images
from train.trainer.model_folder import model_folder
from train.trainer.pipeline import open_pipeline, recipe_of
from train.trainer.recipe import ValidationSettings
from train.trainer.run_folder import RECIPE
from train.trainer.validation import draw_samples, generators, sampling_device

BEYOND = "beyond.json"
CASES = 8
"""Images of each question but that of confusion; with these, all together cost about what the evaluation does."""
SUBJECTS = (2, 3, 4)
CONFUSED_CASES = 48
"""Images of each of these numbers of subjects, as far as there are."""
POOL = 400
"""Images that are looked through for them."""
ALPHAS = tuple(np.linspace(0, 1, 9).tolist())
"""How much of each step is the base's."""
TEXT_SCALES = (1.5, 3.0, 7.5)
SUBJECT_SCALES = (1.0, 2.5, 5.0)
COLORS = {"blue": (55, 105, 205), "red": (215, 50, 45), "yellow": (242, 210, 60)}
"""What a subject is asked to be, RGB: of these, the one farthest from its reference."""


WORDS = "red|orange|yellow|green|teal|blue|purple|pink|brown|gray"
"""Colors that captions of the toy world name, which an edit replaces."""


@dataclass(frozen=True)
class Point:
    """Two guidance scales and what they give, as cosines of CLIP's embeddings. text: of samples and captions;
    identity: of subjects and references, cut out."""

    text_scale: float
    subject_scale: float
    text: float
    identity: float


@dataclass(frozen=True)
class Beyond:
    """What was found; None, or a number of subjects left out, where the data has no images for the question.

    confused: by the number of subjects K, the share of them whose colors are nearer to another reference of their image
    than to their own; (K − 1) / K by chance. leap: the largest step between neighbors in an interpolation over the mean
    step; 1 is smooth, 8 all at once. followed: by how much of its distance a subject comes nearer to the color asked
    for, against the same sample without the edit. kept: overlap of the two silhouettes, 0..1. area: under the best
    points of the curve.
    """

    confused: Mapping[int, Mean]
    leap: Mean
    followed: Mean
    kept: Mean
    curve: Sequence[Point]
    area: float

    def table(self) -> Table:
        """For the terminal."""
        shown = Table("beyond the paper", "", box=None)
        for count, mean in self.confused.items():
            shown.add_row(f"{count} subjects, share confused (chance {(count - 1) / count:.2f})", str(mean))
        shown.add_row("interpolation, largest step over mean step", str(self.leap))
        shown.add_row("edited color, followed", str(self.followed))
        shown.add_row("edited color, silhouette kept", str(self.kept))
        for p in self.curve:
            shown.add_row(
                f"guidance {p.text_scale:g} / {p.subject_scale:g}", f"text {p.text:.3f}, identity {p.identity:.3f}"
            )
        shown.add_row("area under the best of these", f"{self.area:.3f}")
        return shown

    def write(self, out: Path) -> None:
        """`beyond.json`."""
        Store(str(out)).put(BEYOND, json.dumps(dataclasses.asdict(self), indent=1).encode())


def evaluate_beyond(run: Path, asked: Evaluation, out: Path) -> Beyond:
    """Asks a trained model, of the same data as its evaluation, and writes what was found. run: as for
    `evaluate_run`. Raises SddError."""
    recipe = recipe_of(run)
    if recipe is None:
        raise RunError(f"{run}: no {RECIPE} in it, which says what to compare it with; `sdd train` writes one")
    device = sampling_device(recipe.run.device)
    pipeline = open_pipeline(run).to(device)
    pipeline.set_progress_bar_config(disable=True)
    clip, locate, drawn = (
        Clip(model_folder("image_encoder", recipe.image_encoder), device),
        Locator(asked.labels),
        recipe.validation,
    )
    pool = find_cases(asked.data, POOL, recipe.examples, (1, max(SUBJECTS)), tags=asked.tags)
    alone = [case.first(1) for case in pool[: min(CASES, asked.images)]]
    confused = {}
    for count in SUBJECTS:
        several = [case for case in pool if len(case.subjects) == count][: min(CONFUSED_CASES, asked.images)]
        if several and count <= pipeline.subject_net.max_subjects:
            samples = draw_samples(pipeline, several, drawn)
            shares = [confusion(case, sample, locate) for case, sample in zip(several, samples, strict=True)]
            confused[count] = mean_over_images(np.array(shares))
    leaps = [
        largest_step(interpolation(pipeline, case, drawn)) for case in track(alone, "interpolating", transient=True)
    ]
    edits = np.array(edit(pipeline, alone, drawn, locate))
    curve = trade_off(pipeline, alone, drawn, locate, clip)
    found = Beyond(
        confused,
        mean_over_images(np.array(leaps)),
        mean_over_images(edits[:, 0]),
        mean_over_images(edits[:, 1]),
        curve,
        area_under([(p.text, p.identity) for p in curve]),
    )
    found.write(out)
    return found


def confusion(case: Case, sample: Image.Image, locate: Locator) -> float:
    """The share of the case's subjects that look, by their colors, more like another's reference."""
    cutouts = find_cutouts(case.subjects, sample, case.caption, locate)
    wrong = [
        int(np.argmin([colors_apart(reference, generated) for reference, _ in cutouts])) != k
        for k, (_, generated) in enumerate(cutouts)
    ]
    return float(np.mean(wrong))


def interpolation(pipeline: SubjectDiffusionPipeline, case: Case, drawn: ValidationSettings) -> list[Image.Image]:
    """The case for each of `ALPHAS`, from the same noise."""
    return [
        pipeline(
            case.caption,
            subjects=case.subjects,
            height=case.image.height,
            width=case.image.width,
            generator=generators(0, 1),
            alpha=alpha,
            **drawn.sampling(),
        ).images[0]
        for alpha in ALPHAS
    ]


def largest_step(pictures: Sequence[Image.Image]) -> float:
    """max d / mean d over neighbors, where d is the root mean square of the differences of their pixels; 1 where
    nothing changes."""
    pixels = [np.asarray(p.convert("RGB"), np.float32) for p in pictures]
    steps = [float(np.sqrt(np.mean((a - b) ** 2))) for a, b in itertools.pairwise(pixels)]
    return max(steps) / float(np.mean(steps)) if any(steps) else 1.0


def edit(
    pipeline: SubjectDiffusionPipeline, cases: Sequence[Case], drawn: ValidationSettings, locate: Locator
) -> list[tuple[float, float]]:
    """For each case with its first subject in another color: how far it was followed, and what was kept."""
    asked = [_recolored(case) for case in cases]
    plain, edited = draw_samples(pipeline, cases, drawn), draw_samples(pipeline, [c for c, _ in asked], drawn)
    found = []
    for case, (changed, color), before, after in zip(cases, asked, plain, edited, strict=True):
        (_, was), *_ = find_cutouts(case.subjects, before, case.caption, locate)
        (_, now), *_ = find_cutouts(changed.subjects, after, changed.caption, locate)
        found.append((nearer(was, now, COLORS[color]), overlap(was, now)))
    return found


def _recolored(case: Case) -> tuple[Case, str]:
    first = case.subjects[0]
    mask = first.mask_array()
    assert mask is not None
    color = max(COLORS, key=lambda name: _distance(Cutout(first.picture, mask), COLORS[name]))
    named = rf"(?:\b(?:{WORDS}) )?(?<!\w)({re.escape(first.tag)})(?!\w)"
    caption = re.sub(named, rf"{color} \1", case.caption, count=1, flags=re.IGNORECASE)
    return dataclasses.replace(case, caption=caption), color


def nearer(before: Cutout, after: Cutout, rgb: tuple[int, int, int]) -> float:
    """1 − d(after, c) / d(before, c), where d is the distance (CIELAB) of a subject's mean color from the color c: 1
    where it is reached, 0 where nothing came nearer."""
    return 1 - _distance(after, rgb) / max(_distance(before, rgb), 1e-6)


def _distance(cutout: Cutout, rgb: tuple[int, int, int]) -> float:
    lab = cv2.cvtColor(np.array([[rgb]], np.float32) / 255, cv2.COLOR_RGB2LAB)[0, 0]
    return float(np.linalg.norm(cutout.lab[cutout.inside].mean(axis=0) - lab))


def overlap(before: Cutout, after: Cutout) -> float:
    """|a ∩ b| / |a ∪ b| of two silhouettes, centered and scaled alike."""
    return float((before.inside & after.inside).sum() / max(1, (before.inside | after.inside).sum()))


def trade_off(
    pipeline: SubjectDiffusionPipeline,
    cases: Sequence[Case],
    drawn: ValidationSettings,
    locate: Locator,
    clip: Clip,
) -> list[Point]:
    """Every pair of `TEXT_SCALES` and `SUBJECT_SCALES`."""
    captions = clip.texts([case.caption for case in cases])
    points = []
    for text_scale, subject_scale in itertools.product(TEXT_SCALES, SUBJECT_SCALES):
        scales = {"guidance_scale": text_scale, "subject_guidance_scale": subject_scale}
        samples = draw_samples(pipeline, cases, drawn.model_copy(update=scales))
        text = (clip.images(samples) * captions).sum(dim=1)
        pairs = [
            pair
            for case, s in zip(cases, samples, strict=True)
            for pair in find_cutouts(case.subjects, s, case.caption, locate)
        ]
        references, generated = (clip.images([cutout.picture for cutout in side]) for side in zip(*pairs, strict=True))
        points.append(Point(text_scale, subject_scale, _mean(text), _mean((references * generated).sum(dim=1))))
    return points


def area_under(points: Sequence[tuple[float, float]]) -> float:
    """The area of the union of the rectangles from (0, 0) to each point: the hypervolume of the best ones."""
    area, height = 0.0, 0.0
    for x, y in sorted(points, reverse=True):
        area += max(x, 0.0) * max(y - height, 0.0)
        height = max(height, y)
    return area


def _mean(values: torch.Tensor) -> float:
    return float(values.mean())
