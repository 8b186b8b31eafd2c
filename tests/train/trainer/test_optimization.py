"""What the optimizer keeps, and which parts of the model it may change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from subject_diffusion.errors import RecipeError, RunError
from subject_diffusion.settings import load_settings
from tests.train.datasets import write_dataset
from tests.train.training import training_recipe, write_training_recipe
from train.trainer.adamw import NarrowAdamW, stochastically_float8, stochastically_rounded
from train.trainer.checkpoint import checkpoints, load_checkpoint
from train.trainer.launch import train
from train.trainer.loop import Trainer
from train.trainer.low_rank import merged
from train.trainer.optimization import part_of
from train.trainer.pipeline import open_pipeline
from train.trainer.recipe import LrFactors, TrainRecipe
from train.trainer.resume import check_same_run


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"), (6, 5))


def test_random_rounding_is_right_on_average_and_exact_where_nothing_is_lost():
    generator = torch.Generator().manual_seed(0)
    for value in (1.001, -3.14159, 1e-12):
        rounded = stochastically_rounded(torch.full((100_000,), value), generator).float()
        assert len(rounded.unique()) == 2
        assert rounded.double().mean().item() == pytest.approx(value, rel=1e-4)
    exact = torch.tensor([0.0, 1.0, -2.5, 0.15625])
    assert torch.equal(stochastically_rounded(exact, generator).float(), exact)


def test_float8_is_right_on_average_to_an_eighth_of_each_value_and_no_value_overflows():
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([[1.0, -0.3, 0.01, 1e-5, 0.0], [1e-20, 3e-22, -7e-21, 0.0, 0.0], [0.0] * 5])
    drawn = []
    for _ in range(4_000):
        narrow, scale = stochastically_float8(values, generator)
        drawn.append(narrow.float() * scale[:, None])
    assert torch.stack(drawn).isfinite().all()
    torch.testing.assert_close(torch.stack(drawn).double().mean(dim=0).float(), values, rtol=0.05, atol=0)
    large = torch.stack(drawn)[:, :, :2]
    assert ((large - values[:, :2]).abs() <= values[:, :2].abs() / 8).all()


@pytest.mark.parametrize(("moments", "difference"), [("bfloat16", 0.01), ("float8", 0.05)])
def test_narrow_moments_take_the_steps_of_adamw(moments, difference):
    torch.manual_seed(0)
    start, target = torch.randn(64, 64), torch.randn(64, 64)
    apart = 10 ** torch.linspace(-4, 0, 64)  # gradients of one row, of which the smallest count as well
    found = {}
    for kind, options in ((torch.optim.AdamW, {}), (NarrowAdamW, {"moments": moments})):
        weights = torch.nn.Parameter(start.clone())
        optimizer = kind([{"params": [weights]}], lr=1e-2, betas=(0.9, 0.999), weight_decay=0.1, **options)
        for _ in range(200):
            ((weights - target).square() * apart).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found[kind] = weights.detach()
    moved = (found[torch.optim.AdamW] - start).norm(dim=0)
    assert ((found[NarrowAdamW] - found[torch.optim.AdamW]).norm(dim=0) < difference * moved).all()


@pytest.mark.parametrize("moments", ["bfloat16", "float8"])
def test_a_run_with_narrow_moments_goes_on_bit_for_bit(sd1, clip, dataset, tmp_path, moments):
    recipe = training_recipe(sd1, clip, dataset, optimizer={"moments": moments, "steps": 4})
    assert train(recipe, tmp_path / "run")
    expected, _ = load_checkpoint(checkpoints(tmp_path / "run" / "checkpoints")[-1])
    dtypes = {t.dtype for name, t in expected["optimizer"].items() if name.endswith(("exp_avg", "exp_avg_sq"))}
    assert dtypes == {torch.bfloat16 if moments == "bfloat16" else torch.float8_e4m3fn}
    shutil.copytree(tmp_path / "run" / "checkpoints" / "step-00000002", tmp_path / "again/checkpoints/step-00000002")
    assert train(recipe, tmp_path / "again")
    found, _ = load_checkpoint(checkpoints(tmp_path / "again" / "checkpoints")[-1])
    for stem in ("weights", "average", "optimizer"):
        assert all(torch.equal(found[stem][name], t) for name, t in expected[stem].items()), stem


def test_parts_have_learning_rates_of_their_own_and_a_part_of_0_stays_the_bases(sd1, clip, dataset, tmp_path):
    factors = {"text_encoder": 0, "adapters": 2, "conv_in": 0.5}
    optimizer = {"lr_factors": factors, "steps": 2, "warmup_steps": 0}
    recipe = training_recipe(sd1, clip, dataset, optimizer=optimizer)
    trainer = Trainer(recipe, tmp_path / "run", torch.device("cpu"))
    assert {part_of(name) for name, _ in trainer.model.subject_net.named_parameters()} == set(LrFactors.model_fields)
    trained = {part_of(name) for name in trainer.named}
    assert trained == set(LrFactors.model_fields) - {"text_encoder"} == {part_of(n) for n in trainer.average.weights}
    assert trainer.run()
    assert sorted(group["lr"] for group in trainer.optimizer.param_groups) == pytest.approx([5e-4, 1e-3, 2e-3])
    base = StableDiffusionPipeline.from_pretrained(sd1).text_encoder.state_dict()
    for model in ("pipeline", "checkpoints/step-00000002"):
        found = open_pipeline(tmp_path / "run" / model).subject_net.text_encoder.state_dict()
        assert all(torch.equal(found[name], weights) for name, weights in base.items()), model
    # What was frozen may be trained from here on.
    thawed = training_recipe(sd1, clip, dataset, optimizer={"steps": 3, "warmup_steps": 0})
    assert Trainer(thawed, tmp_path / "run", torch.device("cpu")).run()
    found = open_pipeline(tmp_path / "run").subject_net.text_encoder.state_dict()
    assert not all(torch.equal(found[name], weights) for name, weights in base.items())


def test_a_lora_of_the_text_encoder_is_trained_in_its_place_and_added_to_its_weights(sd1, clip, dataset, tmp_path):
    optimizer = {"text_encoder_rank": 2, "steps": 2, "warmup_steps": 0, "lr": 1e-2}
    recipe = training_recipe(sd1, clip, dataset, optimizer=optimizer)
    trainer = Trainer(recipe, tmp_path / "run", torch.device("cpu"))
    of_text = [name for name in trainer.named if part_of(name) == "text_encoder"]
    assert len(of_text) == 2 * 2 * 4 and all(".lora_" in name for name in of_text), "two matrices, layers, projections"
    assert trainer.run()
    base = StableDiffusionPipeline.from_pretrained(sd1).text_encoder.state_dict()
    found = [open_pipeline(tmp_path / "run" / m).subject_net for m in ("pipeline", "checkpoints/step-00000002")]
    assert all(torch.equal(w, found[1].state_dict()[name]) for name, w in found[0].state_dict().items())
    for name, weights in found[0].text_encoder.state_dict().items():
        change = weights - base[name]
        assert torch.linalg.matrix_rank(change) == 2 if "_proj.weight" in name else not change.any(), name
    # Another run begins with it, whole or by a LoRA of its own.
    for rank in (0, 3):
        further = {"init_from": str(tmp_path / "run"), "optimizer": {"text_encoder_rank": rank}}
        net = Trainer(training_recipe(sd1, clip, dataset, **further), tmp_path / str(rank), torch.device("cpu")).model
        assert all(torch.equal(w, found[0].state_dict()[n]) for n, w in merged(_weights(net.subject_net)).items())
    with pytest.raises(RunError, match=r"another optimizer\.text_encoder_rank: 2, now 3"):
        check_same_run("run", recipe, training_recipe(sd1, clip, dataset, optimizer={"text_encoder_rank": 3}))


def _weights(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in net.named_parameters()}


def test_an_average_on_the_cpu_is_the_same_average(sd1, clip, dataset, tmp_path):
    found = []
    for on_cpu in (False, True):
        out = tmp_path / str(on_cpu)
        assert train(training_recipe(sd1, clip, dataset, optimizer={"steps": 2}, run={"ema_on_cpu": on_cpu}), out)
        found.append(load_checkpoint(checkpoints(out / "checkpoints")[-1])[0]["average"])
    assert all(torch.equal(found[1][name], t) for name, t in found[0].items())


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.lr_factors.unet=0", "unknown key optimizer.lr_factors.unet"),
        (f"optimizer.lr_factors={dict.fromkeys(LrFactors.model_fields, 0)}", "every part is 0"),
        ("optimizer={steps: 2, text_encoder_rank: 4, lr_factors: {text_encoder: 0}}", "text_encoder_rank: with"),
        ("run={ema_on_cpu: true, strategy: fsdp}", "ema_on_cpu: with strategy=fsdp the average is split"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line(sd1, clip, dataset, tmp_path, override, said):
    path = write_training_recipe(tmp_path / "r.yaml", sd1, clip, dataset)
    with pytest.raises(RecipeError, match=said):
        load_settings(TrainRecipe, path, [override])
