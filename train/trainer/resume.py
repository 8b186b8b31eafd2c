"""What a run may change when it goes on, and what it must not."""

from __future__ import annotations

import hashlib
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from datapipe.schema import IDENTITIES
from subject_diffusion.errors import RunError
from subject_diffusion.storage import named_errors
from train.stream.dataset import Stream
from train.trainer.identities import Pairs
from train.trainer.parallel import list_of_ranks, of_first_rank, rank_and_count
from train.trainer.recipe import TrainRecipe
from train.trainer.run_storage import RunStorage

_WEIGHTS_OF_EACH = 16
_MARK = ".shared-"


def check_same_run(out: str, before: TrainRecipe, now: TrainRecipe) -> None:
    """Raises RunError, which names the first setting that must not change and has."""
    was, is_now = before.identity(), now.identity()
    other = [key for key in {**was, **is_now} if was.get(key) != is_now.get(key)]
    if other:
        raise RunError(
            f"{out} holds a run with another {other[0]}: {was.get(other[0])!r}, now {is_now.get(other[0])!r}, which "
            f"stays to a run's end; name another --out, with init_from={out} to start from its weights"
        )


def changed_settings(before: TrainRecipe, now: TrainRecipe) -> dict[str, list[Any]]:
    """What is learned otherwise from here on: dotted key -> value before, value now."""
    was, is_now = before.learned(), now.learned()
    return {key: [was.get(key), is_now.get(key)] for key in {**was, **is_now} if was.get(key) != is_now.get(key)}


def source_records(stream: Stream[Any], pairs: Pairs) -> list[dict[str, str]]:
    """What a checkpoint says of each source: where it lies, and what it is known by wherever it lies."""
    return [
        {"path": source.path, "content": content, "identities": pairs.fingerprint(source.path)}
        for source, content in zip(stream.plan.sources, stream.contents, strict=True)
    ]


def newest_for_all(storage: RunStorage) -> str | None:
    """The name of the checkpoint that the first rank goes on from; None where there is none. Collective call: every
    rank must make it. Raises RunError where the folder is not the same for all, of which each writes a part."""
    first = rank_and_count()[0] == 0
    mark = storage.local / of_first_rank(f"{_MARK}{secrets.token_hex(8)}" if first else None)
    if storage.store.local:
        for refused in list_of_ranks(_refused(mark) if first else []):
            raise refused
        apart = list_of_ranks([] if mark.exists() else [socket.gethostname()])
        if first:
            mark.unlink(missing_ok=True)
        if apart:
            raise RunError(
                f"{storage.store.root}: node {apart[0]} does not see the folder of that name where the run begins; "
                "name one that all nodes share, or a bucket"
            )
    return of_first_rank(next(reversed(storage.checkpoints()), None) if first else None)


def _refused(mark: Path) -> list[RunError]:
    """Puts it there in place of any that a killed run left; or says why not."""
    try:
        with named_errors(str(mark.parent), RunError):
            for left in mark.parent.glob(f"{_MARK}*"):
                left.unlink()
            mark.touch()
    except RunError as error:
        return [error]
    return []


def check_same_data(before: Sequence[dict[str, str]], now: Sequence[dict[str, str]]) -> None:
    """before, now: of `source_records`. Raises RunError where a source is gone or is not what it was; others may have
    come."""
    for source in before:
        alike = [other for other in now if other["content"] == source["content"]]
        if not alike:
            raise RunError(
                f"{source['path']}: what the run learned from is no longer among its sources; its shards or its filter "
                "have changed. Put them back, or name another --out"
            )
        if all(other["identities"] != source["identities"] for other in alike):
            raise RunError(
                f"{alike[0]['path']}: was learned with other identities: {IDENTITIES} has changed; put back what it "
                "was, or name another --out"
            )


def frozen_fingerprint(*parts: nn.Module) -> str:
    """Hash of a few weights of each layer: the same wherever a model lies, and in whatever precision it is loaded."""
    digest = hashlib.sha256()
    for part in parts:
        for name, weights in part.named_parameters():
            few = weights.detach().flatten()[:_WEIGHTS_OF_EACH].to("cpu", torch.bfloat16).view(torch.int16)
            digest.update(f"{name} {tuple(weights.shape)} {few.tolist()}".encode())
    return digest.hexdigest()
