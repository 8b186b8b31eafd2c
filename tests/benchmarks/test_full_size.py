"""What runs on a GPU runs on a pretended one, where a tensor left on the wrong device is an error."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import full_size
from benchmarks.full_size import STAGES, Job, measured
from benchmarks.pretend_gpu import OnGpu, pretended_gpu
from tests.conftest import jpeg


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_and_a_training_step_find_all_their_tensors_on_the_gpu(stage):
    cost = measured(Job(stage, "pretend", tiny=True, image=None))
    assert min(cost.load_s, cost.seconds, cost.tera_flop, cost.memory_gib) > 0


@pytest.mark.parametrize("stage", ["ground", "segment"])
def test_a_tensor_left_on_the_cpu_is_found(stage, monkeypatch):
    """As if the images were not moved to the GPU."""
    module = {"ground": "grounding_dino", "segment": "sam"}[stage]
    monkeypatch.setattr(f"datapipe.backends.{module}.on_device", lambda tensor, device: tensor)
    with pytest.raises(RuntimeError, match="a tensor on the CPU among those on the GPU, of shape"):
        measured(Job(stage, "pretend", tiny=True, image=None))


def test_a_pretended_gpu_refuses_what_a_gpu_refuses_and_computes_the_rest():
    with pretended_gpu():
        there, here = torch.arange(6.0, device="cuda").reshape(2, 3), torch.ones(2, 3)
        assert isinstance(there, OnGpu) and there.device == torch.device("cuda:0")
        assert (there * 2 + torch.tensor(1.0)).sum().item() == 36.0, "a number may come from anywhere"
        assert there[torch.tensor([1])].tolist() == [[3.0, 4.0, 5.0]], "and so may indices"
        assert (there.cpu() + here).numpy().sum() == 21.0
        assert there.add_(1) is there and torch.ones(3).to(there).device.type == "cuda"
        with pytest.raises(RuntimeError, match=r"a tensor on the CPU .* of shape \(2, 3\)"):
            there + here
        with pytest.raises(TypeError, match="is no array"):
            there.numpy()
    assert not torch.cuda.is_available() or torch.version.cuda


def test_a_stage_is_measured_in_a_process_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["full_size", "--tiny", "--stages", "segment"])
    full_size.main()
    (cost,) = json.loads(capsys.readouterr().out)
    assert cost["stage"] == "segment" and cost["tera_flop"] > 0


def test_a_photograph_of_ones_own_is_shown(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(jpeg(seed=1))
    sample = full_size.photograph(tmp_path / "photo.jpg")
    assert (sample.width, sample.height) == (48, 32)
    assert all(0 <= e.box[0] < e.box[2] <= 48 and 0 <= e.box[1] < e.box[3] <= 32 for e in sample.candidates)
