"""Does a trained pipeline follow its references? Samples of held-out images' captions and subjects, scored beside those
of the base model, which sees no reference, and beside those drawn with somebody else's reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from rich.progress import track

from datapipe.recipe import Recipe
from model import Subject
from subject_diffusion.errors import RunError
from train.evaluation.cases import Case, load_cases
from train.evaluation.metrics import Clip, Locator, score_subjects
from train.evaluation.report import Evaluation, Report, Scored, Way, grouped, write_report
from train.trainer.model_folder import model_folder
from train.trainer.pipeline import open_pipeline, recipe_of
from train.trainer.recipe import ValidationSettings
from train.trainer.run_folder import RECIPE
from train.trainer.validation import draw_base, draw_samples, sampling_device


def evaluate_run(run: Path, asked: Evaluation, out: Path) -> Report:
    """Evaluates what a run has learned and writes the report. run: as for `open_pipeline`. Raises SddError."""
    recipe = recipe_of(run)
    if recipe is None:
        raise RunError(f"{run}: no {RECIPE} in it, which says what to compare it with; `sdd train` writes one")
    device = sampling_device(recipe.run.device)
    if recipe.run.threads:  # this process has the cores of all that trained to itself
        torch.set_num_threads(recipe.run.threads * recipe.run.workers)
    cases = load_cases(asked.data, asked.images, recipe.examples, (asked.subjects, asked.subjects), tags=asked.tags)
    clip = Clip(model_folder("image_encoder", recipe.image_encoder), device)
    scored = evaluate(run, asked.ways, cases, recipe.validation, asked.labels, clip, device)
    known = [source.keep.tags for source in recipe.sources]
    shown = {s.tag for case in cases for s in case.subjects}
    new = frozenset(t for t in shown if all(k is not None and t not in k for k in known))
    report = Report(asked, recipe.validation, grouped(scored, new))
    write_report(report, scored, out)
    return report


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
    subject = open_pipeline(pipeline).to(device)
    samples: dict[str, list[Image.Image]] = {}
    for way in ways:
        if way == "base":
            samples[way] = draw_base(subject.base().to(device), cases, settings)
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
