"""The code that travels with a saved pipeline: one file, because diffusers fetches a component's own file and no other
from the hub, and none of it needs this project."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

NET_MODULES = (
    "subject_diffusion.errors",
    "model.errors",
    "model.attention",
    "model.attention_control",
    "model.adapter",
    "model.location",
    "model.prompt",
    "model.unet",
    "model.base_layers",
    "model.subject_net",
)
PIPELINE_MODULES = (
    *NET_MODULES,
    "model.guidance",
    "model.conditions",
    "model.reference_background",
    "model.reference",
    "model.mention",
    "model.subject",
    "model.inputs",
    "model.latents",
    "model.interpolation",
    "model.prediction",
    "model.sampling",
)


def single_file(modules: Sequence[str]) -> str:
    """The source of modules, each after those that it imports, as one module. Their names must differ."""
    imports: set[str] = set()
    bodies = []
    for name in modules:
        source = Path(str(import_module(name).__file__)).read_text()
        lines = source.splitlines()
        for node in ast.parse(source).body:
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            if not (isinstance(node, ast.ImportFrom) and node.module in (*modules, "__future__")):
                imports.add(ast.unparse(node))
            lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or node.lineno) - node.lineno + 1)
        bodies.append("\n".join(lines).strip())
    head = [
        "# Written by save_pretrained from these modules: " + ", ".join(modules),
        "from __future__ import annotations",
    ]
    return "\n\n\n".join(["\n".join([*head, *sorted(imports)]), *bodies]) + "\n"
