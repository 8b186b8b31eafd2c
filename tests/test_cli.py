"""A user's mistake is answered with one line that says what, where and what to do, with exit code 2, and leaves
nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from PIL import Image
from typer.core import TyperArgument, TyperGroup, TyperOption

from datapipe.schema import SCHEMA_VERSION
from datapipe.shards import Store
from sdd.cli import app
from tests.conftest import jpeg, kept_sample
from tests.toy import PROJECT, TOY_RECIPE, command, write_recipe

TOY = ("dataset", "--recipe", "toy")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "urls.parquet"
    pq.write_table(pa.table({"url": ["http://127.0.0.1:9/a.jpg"], "caption": ["a"]}), path)
    return path


def write_empty(path: Path) -> str:
    pq.write_table(pa.table({"url": pa.array([], pa.string())}), path)
    return str(path)


def write_no_url(path: Path) -> str:
    pq.write_table(pa.table({"image_uri": ["x"], "text": ["y"]}), path)
    return str(path)


def write_no_parquet(path: Path) -> str:
    path.write_bytes(b"not a parquet file at all")
    return str(path)


@pytest.mark.parametrize(
    ("write", "named"),
    [(write_empty, "no rows"), (write_no_url, "image_uri"), (write_no_parquet, "parquet"), (str, "table.parquet")],
    ids=["empty table", "missing column", "no parquet", "missing file"],
)
def test_an_input_that_cannot_be_used(refused, tmp_path, write, named):
    out = tmp_path / "out"
    source = write(tmp_path / "table.parquet")
    error = refused("dataset", "--recipe", str(TOY_RECIPE), "--input", source, "--out", str(out))
    assert named in error
    assert not list(out.glob("*.tar"))


def test_a_dry_run_shows_the_first_rows_as_they_will_be_read_and_leaves_nothing(sdd, tmp_path):
    lines = [
        "url\tcaption",
        "http://x.example/0.jpg\t[bold]a cat",
        "torn",
        *(f"http://x/{i}.jpg\tb" for i in range(30)),
    ]
    (tmp_path / "t.tsv").write_text("\n".join(lines))
    out = tmp_path / "out"
    dry = ("dataset", "--input", tmp_path / "t.tsv", "--out", out, "--dry-run")
    code, printed, _ = sdd(*dry)
    assert code == 0 and not out.exists()
    assert "t.tsv: 32 rows: 1 tsv file, URL column `url`, caption `caption`; 1 of them cannot be read" in printed
    assert "not read: t.tsv line 3: 1 cell in place of 2" in printed
    shown = [line.split() for line in printed.splitlines() if "http://" in line]
    assert [row[0] for row in shown] == ["0", *map(str, range(2, 10))]
    assert shown[0][1:4] == ["http://x.example/0.jpg", "[bold]a", "cat"]
    code, _, error = sdd(*dry, "--strict")
    assert code == 2 and "t.tsv line 3" in error and not out.exists()


def test_a_start_that_fails_leaves_the_folder_as_it_was(refused, tmp_path):
    (tmp_path / "t.csv").write_text("url\nhttp://127.0.0.1:9/a.jpg\n")
    common = (*TOY, "--input", tmp_path / "t.csv", "--set", "segment.model=weights/of/none", "--out")
    assert "no such folder" in refused(*common, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine/input").mkdir(parents=True)
    assert "no such folder" in refused(*common, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["input"]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ('{"schema_version": 1, "recipe": {}}', f"of schema version 1; this release reads and writes {SCHEMA_VERSION}"),
        ('{"rows": 1}', "run.json: not the record of a run"),
        ("no JSON", "run.json: not the record of a run"),
    ],
)
def test_a_folder_of_another_format_is_told_before_the_input_is_read(refused, tmp_path, record, said):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/run.json").write_text(record)
    error = refused(*TOY, "--input", tmp_path / "none.parquet", "--out", tmp_path / "out")
    assert f"{tmp_path / 'out'}" in error and said in error
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.json"]


def test_the_hub_is_refused_as_a_folder_and_told_as_an_input_in_one_line(refused, tmp_path, table, monkeypatch):
    assert "the hub is no place to write shards to" in refused(*TOY, "--input", table, "--out", "hf://datasets/a/b")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "hf://datasets/a/b" in refused(*TOY, "--input", "hf://datasets/a/b", "--out", tmp_path / "out")


def test_what_is_missing_for_training_drawing_and_scoring_is_told_before_a_heavy_import(tmp_path):
    run = tmp_path / "run"
    (run / "pipeline").mkdir(parents=True)
    (run / "recipe.json").write_text("{}")
    nowhere = str(tmp_path / "nowhere")
    commands = (
        ["cache", "--data", nowhere, "--set", "examples.crops=2"],
        ["train", "--data", nowhere, "--out", str(tmp_path / "new")],
        ["train", "--set", "base=nowhere", "--out", str(tmp_path / "new")],
        ["sample", "a mug", "--subject", f"mug={nowhere}", "--run", str(run)],
        ["evaluate", str(run), "--data", nowhere],
        ["ablate", "--data", nowhere, "--out", str(tmp_path / "new")],
        ["sweep", "--over", "optimizer.lr=[1]", "--data", nowhere, "--out", str(tmp_path / "new")],
    )
    code = f"""
import sys
from sdd.cli import main
for words in {commands!r}:
    sys.argv = ["sdd", *words]
    try:
        main()
    except SystemExit as ended:
        assert ended.code == 2
print({{"torch", "ray", "diffusers"}} & sys.modules.keys())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    assert all("nowhere: " in line for line in done.stderr.splitlines()) and done.stderr.count("\n") == len(commands)
    assert not (tmp_path / "new").exists()


def test_a_recipe_that_cannot_be_used(refused, tmp_path, table):
    common = ["--input", str(table), "--out", str(tmp_path / "out")]
    assert "did you mean ground.floor?" in refused(
        "dataset", "--recipe", str(write_recipe(tmp_path / "r.yaml", ground={"flor": 0.1})), *common
    )
    assert "select.nms_iou" in refused(*TOY, "--set", "select.nms_iou=3", *common)
    assert "no such file" in refused("dataset", "--recipe", "nowhere.yaml", *common)


def test_weights_that_are_not_there(refused, tmp_path, table):
    for setting in ("caption.model", "ground.model", "segment.model"):
        error = refused(
            *TOY,
            "--input",
            str(table),
            "--out",
            str(tmp_path / "out"),
            "--set",
            f"{setting}=weights/of/none",
        )
        assert f"{setting} weights/of/none: no such folder" in error
    tagger = ["--set", "tag.backend=spacy", "--set", "tag.model=xx_none"]
    assert "xx_none" in refused(*TOY, "--input", str(table), "--out", str(tmp_path / "out"), *tagger)


def test_no_route_to_the_cluster(refused, tmp_path, table):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    error = refused(
        "dataset",
        "--recipe",
        "toy",
        "--input",
        str(table),
        "--out",
        str(tmp_path / "out"),
        "--ray-address",
        f"127.0.0.1:{port}",
    )
    assert f"RAY_ADDRESS=127.0.0.1:{port}" in error


def test_a_port_that_is_taken(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path / "r.yaml", toyworld={"images": 40})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = refused("dataset", "--recipe", str(recipe), "--set", f"toyworld.port={port}")
    assert f"port {port} is taken" in error
    assert not (tmp_path / "out").exists(), "nothing is rendered: another run may be rendering the same web"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(refused, tmp_path, table):
    tmp_path.chmod(0o500)
    assert "permission denied" in refused(*TOY, "--input", str(table), "--out", str(tmp_path / "out"))


def test_a_folder_that_cannot_be_made(refused, tmp_path, table):
    file = tmp_path / "file"
    file.write_text("")
    for out in (file, file / "out"):
        error = refused(*TOY, "--input", str(table), "--out", str(out))
        assert f"sdd: {out}: there is a file where a folder is wanted" in error


def test_no_input_at_all(refused, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", toyworld=None)
    assert "INPUT" in refused("dataset", "--recipe", str(recipe), "--out", str(tmp_path / "out"))


def test_inspecting_what_is_no_dataset(refused, tmp_path):
    assert "no such folder" in refused("inspect", str(tmp_path / "none"))
    assert "no shards here" in refused("inspect", str(tmp_path))
    assert not (tmp_path / "none").exists()


@pytest.fixture
def dataset(tmp_path, provenance) -> str:
    from datapipe.schema import Reason, Slice, StageName
    from datapipe.shards import Store, write_shard

    dropped = kept_sample(1).replace(image=jpeg()).dropped(StageName.SELECT, Reason.TOO_FEW_ENTITIES)
    out = str(tmp_path / "set")
    write_shard(Store(out), "shard", Slice(0, (kept_sample(0), dropped)), provenance)
    write_shard(Store(out), "shard", Slice(1, (kept_sample(2), kept_sample(3))), provenance)
    return out


def test_inspect_counts_and_draws(sdd, dataset, tmp_path):
    from datapipe.inspect import draw_sample
    from datapipe.shards import Store, kept_samples

    code, printed, _ = sdd("inspect", dataset)
    assert code == 0
    for shown in ("too_few_entities", "kept", "mug", "entities per image"):
        assert shown in printed
    code, printed, _ = sdd("inspect", dataset, "--shard", "0")
    assert code == 0
    picture = tmp_path / "out.png"
    key = kept_sample(2).key
    code, printed, _ = sdd("inspect", dataset, "--shard", "1", "--sample", key, "--save", str(picture))
    assert code == 0
    with Image.open(picture) as saved:
        assert saved.format == "PNG"
        (sample,) = (s for s in kept_samples(Store(dataset)) if s.key == key)
        assert np.array_equal(np.asarray(saved), np.asarray(draw_sample(sample)))


def test_inspect_names_what_it_cannot_show(refused, dataset, tmp_path):
    save = ["--save", str(tmp_path / "out.png")]
    for more in ([], ["--candidates"], ["--random", "2"]):
        assert "--entity mugs: no such tag here; the nearest is mug" in refused(
            "inspect", dataset, "--entity", "mugs", *more
        )
    assert "no shard 7" in refused("inspect", dataset, "--shard", "7")
    assert "no sample" in refused("inspect", dataset, "--sample", kept_sample(9).key, *save)
    assert "is no key" in refused("inspect", dataset, "--sample", "mug", *save)
    assert "too_few_entities" in refused("inspect", dataset, "--sample", kept_sample(1).key, *save)


def test_verify_tells_by_its_exit_code_and_removes_only_temporary_files(sdd, dataset, tmp_path):
    code, printed, _ = sdd("verify", dataset)
    assert (code, printed) == (0, f"{dataset}: 2 shards, all well\n")
    folder = Path(dataset)
    (folder / ".shard-000002.tar.tmp-17-0123abcd").write_bytes(b"half")
    (folder / "shard-000001.tar").write_bytes(b"")
    before = {p.name for p in folder.iterdir()}
    code, printed, _ = sdd("verify", dataset)
    assert code == 1
    assert ".shard-000002.tar.tmp-17-0123abcd: is temporary" in printed
    code, printed, _ = sdd("verify", dataset, "--repair")
    assert code == 1
    assert "shard-000001.tar: " in printed
    assert before - {p.name for p in folder.iterdir()} == {".shard-000002.tar.tmp-17-0123abcd"}


def test_verifying_what_is_no_dataset(refused, tmp_path):
    assert "no such folder" in refused("verify", str(tmp_path / "none"))
    assert "no shards here" in refused("verify", str(tmp_path))


GROUP = typer.main.get_command(app)
assert isinstance(GROUP, TyperGroup)
COMMANDS = GROUP.commands


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_option_with_the_whole_of_what_is_said_about_it(sdd, name):
    code, printed, _ = sdd(name, "--help")
    assert code == 0
    printed = "".join(printed.split())
    for parameter in COMMANDS[name].params:
        assert isinstance(parameter, (TyperArgument, TyperOption))
        if isinstance(parameter, TyperOption):
            assert all(option in printed for option in parameter.opts)
        assert "".join((parameter.help or "").split()) in printed


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("exprt",), "'export'"),
        (("inspect", "--nowhere"), "--nowhere"),
        (("inspect",), "PATH"),
        (("dataset", "--caption_col", "x"), "here it is --set source.alt_text_column=…"),
        (("dataset", "--url-col=x"), "here it is --set source.url_column=…"),
        (("export", "x", "--to", "nothing", "--out", "y"), "'nothing' is not one of 'ai-toolkit', 'coco'"),
        (("sample", "a mug", "--subject", "mug=a.png", "--images", "none"), "--images"),
    ],
)
def test_words_that_a_command_does_not_know(refused, words, named):
    error = refused(*words)
    assert named in error and "--help`" in error


def test_an_input_needs_models_that_know_it(refused, table, tmp_path):
    out = tmp_path / "out"
    assert "--recipe sdd" in refused("dataset", "--input", table, "--out", out)
    assert not out.exists()


def test_no_command_shows_all_of_them(sdd):
    code, printed, _ = sdd()
    assert code == 0
    assert all(name in printed for name in COMMANDS)


def started(out: Path, stderr: int, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(TOY_RECIPE, None, out, "--set", "toyworld.images=120", *more),
        cwd=PROJECT,
        env={**os.environ, "OF_THE_TEST": str(out)},
        stderr=stderr,
        start_new_session=True,
        text=True,
    )


def processes_of(out: Path) -> list[str]:
    """The command lines of all processes that the run into `out` has started."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if f"OF_THE_TEST={out}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_text())
    return [line for line in found if line]


def waited_for(there: Callable[[], object], process: subprocess.Popen[str]) -> None:
    while not there():
        assert process.poll() is None
        time.sleep(0.1)


def test_a_signal_that_comes_where_nothing_can_be_raised_ends_the_command_too():
    code = """
import os, signal, time
import sdd.__main__ as entry

class Destroyed:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)

def run():
    Destroyed()
    time.sleep(60)

entry._run = run
entry.main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (130, "sdd: stopped\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_the_start_says_that_it_stopped_and_how_to_go_on(tmp_path, number):
    """Ctrl-C reaches every process of the terminal's foreground group, a scheduler's SIGTERM those of the job."""
    process = started(tmp_path / "out", subprocess.PIPE)
    waited_for((tmp_path / "out").exists, process)
    os.killpg(process.pid, number)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 128 + number
    assert said.endswith("sdd: stopped; the same command goes on from here\n")
    assert "Traceback" not in said


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_sigterm_ends_a_run_at_work_and_leaves_no_process_and_no_half_file(tmp_path):
    out = tmp_path / "out"
    process = started(out, subprocess.PIPE, "--set", "slice_rows=10")
    waited_for(lambda: list(out.glob("raw-*")), process)
    assert any("ray" in line for line in processes_of(out))
    process.terminate()
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 143
    assert said.endswith("sdd: stopped; the same command goes on from here\n")
    assert "Traceback" not in said and "***" not in said
    ended = time.monotonic()
    while left := processes_of(out):
        assert time.monotonic() - ended < 30, left
        time.sleep(0.1)
    assert Store(str(out)).temporaries() == []
