"""The toy world: scenes in which every caption, box and mask is known. A pure function of seeds."""

from toyworld.render.captions import PLURALS, VOCABULARY
from toyworld.render.drawings import NOUNS
from toyworld.render.identity import COLORS, Identity, sample_identity
from toyworld.render.scene import PlacedSubject, Scene, render_scene
from toyworld.render.textures import BACKGROUNDS

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "NOUNS",
    "PLURALS",
    "VOCABULARY",
    "Identity",
    "PlacedSubject",
    "Scene",
    "render_scene",
    "sample_identity",
]
