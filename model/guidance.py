"""Three-branch guidance: text and subjects are each pushed by their own scale."""

from __future__ import annotations

from torch import Tensor


def guide(full: Tensor, image: Tensor, nothing: Tensor, text_scale: float, subject_scale: float) -> Tensor:
    """ε = ε_u + s_t·(ε_full − ε_img) + s_i·(ε_img − ε_u) (Subject-Diffusion, inference).

    full: predicted with text, location and subject tokens; image: without the text; nothing: with none of them; all of
    one shape, ε or v alike.
    """
    return nothing + text_scale * (full - image) + subject_scale * (image - nothing)
