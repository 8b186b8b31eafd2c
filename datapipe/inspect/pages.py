"""Pages from templates: HTML in which what comes from the web is escaped and no other script runs, and Markdown."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Sequence
from typing import Any

import jinja2
from markupsafe import Markup

_LOADER = jinja2.PackageLoader("datapipe.inspect", "page")


def html_page(
    template: str, /, *, scripts: Sequence[str] = ("picture", "gallery"), connects: bool = False, **context: Any
) -> str:
    """TEMPLATE.html with the galleries' style and some scripts in it; the policy in its head lets no other script run,
    and nothing be sent but, with `connects`, to where the page came from."""
    style = _LOADER.get_source(_HTML, "gallery.css")[0]
    script = "".join(_LOADER.get_source(_HTML, f"{name}.js")[0] for name in scripts)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return _HTML.get_template(f"{template}.html").render(
        style=Markup(style), script=Markup(script), script_hash=f"sha256-{digest}", connects=connects, **context
    )


def markdown_page(template: str, /, **context: Any) -> str:
    """TEMPLATE.md; text of the web goes through its filter `md`."""
    return _MARKDOWN.get_template(f"{template}.md").render(**context)


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _escaped(text: str) -> str:
    """Text such that Markdown shows it as it is, in a table or elsewhere."""
    return re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _environment(**options: Any) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=_LOADER, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, **options
    )
    environment.filters.update(short=_short, md=_escaped)
    return environment


_HTML = _environment(autoescape=True)
_MARKDOWN = _environment(autoescape=False, keep_trailing_newline=True)  # but see the filter md
