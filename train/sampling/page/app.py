"""The page itself: what stands where, and which of the studio's calls each control makes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr

from subject_diffusion.errors import SddError, one_line
from subject_diffusion.packaged import local_path
from train.sampling.drawing import read_drawing
from train.sampling.page.guard import guards
from train.sampling.page.studio import KEPT_S, MAX_BYTES, Cut, Studio, tinted

HERE = Path(__file__).parent
MOST_WAITING = 16
"""People in the queue; the next is told to come later."""
BOXES = ((0.08, 0.3, 0.48, 0.85), (0.52, 0.3, 0.92, 0.85))
NAMED = f"""(boxes, first, second) => [[first, second].flatMap((tag, k) =>
  k === 0 || tag ? [{{ box: {json.dumps(BOXES)}[k], ...boxes[k], tag }}] : [])]"""
"""JavaScript: the canvas's value with the subjects' names. There is a second box where the second has a name."""
EXAMPLES = (
    ("a mug on grass", (("mug", "mug"),)),
    ("a fish on water", (("fish", "fish"),)),
    ("a mug and a fish on grass", (("mug", "mug"), ("fish", "fish"))),
)
"""A prompt, and the tags and reference pictures of its subjects, of individuals that no toy model was trained on."""
REFERENCES = "examples/references"
FONTS = ["system-ui", "sans-serif"]  # none from the net
STYLE = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; }
#draw { min-height: 3rem; }
#drawn .caption-label { max-width: 96%; white-space: normal; font-size: 11px; padding: 1px 4px; }
@media (max-width: 600px) { .gradio-container { padding: 8px !important; } }
"""


class _Panel:
    """A subject's controls, and its cutout as the session's state."""

    def __init__(self, studio: Studio, number: int) -> None:
        self._studio = studio
        self.cut = gr.State(None)
        self.tag = gr.Textbox(label="What the prompt calls it", placeholder="mug", elem_id=f"tag-{number}")
        self.upload = gr.Image(
            label="Its picture: drop it here, then click the subject",
            type="filepath",
            image_mode=None,
            sources=["upload", "clipboard"],
            buttons=[],
            height=260,
            elem_id=f"upload-{number}",
        )
        self.shown = gr.Image(
            label="What is taken of it",
            interactive=False,
            buttons=[],
            height=260,
            visible=False,
            elem_id=f"cut-{number}",
        )
        outputs = [self.cut, self.shown]
        self.upload.upload(self._uploaded, self.upload, outputs, show_progress="minimal")
        self.upload.clear(lambda: (None, gr.update(value=None, visible=False)), None, outputs)
        self.upload.select(self._clicked, [self.upload, self.tag], outputs, show_progress="minimal")

    def _uploaded(self, path: str) -> tuple[Cut | None, Any]:
        with _told():
            return _shown(self._studio.uploaded(path))

    def _clicked(self, path: str, tag: str, event: gr.SelectData) -> tuple[Cut | None, Any]:
        with _told():
            return _shown(self._studio.clicked(path, tag, *event.index))


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Errors of the user's become a note on the page."""
    try:
        yield
    except SddError as error:
        raise gr.Error(one_line(error), print_exception=False) from None


def _shown(cut: Cut | None) -> tuple[Cut | None, Any]:
    return cut, gr.update(value=None if cut is None else tinted(cut), visible=cut is not None)


def build(studio: Studio) -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="Subject-Diffusion", analytics_enabled=False, delete_cache=(KEPT_S // 6, KEPT_S)) as page:
        gr.Markdown(f"# Draw your own subject\n{studio.about}")
        with gr.Row():
            examples = [gr.Button(f"Example: {prompt}", size="sm") for prompt, _ in EXAMPLES]
        with gr.Row():
            with gr.Column(min_width=300):
                with gr.Tab("Subject"):
                    first = _Panel(studio, 1)
                with gr.Tab("Second subject"):
                    second = _Panel(studio, 2)
            with gr.Column(min_width=300):
                prompt = gr.Textbox(label="Prompt, with each subject's name in it", elem_id="prompt")
                gr.Markdown("Where: drag the boxes; their corner resizes them.")
                canvas = _canvas()
                controls = _controls(studio)
                draw = gr.Button("Draw", variant="primary", elem_id="draw")
            with gr.Column(min_width=300):
                gallery = gr.Gallery(
                    label="Drawn",
                    columns=2,
                    object_fit="contain",
                    format="png",
                    height=420,
                    interactive=False,
                    buttons=["download"],
                    elem_id="drawn",
                )
                with gr.Accordion("How it was made (click a picture)", open=False):
                    made = gr.Code(language="json", show_label=False, max_lines=24, wrap_lines=True, elem_id="made")
        _wire(studio, (first, second), prompt, canvas, draw, gallery, made, controls, examples)
    page.queue(default_concurrency_limit=1, max_size=MOST_WAITING, api_open=False)
    return page


def _controls(studio: Studio) -> list[Any]:
    """Text, identity, seed and number of pictures."""
    usual = studio.model.defaults
    with gr.Row():
        text = gr.Slider(1, 15, usual.guidance_scale, step=0.5, label="Text", elem_id="text")
        identity = gr.Slider(1, 10, usual.subject_guidance_scale, step=0.5, label="Identity", elem_id="identity")
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31, min_width=120, elem_id="seed")
        count = gr.Radio([1, 4], value=4, label="Pictures", min_width=120)
    return [text, identity, seed, count]


def _canvas() -> gr.HTML:
    return gr.HTML(
        value=_boxes(""),
        html_template='<div class="paper"></div>',
        css_template=(HERE / "canvas.css").read_text(),
        js_on_load=(HERE / "canvas.js").read_text(),
        elem_id="canvas",
    )


def _boxes(*tags: str) -> list[dict[str, Any]]:
    """The canvas's value."""
    return [{"tag": tag, "box": list(box)} for tag, box in zip(tags, BOXES, strict=False)]


def _wire(
    studio: Studio,
    panels: tuple[_Panel, _Panel],
    prompt: gr.Textbox,
    canvas: gr.HTML,
    draw: gr.Button,
    gallery: gr.Gallery,
    made: gr.Code,
    controls: Sequence[Any],
    examples: Sequence[gr.Button],
) -> None:
    cuts, tags = [p.cut for p in panels], [p.tag for p in panels]

    for tag in tags:  # in the browser, so that no answer comes late and moves a box back
        tag.change(None, [canvas, *tags], canvas, js=NAMED, queue=False)

    def drawn(
        words: str, boxes: list[Any], a: str, b: str, one: Cut | None, two: Cut | None, *rest: Any,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  # how gradio is told that there is progress
    ) -> list[tuple[str, str]]:  # fmt: skip
        return _draw(studio, words, boxes, (a, b), (one, two), rest, progress)

    inputs = [prompt, canvas, *tags, *cuts, *controls]
    draw.click(drawn, inputs, gallery, show_progress_on=gallery)
    for button, (words, cast) in zip(examples, EXAMPLES, strict=True):
        shown = [part for p in panels for part in (p.tag, p.upload, p.cut, p.shown)]
        ready = button.click(_example(studio, words, cast), None, [prompt, canvas, *shown], show_progress="hidden")
        ready.then(drawn, inputs, gallery, show_progress_on=gallery)

    def tell(files: list[Any], event: gr.SelectData) -> str:
        drawing = read_drawing(Path(files[event.index][0])).model_dump(mode="json", exclude={"asked"})
        for reference in (r for subject in drawing["subjects"] for r in subject["references"]):
            reference["mask"] = f"{len(reference['mask'])} characters of run lengths"
        return json.dumps(drawing, indent=2)

    gallery.select(tell, gallery, made, show_progress="hidden", queue=False)


def _example(studio: Studio, words: str, cast: Sequence[tuple[str, str]]) -> Any:
    """What a click on an example sets: prompt, canvas, and both panels."""

    def fill() -> list[Any]:
        found: list[Any] = []
        for number in range(2):
            tag, name = cast[number] if number < len(cast) else ("", "")
            path = str(shutil.copy(local_path(f"{REFERENCES}/{name}.png"), studio.folder)) if name else None
            cut = studio.uploaded(path) if path else None
            found += [tag, path, *_shown(cut)]
        return [words, _boxes(*(tag for tag, _ in cast)), *found]

    return fill


def _draw(
    studio: Studio,
    words: str,
    boxes: Sequence[Any],
    tags: Sequence[str],
    cuts: Sequence[Cut | None],
    controls: Sequence[Any],
    progress: gr.Progress,
) -> list[tuple[str, str]]:
    text, identity, seed, count = controls
    cast: list[Any] = []
    for k, cut in enumerate(cuts):
        if cut is None:
            continue
        if not tags[k].strip():
            raise gr.Error("Say what the prompt calls each subject, below its tab.", print_exception=False)
        cast.append((tags[k], cut, tuple(boxes[k]["box"])))
    settings = {"guidance_scale": float(text), "subject_guidance_scale": float(identity)}
    each, done = studio.model.defaults.num_inference_steps, 0

    def step(number: int) -> None:
        nonlocal done
        done += 1
        progress((done, each * count), desc=f"picture {number + 1} of {count}", unit="steps")

    seeds = range(int(seed or 0), int(seed or 0) + int(count))
    with _told():
        return studio.draw(words, cast, settings, seeds, step)


@contextlib.contextmanager
def served(studio: Studio, host: str, port: int) -> Iterator[str]:
    """The address at which the page is served in this block. Of files, what it uploaded and drew is all that is."""
    page = build(studio)
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            max_file_size=MAX_BYTES,
            footer_links=[],
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            quiet=True,
            theme=gr.themes.Base(font=FONTS, font_mono=["monospace"]),
            css=STYLE,
            app_kwargs={"middleware": guards(host)},
            prevent_thread_lock=True,
        )
        yield address
    finally:
        page.close(verbose=False)
