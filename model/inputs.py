"""What a user gives to a sampling, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.errors import ModelError
from model.mention import mentions
from model.subject import Subject

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def one_list_each(
    prompts: Sequence[str] | None, count: int, subjects: Subject | Sequence[Any] | None
) -> list[list[Subject]]:
    """The subjects of each of `count` prompts; prompts: their texts, which must contain the tags, if they are known."""
    if subjects is None or isinstance(subjects, Subject):
        subjects = [] if subjects is None else [subjects]
    if count == 1 and (not subjects or any(isinstance(subject, Subject) for subject in subjects)):
        cast = [list(subjects)]
    elif any(isinstance(subject, Subject) for subject in subjects):
        raise ModelError("several prompts came with one list of subjects: give one list a prompt")
    else:
        cast = [list(own or []) for own in subjects] or [[] for _ in range(count)]
    if len(cast) != count:
        raise ModelError(f"{count} prompts, but lists of subjects for {len(cast)}: give one list a prompt")
    for prompt, own in zip(prompts or [], cast, strict=False):
        for subject in own:
            if not mentions(prompt, subject.tag):
                raise ModelError(f"prompt {prompt!r} does not contain its subject's tag {subject.tag!r}")
    return cast


@dataclass(frozen=True)
class Texts:
    """The prompts to draw, `count` of them. `prompts`: None where embeddings of them are given."""

    prompts: list[str] | None
    negatives: list[str]
    count: int


def given_texts(
    prompt: str | Sequence[str] | None,
    negative_prompt: str | Sequence[str] | None,
    prompt_embeds: Tensor | None,
    negative_prompt_embeds: Tensor | None,
    shape: Sequence[int],
) -> Texts:
    """shape: (T, D) that embeddings have. Raises ModelError."""
    prompts = _texts_or_none("prompt", prompt, prompt_embeds, shape)
    negatives = _texts_or_none("negative_prompt", negative_prompt, negative_prompt_embeds, shape)
    given = prompts if prompt_embeds is None else prompt_embeds
    if given is None:
        raise ModelError("a prompt, or prompt_embeds, is needed")
    if negative_prompt_embeds is not None and len(negative_prompt_embeds) not in (1, len(given)):
        raise ModelError(
            f"negative_prompt_embeds for {len(negative_prompt_embeds)} prompts, but there are {len(given)}"
        )
    return Texts(prompts, one_each(negatives, len(given)), len(given))


def _texts_or_none(
    name: str, texts: str | Sequence[str] | None, embeds: Tensor | None, shape: Sequence[int]
) -> list[str] | None:
    """The texts, one or several, or None where embeddings of them are given."""
    if embeds is None:
        return None if texts is None else [texts] if isinstance(texts, str) else list(texts)
    if texts is not None:
        raise ModelError(f"{name} and {name}_embeds: give one of them")
    if embeds.ndim != 3 or tuple(embeds.shape[1:]) != tuple(shape):
        raise ModelError(f"{name}_embeds are of shape {tuple(embeds.shape)}; (B, {shape[0]}, {shape[1]}) is needed")
    return None


def one_each(negative_prompt: Sequence[str] | None, count: int) -> list[str]:
    """The negative prompt of each of `count` prompts: one for all, or one for each."""
    given = list(negative_prompt or [""])
    if len(given) == 1:
        return given * count
    if len(given) != count:
        raise ModelError(f"{len(given)} negative prompts for {count} prompts: give one, or one for each")
    return given


def check_counts(
    count: int,
    generator: torch.Generator | list[torch.Generator] | None,
    output_type: str,
    num_inference_steps: int,
    num_images_per_prompt: int,
) -> None:
    if num_inference_steps < 1:
        raise ModelError(f"num_inference_steps={num_inference_steps}: at least one step is needed")
    if num_images_per_prompt < 1:
        raise ModelError(f"num_images_per_prompt={num_images_per_prompt}: give one or more")
    if isinstance(generator, list) and len(generator) != count:
        raise ModelError(f"{len(generator)} generators for {count} images: give one, or one for each")
    if output_type not in OUTPUT_TYPES:
        raise ModelError(f"output_type={output_type!r}: give one of {', '.join(OUTPUT_TYPES)}")


def check_shares(strength: float, alpha: float, guidance_rescale: float) -> None:
    if not 0 < strength <= 1:
        raise ModelError(f"strength={strength:g}: give a share of the steps, above 0 and up to 1")
    if not 0 <= alpha <= 1:
        raise ModelError(f"alpha={alpha:g}: give a share of the steps, from 0 to 1")
    if not 0 <= guidance_rescale <= 1:
        raise ModelError(f"guidance_rescale={guidance_rescale:g}: give a share, from 0 to 1")


def check_names(what: str, given: Sequence[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise ModelError(f"{what}: {name!r} is unknown here; it takes {', '.join(known)}")
