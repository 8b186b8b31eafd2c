"""The commands that score a model, and lay scores side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from sdd.training import DEFAULT_MODEL, HELD_OUT, LABELS, MAKES_HELD_OUT
from subject_diffusion._extras import require
from subject_diffusion.errors import RunError

if TYPE_CHECKING:
    from train.benchmark.measure import Pairing
    from train.benchmark.options import Drawing
    from train.benchmark.protocol import Protocol
    from train.benchmark.result import Result

Suite = Literal["toyworld", "dreambench", "dreambench-pairs", "humans"]
ROLES = "dino, dinov2, clip, siglip2 or face"


@dataclass(frozen=True)
class _Asked:
    """What was asked of a benchmark, as it was typed."""

    model: Path
    suite: str
    data: Path
    backbones: Sequence[str]
    per_prompt: int
    only: Sequence[str]
    pairing: Pairing
    shard: str
    seed: int
    labels: Path | None
    overrides: Sequence[str]
    images: Path | None
    manifest: Path | None


def evaluate(
    model: Annotated[
        Path | None,
        typer.Argument(
            help="Folder of a run of `sdd train`, of one of its checkpoints, of a pipeline, or of a subject net with "
            f"its recipe. {DEFAULT_MODEL}",
            show_default=False,
        ),
    ] = None,
    suite: Annotated[Suite, typer.Option("--suite", help="What is drawn, and how it is scored.")] = "toyworld",
    data: Annotated[
        str | None,
        typer.Option(
            help="toyworld: dataset of images that the run has not seen; dreambench: folder of the DreamBooth dataset; "
            "dreambench-pairs: that folder, with dreambench_pairs.json in it or beside it; humans: a folder like it. "
            f"[default: {HELD_OUT}]"
        ),
    ] = None,
    backbones: Annotated[
        list[str] | None,
        typer.Option(
            "--backbone",
            metavar="ROLE=MODEL",
            help=f"What pictures are compared by, a folder or a hub id: dino=facebook/dino-vits16. {ROLES}.",
        ),
    ] = None,
    per_prompt: Annotated[int, typer.Option(help="Pictures of each prompt; the paper: 6.", min=1)] = 4,
    only: Annotated[list[str] | None, typer.Option("--subject", help="Only this subject or pair; repeatable.")] = None,
    pairing: Annotated[
        Literal["all", "reference"], typer.Option(help="Compare with all photographs, or with the reference alone.")
    ] = "all",
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Only draw this share, in a process of its own; 1/1 draws and scores.")
    ] = "1/1",
    seed: Annotated[int, typer.Option(help="Another seed draws other pictures.", min=0)] = 0,
    images: Annotated[
        Path | None, typer.Option("--images", help="Folder of pictures that were drawn already, by anybody; no MODEL.")
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(
            "--manifest",
            help='JSON lines, one for each: {"file": "a.png", "subjects": ["cat"], "prompt": "a red cat"}.',
        ),
    ] = None,
    cases: Annotated[int, typer.Option("--cases", help="toyworld: how many images.", min=2)] = 96,
    subjects: Annotated[
        int, typer.Option(help="toyworld: subjects of each; images with fewer are left out.", min=1)
    ] = 1,
    tags: Annotated[list[str] | None, typer.Option("--tag", help="toyworld: only subjects of this tag.")] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="Recipe (a file or a name) whose detector and segmenter cut subjects out. [default: toy for toyworld, "
            "else nothing is cut out]"
        ),
    ] = None,
    identity_encoder: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="toyworld: what tells individuals apart, a DINOv2 or SigLIP 2, a folder or a hub id. [default: the "
            "toy world's own]",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder for pictures and report. [default: in MODEL, if it is a run; else in out/RUN-NAME, such as "
            "out/sdd-pipeline]",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a sampler's setting: num_inference_steps=30")
    ] = None,
) -> None:
    """Scores a model's pictures.

    The suite toyworld compares samples of held-out images with their references, beside samples with shuffled
    references, the base model's, and the true images: for whom of eight individuals is each taken? DreamBench's draw
    photographed subjects from the published prompts, again only what is missing.
    """
    require("train")

    from train.sampling.trained import default_model

    named, model = model is not None, model or default_model()
    given = {
        "--backbone": backbones, "--subject": only, "--set": overrides, "--tag": tags,
        "--per-prompt": per_prompt != 4, "--pairing": pairing != "all", "--shard": shard != "1/1", "--seed": seed != 0,
        "--cases": cases != 96, "--subjects": subjects != 1, "--images": images, "--manifest": manifest,
        "--identity-encoder": identity_encoder,
    }  # fmt: skip
    of_toyworld = ("--cases", "--subjects", "--tag", "--identity-encoder")
    for option, used in given.items():
        if used and (option in of_toyworld) != (suite == "toyworld"):
            raise RunError(f"{option} is not an option of --suite {suite}; see `sdd evaluate --help`")
    if suite == "toyworld":
        _toyworld(model, data or HELD_OUT, cases, subjects, tags, labels or LABELS, identity_encoder, out)
        return
    if data is None:
        raise RunError(f"--suite {suite} needs --data, the folder of its photographs and prompts")
    if (images is None) != (manifest is None):
        raise RunError("--images and --manifest go together: a folder of pictures, and what each of them shows")
    if images is not None:
        if named or any(given[o] for o in ("--per-prompt", "--shard", "--seed", "--set")):
            raise RunError("--images are drawn already: leave MODEL, --per-prompt, --shard, --seed and --set out")
        per_prompt = 1
    asked = _Asked(
        model, suite, Path(data), backbones or [], per_prompt, only or [], pairing, shard, seed, labels,
        overrides or [], images, manifest,
    )  # fmt: skip
    _benchmark(asked, out)


def _toyworld(
    run: Path,
    data: str,
    cases: int,
    subjects: int,
    tags: Sequence[str] | None,
    labels: Path,
    identity_encoder: str | None,
    out: Path | None,
) -> None:
    from datapipe.recipe import load_recipe
    from subject_diffusion.packaged import local_path
    from train.sampling.trained import SHIPPED, bundled_steps
    from train.stream.shard_index import check_there
    from train.trainer.run_folder import results_folder, trained_model

    finder = load_recipe(labels)
    trained_model(run)
    if data == HELD_OUT and not Path(data).exists():
        raise RunError(f"{data}: not made yet; `{MAKES_HELD_OUT}` makes it, or name another dataset with --data")
    check_there(data)

    from datapipe.backends.loading import check_model
    from datapipe.backends.patch_features import KINDS
    from sdd.training import quieten
    from train.evaluation.beyond import evaluate_beyond
    from train.evaluation.evaluate import evaluate_run
    from train.evaluation.report import Evaluation, IdentityEncoder, compared, read_report
    from train.trainer.pipeline import recipe_of

    encoder = IdentityEncoder(model=identity_encoder) if identity_encoder else IdentityEncoder()
    check_model(encoder, KINDS, processor=True)
    quieten()
    out = out or results_folder(run) / "evaluation"
    only = frozenset(tags) if tags else None
    asked = Evaluation(data=data, images=cases, subjects=subjects, tags=only, labels=finder, identity_encoder=encoder)
    report = evaluate_run(run, asked, out)
    console = Console()
    for table in report.tables():
        console.print(table)
    console.print(evaluate_beyond(run, asked, out).table())
    shipped = local_path(SHIPPED)
    known = None if run.resolve() == shipped.resolve() else read_report(shipped, asked, report.drawn)
    if known is not None:
        console.print(compared({"this model": report, "the bundled toy model": known}))
        recipe, theirs = recipe_of(run), bundled_steps()
        if recipe is not None and recipe.init_from is None and recipe.optimizer.steps < theirs:
            on = (
                f"the bundled model was trained for {theirs:,} steps, this one for {recipe.optimizer.steps:,}; to go "
                f"on: `make train SET=optimizer.steps={theirs}`"
            )
            console.print(on, highlight=False, soft_wrap=True)
    console.print(f"report: {out}/report.json\npictures: {out}/samples.png", highlight=False, soft_wrap=True)


def _benchmark(asked: _Asked, out: Path | None) -> None:
    from datapipe.recipe import load_recipe
    from train.benchmark.manifest import given_pictures
    from train.benchmark.options import Share, parse_backbones
    from train.trainer.run_folder import results_folder

    share = Share.parse(asked.shard)
    protocol = _protocol(asked)
    finder = load_recipe(asked.labels) if asked.labels else None
    backbones = parse_backbones(asked.backbones, masks=finder is not None)
    if not backbones and share.of == 1:
        raise RunError("no backbone to compare by; name one or more, as in --backbone dino=facebook/dino-vits16")
    given, drawing = None, None
    if asked.images is not None and asked.manifest is not None:
        given = given_pictures(asked.manifest, asked.images, protocol)
    else:
        drawing = _drawing(asked)

    from sdd.training import quieten
    from train.benchmark.run import Question, run_benchmark, score_given

    quieten()
    question = Question(protocol, finder, backbones, asked.pairing, (asked.images or asked.model).resolve().name)
    if given is not None:
        out = out or asked.images or Path()
        result: Result | None = score_given(question, *given, out)
    else:
        assert drawing is not None
        out = out or results_folder(asked.model) / asked.suite
        result = run_benchmark(question, drawing, out, share)
    _report(result, out)


def _report(result: Result | None, out: Path) -> None:
    from train.benchmark.comparison import terminal
    from train.benchmark.result import RESULT

    console = Console()
    if result is None:
        console.print(
            f"pictures: {out}/images; when all shares are drawn, the command without --shard scores them",
            highlight=False,
            soft_wrap=True,
        )
        return
    console.print(terminal([(str(out), result)]))
    console.print(f"result: {out}/{RESULT}", highlight=False, soft_wrap=True)


def _protocol(asked: _Asked) -> Protocol:
    from train.benchmark.dreambench import PAIRS, dreambench, dreambench_pairs
    from train.benchmark.humans import humans

    data = asked.data
    if asked.suite == "humans":
        return humans(data, asked.per_prompt, asked.only)
    if asked.suite == "dreambench":
        return dreambench(data, asked.per_prompt, asked.only)
    pairs = data / PAIRS if (data / PAIRS).exists() else data.parent / PAIRS
    return dreambench_pairs(pairs, data, asked.per_prompt, asked.only)


def _drawing(asked: _Asked) -> Drawing:
    """A trained model, and how to sample it: as while it was trained; one that does not say, as in the paper. Raises
    SddError."""
    from train.trainer.run_folder import trained_model

    found = trained_model(asked.model)

    from subject_diffusion.settings import validated
    from train.benchmark.options import Drawing, Sampler
    from train.trainer.pipeline import recipe_of

    recipe = recipe_of(asked.model)
    tree = recipe.validation.sampling() if recipe else {}
    return Drawing(found, validated(Sampler, tree, asked.overrides, "--set"), asked.seed)


def compare(
    results: Annotated[
        list[Path], typer.Argument(metavar="RESULT…", help="result.json of benchmarks, or their folders.")
    ],
    save: Annotated[
        Path | None,
        typer.Option("--save", help="Also write it to this file: .md, a table; .html, a page with the pictures."),
    ] = None,
) -> None:
    """Lays results side by side.

    Only what was measured alike can be: the same pictures asked for, photographs, pairing, backbones, preprocessing and
    scoring code. Else the first difference is named.
    """
    require("train")
    if save is not None and save.suffix not in (".md", ".html"):
        raise RunError(f"--save {save}: a table is .md, a page is .html")

    from subject_diffusion.storage import named_errors
    from train.benchmark.comparison import check_alike, folder_of, markdown, page, terminal
    from train.benchmark.result import read_result

    read = [(str(path), read_result(path)) for path in results]
    check_alike(read)
    Console().print(terminal(read))
    if save is not None:
        text = markdown(read) if save.suffix == ".md" else page(read, [folder_of(path) for path in results])
        with named_errors(str(save), RunError):
            save.write_text(text, "utf-8")
        Console().print(f"written: {save}", highlight=False, soft_wrap=True)
