"""The examples of a loss and of a metric in docs/ are what the code takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.documents import marked
from train.evaluation import metrics
from train.trainer import losses


def test_the_example_of_a_loss_divides_the_attention_loss_by_the_share_of_the_masks() -> None:
    names: dict[str, Any] = dict(vars(losses))
    exec(marked("loss").code, names)
    masks = torch.zeros(2, 1, 4, 4)
    masks[1, :, :2] = 1
    done = SimpleNamespace(
        batch=SimpleNamespace(masks=masks),
        found=SimpleNamespace(attention=torch.tensor([1.0, 1.0])),
        recipe=SimpleNamespace(optimizer=SimpleNamespace(small_subjects=0.5)),
    )
    example = names["LOSSES"]["small_subjects"]
    assert isinstance(example, losses.Loss)
    assert names["small_subjects"](done).tolist() == pytest.approx([100.0, 2.0])
    assert list(names["LOSSES"]) == [*losses.LOSSES, "small_subjects"]


def test_the_example_of_a_metric_is_the_overlap_of_two_silhouettes() -> None:
    names: dict[str, Any] = dict(vars(metrics)) | {"METRICS": dict(metrics.METRICS)}
    exec(marked("metric").code, names)
    inside = np.zeros((4, 4), bool)
    inside[:2] = True
    other = np.zeros((4, 4), bool)
    other[1:3] = True
    pair = SimpleNamespace(reference=SimpleNamespace(inside=inside), generated=SimpleNamespace(inside=other))
    assert isinstance(names["METRICS"]["silhouette"], metrics.Metric)
    assert names["silhouette_overlap"](pair) == pytest.approx(1 / 3)
