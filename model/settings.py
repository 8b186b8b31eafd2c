"""The subject model's design: each row of the paper's ablation, each difference between the paper and its released
code, and what goes beyond both, is a setting."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from subject_diffusion.settings import Settings


class SubjectSettings(Settings):
    """The subject model on top of its base. Widths are not settings: they follow from the base's own."""

    max_subjects: int = Field(2, ge=1)
    """Slots for subjects; a prompt fills any number of them. Released code: 2."""
    image_cls: bool = True
    """Placeholders carry the reference's CLIP class embedding. Off (ablation "no image CLS"): a learned vector instead,
    the same for every subject, so that prompt and attention loss stay as they are."""
    adapter: bool = True
    """Gated adapters bring the reference's patch features into the UNet. Off: ablation "no adapter"."""
    box_embedding: bool = True
    """Adapter tokens carry their subject's box. Off: ablation "no box coordinates", which takes away `adapter_reach:
    boxes` too."""
    adapter_reach: Literal["image", "boxes"] = "image"
    """Which visual tokens attend to a subject's: all [paper], or those that its box touches, as in MS-Diffusion's
    layout-guided attention, so that several subjects mix less."""
    adapter_start: Literal["closed", "open"] = "closed"
    """How an untrained adapter changes nothing: by closed gates [paper], or by last layers of zeros behind open ones,
    which learn within far fewer steps. Without effect with `init_from`."""
    location_mask: bool = True
    """The UNet sees the union of the boxes as a fifth channel. Off: ablation "no location mask"."""
    attention_loss: Literal["balanced", "paper", "none"] = "balanced"
    """balanced: FastComposer's, as in the released code; paper: L1 to the mask; none: ablation "no attention loss"."""
    attention_weight: float = Field(0.01, ge=0)
    """The attention loss's share of the whole. Released code: λ = 0.01."""
    attention_tokens: Literal["both", "placeholder"] = "both"
    """Whose maps the loss controls: the placeholder's and the tag's (released code), or the placeholder's (paper)."""
    attention_downsampling: tuple[int, ...] = (2, 4, 8)
    """Which maps, by how many latent pixels one of theirs spans. Paper: sides 32, 16 and 8 for a latent side of 64."""
    drop_text: tuple[float, float] = (0.0, 0.10)
    """The text is dropped in training where the condition draw r ~ U(0, 1) falls in [low, high). Released code."""
    drop_location: tuple[float, float] = (0.05, 0.15)
    """The location channel is zeroed where the same r falls in [low, high). Released code."""
    drop_subject_tokens: bool = True
    """Adapter tokens are dropped together with the location, so that all three branches of the guidance are trained.
    Off: never dropped, a fault of the released code, which then samples with an untrained unconditional branch."""

    @model_validator(mode="after")
    def _intervals_of_probability(self) -> SubjectSettings:
        for name in ("drop_text", "drop_location"):
            low, high = getattr(self, name)
            if not 0 <= low <= high <= 1:
                raise ValueError(f"{name}: [{low:g}, {high:g}) is no interval between 0 and 1")
        if not self.attention_downsampling and self.attention_loss != "none":
            raise ValueError("attention_downsampling: names no map; or set attention_loss=none")
        return self
