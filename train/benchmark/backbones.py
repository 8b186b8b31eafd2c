"""The models that pictures are compared by, from folders in hub format or by hub id, each with the hash of the weights
that were loaded: published scores differ because backbones and preprocessing do."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import functional as vision

from datapipe.backends.loading import check_tokenizer, device_of, load, refuse_partly_loaded
from train.benchmark.options import KINDS, BackboneSettings

TOGETHER = 16
"""Pictures that go through a backbone at once."""
_UNUSED = re.compile(r"pooler|position_ids")
"""Tensors that may be missing or left over. No pooler of DINO's hub folders was trained, and none is used; old CLIP
folders hold positions as a tensor."""


@dataclass(frozen=True)
class Preprocessing:
    """The shorter side becomes `resize_px` (bicubic), the middle square of `crop_px` is kept, then
    (x / 255 − mean) / std: torchvision's transforms, as published scripts have them."""

    resize_px: int
    crop_px: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, picture: Image.Image) -> Tensor:
        """(3, crop_px, crop_px) float32."""
        resized = vision.resize(picture.convert("RGB"), [self.resize_px], vision.InterpolationMode.BICUBIC)
        pixels = vision.to_tensor(vision.center_crop(resized, [self.crop_px]))
        prepared: Tensor = vision.normalize(pixels, self.mean, self.std)
        return prepared


class Backbone:
    """A picture as one vector: the class token of DINO and DINOv2, the projection of CLIP."""

    def __init__(self, role: str, settings: BackboneSettings) -> None:
        """Raises BackendError."""
        self.role, self._device = role, device_of(settings)
        self._model, self.weights = _load(role, settings)
        self._model.to(self._device)
        processor = load(settings, transformers.AutoImageProcessor.from_pretrained)
        config = self._model.config.vision_config if role == "clip" else self._model.config
        side = int(config.image_size)
        if role == "dinov2":  # trained at 518 px last, and compared at 224 by everybody
            side = min(side, 224 // config.patch_size * config.patch_size)
        # DINO's and DINOv2's own evaluations resize to 256 for a crop of 224; CLIP's crops what it resized to.
        resize = side if role == "clip" else round(side * 256 / 224)
        self.preprocessing = Preprocessing(resize, side, tuple(processor.image_mean), tuple(processor.image_std))
        self._tokenizer = load(settings, transformers.AutoTokenizer.from_pretrained) if role == "clip" else None
        if self._tokenizer is not None:
            check_tokenizer(settings, self._tokenizer)

    def identity(self) -> dict[str, Any]:
        """What a result records of it: what it is, not where it was found."""
        return {"weights": self.weights, "preprocessing": asdict(self.preprocessing)}

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(N, D) float32 of length 1, on the CPU."""
        found = []
        for start in range(0, len(pictures), TOGETHER):
            pixels = torch.stack([self.preprocessing(p) for p in pictures[start : start + TOGETHER]]).to(self._device)
            if self.role == "clip":
                found.append(_bare(self._model.get_image_features(pixel_values=pixels)))
            else:
                found.append(self._model(pixel_values=pixels).last_hidden_state[:, 0])
        return functional.normalize(torch.cat(found).float(), dim=-1).cpu()

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> Tensor:
        """(N, D) float32 of length 1, on the CPU; CLIP alone reads."""
        assert self._tokenizer is not None
        tokens = self._tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")
        return functional.normalize(_bare(self._model.get_text_features(**tokens.to(self._device))), dim=-1).cpu()


@dataclass(frozen=True)
class Patches:
    """A picture's patch features. features: (h · w, D) float32 of length 1, row by row; grid: (h, w)."""

    features: Tensor
    grid: tuple[int, int]


class PatchBackbone:
    """SigLIP 2 NaFlex: a picture as patches, in its own shape."""

    role = "siglip2"

    def __init__(self, settings: BackboneSettings) -> None:
        """Raises BackendError."""
        self._device = device_of(settings)
        whole, self.weights = _load(self.role, settings)
        self._model = getattr(whole, "vision_model", whole).to(self._device)
        self._processor = load(settings, transformers.AutoImageProcessor.from_pretrained)

    def identity(self) -> dict[str, Any]:
        """What a result records of it: what it is, not where it was found."""
        p = self._processor
        preprocessing = {
            "max_num_patches": p.max_num_patches,
            "patch_px": p.patch_size,
            "mean": list(p.image_mean),
            "std": list(p.image_std),
        }
        return {"weights": self.weights, "preprocessing": preprocessing}

    @torch.no_grad()
    def patches(self, pictures: Sequence[Image.Image]) -> list[Patches]:
        """On the CPU."""
        found = []
        for start in range(0, len(pictures), TOGETHER):
            some = [p.convert("RGB") for p in pictures[start : start + TOGETHER]]
            inputs = self._processor(images=some, return_tensors="pt").to(self._device)
            hidden = self._model(**inputs).last_hidden_state.float().cpu()
            for features, (height, width) in zip(hidden, inputs["spatial_shapes"].tolist(), strict=True):
                found.append(Patches(functional.normalize(features[: height * width], dim=-1), (height, width)))
        return found


def _load(role: str, settings: BackboneSettings) -> tuple[Any, str]:
    """The model in evaluation mode as float32, and the first digits of its weights' SHA-256. Raises BackendError."""
    config = load(settings, transformers.AutoConfig.from_pretrained)
    model, report = load(
        settings,
        getattr(transformers, KINDS[role][config.model_type]).from_pretrained,
        use_safetensors=True,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    missing, unexpected = ([n for n in report[k] if not _UNUSED.search(n)] for k in ("missing_keys", "unexpected_keys"))
    refuse_partly_loaded(settings, missing, [name for name, *_ in report["mismatched_keys"]], unexpected)
    return model.eval(), weights_digest(model)


def weights_digest(*models: torch.nn.Module) -> str:
    """The first 16 digits of the SHA-256 of the tensors that are used, wherever they came from."""
    digest = hashlib.sha256()
    for model in models:
        for name, tensor in sorted(model.state_dict().items()):
            if not _UNUSED.search(name):
                values = tensor.float().cpu().contiguous().numpy()
                digest.update(f"{name}{tuple(tensor.shape)}".encode() + values.tobytes())
    return digest.hexdigest()[:16]


def _bare(features: Any) -> Tensor:
    # transformers 5 wraps what 4 gave bare.
    bare: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return bare.float()
