"""Does a trained pipeline follow its references? Samples of held-out images' captions and subjects, scored beside those
of the base model, which sees no reference, and beside those drawn with somebody else's reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from rich.progress import track

from model import Subject
from subject_diffusion.errors import RunError
from train.evaluation.cases import Case, find_cases, load_cases
from train.evaluation.individuals import Individuals
from train.evaluation.metrics import Clip, Locator, score_subjects
from train.evaluation.report import Evaluation, Report, Scored, Way, grouped, write_report
from train.trainer.identities import Name
from train.trainer.model_folder import model_folder
from train.trainer.pipeline import open_pipeline, recipe_of
from train.trainer.recipe import TrainRecipe, ValidationSettings
from train.trainer.run_folder import RECIPE
from train.trainer.validation import draw_base, draw_samples, sampling_device

POOL = 500
"""Images that are looked through for other individuals of the nouns."""


def evaluate_run(run: Path, asked: Evaluation, out: Path) -> Report:
    """Evaluates what a run has learned and writes the report. run: as for `open_pipeline`. Raises SddError."""
    recipe = recipe_of(run)
    if recipe is None:
        raise RunError(f"{run}: no {RECIPE} in it, which says what to compare it with; `sdd train` writes one")
    device = sampling_device(recipe.run.device)
    if recipe.run.threads:  # this process has the cores of all that trained to itself
        torch.set_num_threads(recipe.run.threads * recipe.run.workers)
    cases = load_cases(asked.data, asked.images, recipe.examples, (asked.subjects, asked.subjects), tags=asked.tags)
    if "shuffled" in asked.ways and len({name for case in cases for name in case.individuals}) < 2 * asked.subjects:
        raise RunError(f"{asked.data}: its images show too few individuals to give anybody another one's reference")
    individuals = Individuals(asked.identity_encoder, _alike(cases, asked.data, recipe))
    clip = Clip(model_folder("image_encoder", recipe.image_encoder), device)
    scored = evaluate(run, asked.ways, cases, recipe.validation, Locator(asked.labels), clip, individuals, device)
    known = [source.keep.tags for source in recipe.sources]
    shown = {s.tag for case in cases for s in case.subjects}
    new = frozenset(t for t in shown if all(k is not None and t not in k for k in known))
    report = Report(asked, recipe.validation, grouped(scored, new))
    write_report(report, scored, out)
    return report


def _alike(cases: Sequence[Case], data: str, recipe: TrainRecipe) -> list[Case]:
    """These cases, and others of a dataset that show the same nouns."""
    tags = frozenset(subject.tag for case in cases for subject in case.subjects)
    return [*cases, *find_cases(data, POOL, recipe.examples, (1, recipe.model.max_subjects), tags=tags)]


def evaluate(
    pipeline: Path,
    ways: Sequence[Way],
    cases: Sequence[Case],
    settings: ValidationSettings,
    locate: Locator,
    clip: Clip,
    individuals: Individuals,
    device: torch.device,
) -> list[Scored]:
    """Draws every case in each way, from the same noise, and scores it against the case's own references."""
    subject = open_pipeline(pipeline).to(device)
    samples: dict[str, list[Image.Image]] = {}
    for way in ways:
        if way == "true":
            samples[way] = [case.image for case in cases]
        elif way == "base":
            samples[way] = draw_base(subject.base().to(device), cases, settings)
        else:
            samples[way] = draw_samples(subject, shuffled(cases) if way == "shuffled" else cases, settings)
    found = []
    for i, case in enumerate(track(cases, "scoring", transient=True)):
        drawn = {way: images[i] for way, images in samples.items()}
        embeddings = clip.images(list(drawn.values())) @ clip.texts([case.caption])[0]
        scores = {way: score_subjects(case, image, locate, clip, individuals) for way, image in drawn.items()}
        text = dict(zip(drawn, embeddings.tolist(), strict=True))
        found.append(Scored(case, drawn, scores, text, individuals.chance(case)))
    return found


def shuffled(cases: Sequence[Case]) -> list[Case]:
    """The same prompts, tags and boxes; each subject's reference is that of the next other individual of the same tag
    in another case, or of any tag where there is none."""
    everyone = [(i, *who) for i, case in enumerate(cases) for who in zip(case.subjects, case.individuals, strict=True)]

    def another(number: int, subject: Subject, name: Name) -> Subject:
        here = next(k for k, (_, s, _) in enumerate(everyone) if s is subject)
        others = [s for i, s, n in everyone[here + 1 :] + everyone[:here] if i != number and n != name]
        same = [s for s in others if s.tag == subject.tag]
        chosen = (same or others)[0]
        return dataclasses.replace(subject, image=chosen.image, mask=chosen.mask)

    return [
        dataclasses.replace(
            case, subjects=tuple(another(i, *who) for who in zip(case.subjects, case.individuals, strict=True))
        )
        for i, case in enumerate(cases)
    ]
