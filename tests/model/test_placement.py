"""Memory savers, compilers, adapters and quantisation of diffusers work on the pipeline; bases as the hub has them."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.hooks import HookRegistry
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from model import ModelError, Subject, SubjectDiffusion, SubjectDiffusionPipeline
from model.base import load_base, load_image_encoder
from model.base_layers import base_layers
from model.unet import transformer_blocks
from tests.model.bases import awaken, settings, write_clip

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8))
MUG = Subject(PHOTO, "mug")


@pytest.fixture
def pipe(sd2: Path, clip: Path) -> Any:
    torch.manual_seed(0)
    net = awaken(SubjectDiffusion.from_base(sd2, settings(), image_encoder=clip)).subject_net
    made = SubjectDiffusionPipeline.from_base(sd2, clip, net)
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe: Any, **options: Any) -> Tensor:
    defaults = {"num_inference_steps": 2, "output_type": "pt", "generator": torch.Generator().manual_seed(3)}
    found: Tensor = pipe("a mug", MUG, **defaults | options).images
    return found


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


class _Moves:
    """Stands in for accelerate's hook: records when a part is asked to come to the accelerator, and to leave it."""

    def __init__(self, name: str, log: list[str], before: _Moves | None) -> None:
        self.name, self.log, self.before, self.here = name, log, before, False

    def pre_forward(self, *_: Any) -> None:
        if self.before is not None:
            self.before.leave()
        if not self.here:
            self.log.append(f"+{self.name}")
        self.here = True

    def leave(self) -> None:
        if self.here:
            self.log.append(f"-{self.name}")
        self.here = False


def test_offloading_brings_each_part_before_it_works_and_keeps_net_and_unet_together(pipe: Any) -> None:
    expected = draw(pipe, alpha=0.5)
    log: list[str] = []
    moves: dict[str, _Moves] = {}
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    sequence = [name for name in pipe.model_cpu_offload_seq.split("->") if name in parts]
    assert set(parts) - set(sequence) == {"subject_net"}
    for name in [*sequence, "subject_net"]:
        before = None if name in (sequence[0], "subject_net") else moves[sequence[sequence.index(name) - 1]]
        hook: Any = moves.setdefault(name, _Moves(name, log, before))
        parts[name]._hf_hook = hook
        if name != "vae":  # diffusers calls its decoder, which asks for the hook itself
            parts[name].register_forward_pre_hook(lambda *_, hook=hook: hook.pre_forward())
    working = [
        (pipe.subject_net.text_encoder.final_layer_norm, {"subject_net"}),
        (pipe.subject_net.blocks[0].adapter, {"subject_net", "unet"}),
        (pipe.unet.mid_block, {"unet"}),
        (pipe.vae.decoder, {"vae"}),
    ]
    for module, needed in working:
        module.register_forward_pre_hook(lambda *_, needed=needed: _all_here(moves, needed))
    close(draw(pipe, alpha=0.5), expected)
    assert [move for move in log if "subject_net" in move] == ["+subject_net"]
    assert log.count("+unet") == 1 and log.index("-unet") < log.index("+vae")


def _all_here(moves: dict[str, _Moves], needed: set[str]) -> None:
    assert all(moves[name].here for name in needed)


def test_model_offload_itself_runs_on_a_cpu(pipe: Any) -> None:
    expected = draw(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    close(draw(pipe), expected)
    close(draw(pipe), expected)
    assert hasattr(pipe.subject_net, "_hf_hook")


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offloading_brings_every_parameter_that_is_used(pipe: Any, level: str) -> None:
    expected = draw(pipe)
    pipe.enable_group_offload(torch.device("cpu"), offload_type=level, num_blocks_per_group=1)
    led: set[int] = set()
    called: set[nn.Module] = set()
    for module in pipe.subject_net.modules():
        registry: HookRegistry | None = getattr(module, "_diffusers_hook", None)
        hook = None if registry is None else registry.get_hook("group_offloading")
        if hook is not None:
            led |= {id(p) for part in hook.group.modules for p in part.parameters()} | set(
                map(id, hook.group.parameters)
            )
            module.register_forward_pre_hook(lambda module, _: called.add(module))
    close(draw(pipe), expected)
    assert led == {id(p) for p in pipe.subject_net.parameters()}
    # A group comes when its leader is called: no leader may have parameters that are read without a call of it.
    leaders = [m for m in pipe.subject_net.modules() if getattr(m, "_diffusers_hook", None) is not None]
    assert {type(m).__name__ for m in leaders if m not in called and any(True for _ in m.parameters())} <= {
        "SubjectNet"
    }


def test_slicing_and_tiling_of_the_vae(pipe: Any) -> None:
    noise = torch.randn(2, 4, 8, 8)
    expected = draw(pipe, num_images_per_prompt=2, latents=noise)
    pipe.vae.enable_slicing()
    close(draw(pipe, num_images_per_prompt=2, latents=noise), expected)
    pipe.vae.enable_tiling()
    assert pipe.vae.use_tiling and draw(pipe).isfinite().all()


def test_a_compiled_unet_draws_the_same_without_a_break(pipe: Any) -> None:
    expected = draw(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    close(draw(pipe), expected)


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a compiler")
def test_inductor_compiles_a_block_that_sees_subjects(pipe: Any) -> None:
    """One of them: compiling it takes about 20 s of a core, and the whole UNet, however small, minutes."""
    expected = draw(pipe)
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
    block.compile(fullgraph=True)
    close(draw(pipe), expected)
    assert block._compiled_call_impl is not None


def test_attention_slicing_and_no_xformers(pipe: Any) -> None:
    expected = draw(pipe)
    pipe.enable_attention_slicing()
    close(draw(pipe), expected)


def test_quantised_text_encoders_draw(pipe: Any) -> None:
    expected = draw(pipe, alpha=0.5)
    for part in (pipe.text_encoder, pipe.subject_net.text_encoder):
        _quantise(part)
    found = draw(pipe, alpha=0.5)
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)


def test_text_encoders_quantised_by_torchao_draw(pipe: Any) -> None:
    quantisation = pytest.importorskip("torchao.quantization")
    expected = draw(pipe, alpha=0.5)
    for part in (pipe.text_encoder, pipe.subject_net.text_encoder):
        quantisation.quantize_(part, quantisation.Int8WeightOnlyConfig())
    found = draw(pipe, alpha=0.5)
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)


def test_words_of_textual_inversion_are_learned_saved_and_forgotten(pipe: Any, tmp_path: Path) -> None:
    plain = draw(pipe, alpha=0.5)
    width = pipe.subject_net.text_encoder.config.hidden_size
    words = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    save_file({"<pot>": words}, tmp_path / "learned_embeds.safetensors")
    pipe.load_textual_inversion(tmp_path, weight_name="learned_embeds.safetensors")
    for encoder in (pipe.text_encoder, pipe.subject_net.text_encoder):
        assert torch.equal(encoder.get_input_embeddings().weight[-2:], words)
    close(draw(pipe, alpha=0.5), plain)

    def with_word(pipe: Any) -> Tensor:
        options = {"num_inference_steps": 2, "output_type": "pt", "generator": torch.Generator().manual_seed(3)}
        found: Tensor = pipe("a <pot>", Subject(PHOTO, "<pot>"), alpha=0.5, **options).images
        return found

    drawn = with_word(pipe)
    assert (drawn - plain).abs().max() > 1e-3
    pipe.save_pretrained(tmp_path / "saved")
    close(with_word(SubjectDiffusionPipeline.from_pretrained(tmp_path / "saved")), drawn)
    for encoder in (pipe.text_encoder, pipe.subject_net.text_encoder):  # what counts is not the last row alone
        encoder.get_input_embeddings().weight.data[-1].neg_()
    assert (with_word(pipe) - drawn).abs().max() > 1e-4, "the word has two tokens"
    pipe.unload_textual_inversion()
    close(draw(pipe, alpha=0.5), plain)


class _Int8Linear(nn.Module):
    """Weights as int8 with a scale for each row, as quantisers keep them; its `weight` is no floating tensor."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.abs().amax(dim=1, keepdim=True) / 127
        self.weight: Tensor
        self.scale: Tensor
        self.register_buffer("weight", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def _quantise(part: nn.Module) -> None:
    for module in list(part.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, _Int8Linear(child))


def _write_lora(pipe: Any, folder: Path, of_unet: list[str], of_text: list[str] | None = None) -> Path:
    peft = pytest.importorskip("peft")
    layers = {}
    for part, targets in (("unet", of_unet), ("text_encoder", of_text)):
        if targets:
            model = copy.deepcopy(getattr(pipe, part))
            model.add_adapter(peft.LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, target_modules=targets))
            layers[f"{part}_lora_layers"] = peft.utils.get_peft_model_state_dict(model)
    StableDiffusionPipeline.save_lora_weights(folder, **layers)
    return folder


def test_a_lora_reaches_what_the_net_has_trained_anew(pipe: Any, tmp_path: Path) -> None:
    before = draw(pipe)
    lora = _write_lora(pipe, tmp_path, ["attn2.to_k", "attn2.to_v"], ["q_proj", "fc1"])
    pipe.load_lora_weights(lora, adapter_name="style")
    net = pipe.subject_net
    changes = [
        (net.blocks[0].to_v, transformer_blocks(pipe.unet)[0].attn2.to_v),
        (net.text_encoder.encoder.layers[1].mlp.fc1, pipe.text_encoder.encoder.layers[1].mlp.fc1),
    ]
    for own, base in changes:
        torch.testing.assert_close(own.get_delta_weight("style"), base.get_delta_weight("style"))
    loaded = draw(pipe)
    assert not torch.allclose(loaded, before, atol=1e-3)
    close(draw(pipe, cross_attention_kwargs={"scale": 0.0}), before)
    pipe.set_adapters("style", 0.5)
    halved = draw(pipe)
    pipe.set_adapters("style", 1.0)
    close(draw(pipe, cross_attention_kwargs={"scale": 0.5}), halved)
    pipe.fuse_lora(components=["unet", "text_encoder", "subject_net"])
    close(draw(pipe), loaded)
    pipe.unfuse_lora(components=["unet", "text_encoder", "subject_net"])
    pipe.unload_lora_weights()
    close(draw(pipe), before)


def test_a_lora_of_the_unet_is_loaded_scaled_and_taken_off(pipe: Any, tmp_path: Path) -> None:
    expected = draw(pipe)
    lora = _write_lora(pipe, tmp_path, ["to_q", "to_out.0"])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="this LoRA|subject_net")
        pipe.load_lora_weights(lora)
    loaded = draw(pipe)
    assert not torch.allclose(loaded, expected, atol=1e-3)
    close(draw(pipe, cross_attention_kwargs={"scale": 0.0}), expected)
    half = draw(pipe, cross_attention_kwargs={"scale": 0.5})
    assert not torch.allclose(half, loaded, atol=1e-3) and not torch.allclose(half, expected, atol=1e-3)
    pipe.unload_lora_weights()
    close(draw(pipe), expected)


@pytest.fixture
def fp16_only(sd2: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "fp16"
    StableDiffusionPipeline.from_pretrained(sd2, safety_checker=None).save_pretrained(folder, variant="fp16")
    assert (folder / "unet/diffusion_pytorch_model.fp16.safetensors").is_file()
    return folder


def test_a_base_in_fp16_variant_alone_is_read(fp16_only: Path, sd2: Path) -> None:
    found, expected = vars(load_base(fp16_only)), vars(load_base(sd2))
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = found[part].state_dict(), expected[part].state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_base_is_loaded_as_it_is_stored_and_what_is_trained_is_widened(sd2: Path, clip: Path, tmp_path: Path) -> None:
    half: Any = StableDiffusionPipeline.from_pretrained(sd2, safety_checker=None, dtype=torch.float16)
    half.save_pretrained(tmp_path)
    stored = load_base(tmp_path, None)
    assert {part.dtype for part in (stored.unet, stored.vae, stored.text_encoder)} == {torch.float16}
    model = SubjectDiffusion.from_base(tmp_path, settings(), clip, torch.bfloat16)
    assert {p.dtype for p in (*model.unet.parameters(), *model.vae.parameters())} == {torch.bfloat16}
    wide = load_base(tmp_path)
    for name, layer in base_layers(wide.unet, wide.text_encoder).items():
        for key, expected in layer.named_parameters(recurse=False):
            found = getattr(model.subject_net.get_submodule(name), key)[tuple(map(slice, expected.shape))]
            assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_a_saved_variant_is_read_by_its_name(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path, variant="fp16")
    again: Any = SubjectDiffusionPipeline.from_pretrained(tmp_path, variant="fp16")
    again.set_progress_bar_config(disable=True)
    close(draw(again), draw(pipe))


@pytest.mark.parametrize("checker", [["stable_diffusion", "StableDiffusionSafetyChecker"], [None, None], None])
def test_a_base_with_or_without_a_safety_checker(sd2: Path, tmp_path: Path, checker: Any) -> None:
    folder = shutil.copytree(sd2, tmp_path / "base")
    index = json.loads((folder / "model_index.json").read_text())
    index.pop("safety_checker", None)
    (folder / "model_index.json").write_text(
        json.dumps(index if checker is None else index | {"safety_checker": checker})
    )
    assert load_base(folder).unet is not None


@pytest.mark.parametrize("whole", [True, False])
def test_a_clip_without_its_processor_is_prepared_for_as_clips_are(tmp_path: Path, whole: bool) -> None:
    folder = write_clip(tmp_path / "clip", whole=whole)
    _, theirs = load_image_encoder(folder)
    for file in ("preprocessor_config.json", "processor_config.json"):
        (folder / file).unlink(missing_ok=True)
    _, ours = load_image_encoder(folder)
    assert ours.image_mean == theirs.image_mean and ours.image_std == theirs.image_std
    assert dict(ours.crop_size) == dict(theirs.crop_size)


def test_an_adapter_for_images_is_refused_in_one_line(pipe: Any) -> None:
    with pytest.raises(ModelError, match="set_subject_scale"):
        pipe.load_ip_adapter("folder")
