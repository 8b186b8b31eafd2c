"""`sdd evaluate --suite dreambench` and `sdd compare`: drawn once, scored alike, laid side by side or refused."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdd.cli import main
from subject_diffusion.errors import RunError
from tests.toy import PROJECT
from tests.train.benchmark.folders import CLIP
from train.benchmark.backbones import Backbone
from train.benchmark.drawing import claim, drawn_by
from train.benchmark.dreambench import dreambench as read_dreambench
from train.benchmark.options import BackboneSettings, Sampler

STEPS = ("--set", "num_inference_steps=1")


def words(pipeline: Path, data: Path, backbones: Path, *more: str | Path) -> list[str]:
    given = [pipeline, "--suite", "dreambench", "--data", data, "--per-prompt", "2", *STEPS]
    return [str(w) for w in ("evaluate", *given, "--backbone", f"dino={backbones / 'dino'}", *more)]


def hashes(out: Path) -> dict[str, str]:
    return {
        str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.rglob("images/*/*.png"))
    }


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, pipeline, dreambench, backbones) -> Path:
    """With every backbone, and subjects cut out."""
    out: Path = tmp_path_factory.mktemp("drawn")
    rest = ["--backbone", f"clip={CLIP}", "--backbone", f"dinov2={backbones / 'dinov2'}", "--labels", "toy"]
    rest += ["--backbone", f"siglip2={backbones / 'siglip2'}", "--out", str(out)]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("COLUMNS", "200")
        patch.setattr(sys, "argv", ["sdd", *words(pipeline, dreambench, backbones, *rest)])
        with pytest.raises(SystemExit) as ended:
            main()
    assert not ended.value.code
    (out / "printed.txt").write_text(printed.getvalue())
    return out


def test_a_result_holds_every_score_with_its_interval_and_all_that_it_depends_on(drawn, dreambench):
    result = json.loads((drawn / "result.json").read_text())
    for role in ("dino", "dinov2", "clip_i"):
        assert {role, f"{role}_margin", f"{role}_copy", f"{role}_apart"} <= result["overall"].keys()
    assert {"clip_t", "masc", "masc_margin", "found"} <= result["overall"].keys()
    assert set(result["subjects"]) == {"mug", "mug2", "cat"} and "a red {}" in result["prompts"]
    assert "dino_margin" not in result["subjects"]["cat"], "there is no other cat"
    assert all(m["low"] <= m["mean"] <= m["high"] for m in result["overall"].values())
    assert len(result["images"]) == 12 and len({image["seed"] for image in result["images"]}) == 12
    measured = result["measured"]
    assert measured["pairing"] == "all" and measured["labels"]["ground"] and measured["code"]
    assert {"weights", "preprocessing"} == measured["backbones"]["dino"].keys()
    assert result["drawn"]["sampler"]["num_inference_steps"] == 1 and result["drawn"]["seed"] == 0
    assert result["overall"]["dino"]["mean"] == pytest.approx(np.mean([i["scores"]["dino"] for i in result["images"]]))


def test_a_score_is_the_mean_over_all_photographs_computed_by_hand(drawn, dreambench, backbones):
    result = json.loads((drawn / "result.json").read_text())
    dino = Backbone("dino", BackboneSettings(model=str(backbones / "dino")))
    photographs = {n: dino.images([Image.open(p) for p in sorted((dreambench / n).iterdir())]) for n in ("mug", "mug2")}
    for image in (i for i in result["images"] if i["group"] == "mug"):
        (own,) = dino.images([Image.open(drawn / image["file"])])
        expected = (photographs["mug"] @ own).mean()
        assert image["scores"]["dino"] == pytest.approx(float(expected), abs=1e-5)
        ahead = expected - (photographs["mug2"] @ own).mean()
        assert image["scores"]["dino_margin"] == pytest.approx(float(ahead), abs=1e-5)
    real = [float(p[i] @ p[j]) for p in photographs.values() for i in range(3) for j in range(3) if i != j]
    assert real  # the cat's are in the ceiling too
    assert result["copied"]["dino_copy"]["mean"] == pytest.approx(1, abs=1e-3)
    assert result["ceiling"]["dino"]["mean"] > result["overall"]["dino"]["mean"]


def test_ceiling_baseline_and_published_figures_stand_beside_the_result(drawn):
    printed = (drawn / "printed.txt").read_text()
    assert "real photographs" in printed and "the reference, copied" in printed
    assert re.search(r"Subject-Diffusion +0\.711 +0\.787 +0\.293", printed)
    assert "DINO ViT-S/16" in printed and "arXiv 2208.12242" in printed


def test_killed_it_goes_on_and_shares_add_up_and_the_pictures_are_the_same_to_the_bit(
    sdd, tmp_path, pipeline, dreambench, backbones
):
    killed, shared = tmp_path / "killed", tmp_path / "shared"
    asked = words(pipeline, dreambench, backbones, "--out", killed)
    running = subprocess.Popen([sys.executable, "-m", "sdd", *asked], cwd=PROJECT, stdout=subprocess.DEVNULL)
    while running.poll() is None and not hashes(killed):
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    before = hashes(killed)
    assert before and not (killed / "result.json").exists()
    assert sdd(*asked)[0] == 0

    asked = words(pipeline, dreambench, backbones, "--out", shared)
    counts = []
    for shard in ("2/2", "1/2"):
        code, printed, _ = sdd(*asked, "--shard", shard)
        assert code == 0 and "the command without --shard scores them" in printed
        counts.append(len(hashes(shared)))
    assert counts == [4, 12] and not (shared / "result.json").exists()
    assert sdd(*asked)[0] == 0
    assert hashes(killed) == hashes(shared) and before.items() <= hashes(killed).items()
    one, other = (json.loads((folder / "result.json").read_text()) for folder in (killed, shared))
    assert one["images"] == other["images"] and one["overall"] == other["overall"]


def test_a_folder_of_other_pictures_is_refused(refused, drawn, pipeline, dreambench, backbones, tmp_path):
    out = shutil.copytree(drawn, tmp_path / "out")
    said = refused(*words(pipeline, dreambench, backbones, "--out", out, "--labels", "toy", "--seed", "1"))
    assert "seed was 0 and is now 1; name another --out" in said
    said = refused(*words(pipeline, dreambench, backbones, "--out", out, "--labels", "toy", "--subject", "mug"))
    assert "asked was" in said


def test_results_are_laid_side_by_side(sdd, drawn, pipeline, dreambench, backbones, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    other = shutil.copytree(drawn, tmp_path / "other")
    code, printed, _ = sdd("compare", drawn, other)
    assert code == 0 and f"{other} over {drawn}" in printed, "of one name, they are told apart by their paths"
    tree = json.loads((other / "result.json").read_text())
    tree["name"] = "a <b>rival</b>"
    for image in tree["images"]:
        image["scores"]["dino"] += 0.1
    (other / "result.json").write_text(json.dumps(tree))
    code, printed, error = sdd("compare", drawn, other / "result.json", "--save", tmp_path / "page.html")
    assert code == 0, error
    assert "pipeline" in printed and re.search(r"dino +0\.100 \[0\.100, 0\.100\]", printed)
    page = (tmp_path / "page.html").read_text()
    assert "a &lt;b&gt;rival&lt;/b&gt;" in page and "<b>rival" not in page
    assert page.count("data:image/jpeg") == 2 * 6, "the first picture of each prompt of each result"
    (other / tree["images"][0]["file"]).write_bytes(b"damaged")
    assert sdd("compare", drawn, other, "--save", tmp_path / "page.html")[0] == 0
    assert (tmp_path / "page.html").read_text().count("data:image/jpeg") == 2 * 6 - 1
    assert sdd("compare", drawn, other, "--save", tmp_path / "table.md")[0] == 0
    table = (tmp_path / "table.md").read_text()
    assert "| Subject-Diffusion | 0.711 | 0.787 | 0.293 |" in table and "| dino |" in table


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("backbones.dino.weights", "0123"),
        ("backbones.dino.preprocessing.resize_px", 36),
        ("pairing", "reference"),
        ("protocol.asked", "0123"),
        ("code", "0123"),
    ],
)
def test_what_was_not_measured_alike_is_refused_by_name(refused, drawn, tmp_path, key, value):
    tree = json.loads((drawn / "result.json").read_text())
    *path, last = key.split(".")
    block = tree["measured"]
    for name in path:
        block = block[name]
    block[last] = value
    (tmp_path / "other.json").write_text(json.dumps(tree))
    said = refused("compare", drawn, tmp_path / "other.json")
    assert "were not measured alike" in said and f"{key} is " in said and str(value) in said


def test_another_model_of_the_same_role_is_another_measure(
    refused, sdd, drawn, pipeline, dreambench, backbones, tmp_path
):
    out = tmp_path / "out"
    shutil.copytree(drawn / "images", out / "images")
    shutil.copy(drawn / "drawn.json", out)
    asked = [w.replace("=" + str(backbones / "dino"), "=" + str(backbones / "dino8"))
             for w in words(pipeline, dreambench, backbones, "--out", out, "--labels", "toy")]  # fmt: skip
    assert sdd(*asked)[0] == 0
    assert "backbones.clip." in refused("compare", drawn, out)


def test_pairs_are_scored_each_in_its_box(sdd, pipeline, dreambench, backbones, tmp_path):
    asked = words(pipeline, dreambench, backbones, "--out", tmp_path, "--per-prompt", "1")
    asked[asked.index("dreambench")] = "dreambench-pairs"
    code, _, error = sdd(*asked)
    assert code == 0, error
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["subjects"]) == {"mug+cat", "mug+mug2"} and len(result["images"]) == 3
    dino = Backbone("dino", BackboneSettings(model=str(backbones / "dino")))
    image = result["images"][0]
    drawn = Image.open(tmp_path / image["file"])
    for subject in image["subjects"]:
        x1, y1, x2, y2 = (round(v * side) for v, side in zip(subject["box"], drawn.size * 2, strict=True))
        (own,) = dino.images([drawn.crop((x1, y1, x2, y2))])
        photographs = dino.images([Image.open(p) for p in sorted((dreambench / subject["name"]).iterdir())])
        assert subject["scores"]["dino"] == pytest.approx(float((photographs @ own).mean()), abs=1e-5)
    assert [s["name"] for s in image["subjects"]] == ["mug", "cat"]
    assert image["scores"]["dino"] == pytest.approx(np.mean([s["scores"]["dino"] for s in image["subjects"]]))


def test_pictures_of_others_are_scored_by_the_same_code(sdd, drawn, dreambench, backbones, tmp_path):
    result = json.loads((drawn / "result.json").read_text())
    (tmp_path / "theirs").mkdir()
    lines = []
    for number, image in enumerate(result["images"]):
        shutil.copy(drawn / image["file"], tmp_path / f"theirs/{number}.png")
        lines.append({"file": f"{number}.png", "subjects": [image["group"]], "prompt": image["prompt"]})
    lines.reverse()
    (tmp_path / "theirs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ["--images", tmp_path / "theirs", "--manifest", tmp_path / "theirs.jsonl", "--out", tmp_path / "out"]
    given += ["--suite", "dreambench", "--data", dreambench, "--labels", "toy", "--backbone", f"clip={CLIP}"]
    given += [w for role in ("dino", "dinov2", "siglip2") for w in ("--backbone", f"{role}={backbones / role}")]
    code, _, error = sdd("evaluate", *given)
    assert code == 0, error
    theirs = json.loads((tmp_path / "out/result.json").read_text())
    assert theirs["measured"] == result["measured"]
    assert theirs["overall"]["masc"] == pytest.approx(result["overall"]["masc"])
    assert (tmp_path / "out" / theirs["images"][0]["file"]).resolve().is_file()
    code, _, error = sdd("compare", drawn, tmp_path / "out", "--save", tmp_path / "page.html")
    assert code == 0, error
    assert (tmp_path / "page.html").read_text().count("data:image/jpeg") == 2 * 6


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1: invalid JSON"),
        ("\n\n{", "line 3: invalid JSON"),
        ('{"file": "a.png", "prompt": "a red mug"}', "line 1: subjects: field required"),
        ('{"file": "a.png", "subjects": ["mug"], "prompt": "a green mug"}', "has no mug with the prompt 'a green mug'"),
        ('{"file": "b.png", "subjects": ["mug"], "prompt": "a red mug"}', "b.png is not there"),
        ('{"file": "../b.png", "subjects": ["mug"], "prompt": "a red mug"}', "line 1: ../b.png lies outside of"),
        ('{"file": "/etc/hosts", "subjects": ["mug"], "prompt": "a red mug"}', "line 1: /etc/hosts lies outside of"),
        ('{"file": "a.png", "subjects": ["mug"], "prompt": "a red mug", "boxes": [[0, 0, 0, 1]]}', "line 1: a box"),
        ("", "names no pictures"),
    ],
)
def test_a_line_of_a_manifest_that_cannot_be_is_told(refused, dreambench, backbones, tmp_path, line, said):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "lines").write_text(line)
    given = ["--images", tmp_path, "--manifest", tmp_path / "lines", "--suite", "dreambench", "--data", dreambench]
    assert said in refused("evaluate", *given, "--backbone", f"dino={backbones / 'dino'}")
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--images", "x"], "--images and --manifest go together"),
        (["--images", "x", "--manifest", "y"], "--images are drawn already"),
        (["--shard", "3/2"], "--shard 3/2: write which of how many"),
        (["--subject", "dog"], "--subject dog: no subject of that name; there are mug, mug2, cat"),
        (["--backbone", "dino=x"], "there is a dino already"),
        (["--set", "steps=3"], "unknown key steps"),
        (["--cases", "3"], "--cases is not an option of --suite dreambench"),
        (["--data", "nowhere"], "nowhere: no prompts_and_classes.txt"),
        (["--labels", "nowhere"], "nowhere: no such file"),
        (["--set", "height=67"], "--set height=67: it must be a multiple of"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(refused, pipeline, dreambench, backbones, tmp_path, more, said):
    assert said in refused(*words(pipeline, dreambench, backbones, "--out", tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_a_folder_is_claimed_anew_while_nothing_is_drawn_there(tmp_path):
    claim(tmp_path, {"seed": 0})
    claim(tmp_path, {"seed": 1})
    (tmp_path / "images/mug").mkdir(parents=True)
    (tmp_path / "images/mug/00-0.png").write_bytes(b"")
    with pytest.raises(RunError, match="seed was 1 and is now 2"):
        claim(tmp_path, {"seed": 2})


def test_the_first_of_several_shares_claims_the_folder_for_all(tmp_path):
    for _ in range(2):
        claim(tmp_path / "out", {"seed": 0}, shared=True)
    with pytest.raises(
        RunError, match=r"seed was 0 and is now 1; name another --out, or, if nothing draws there, remove .*drawn\.json"
    ):
        claim(tmp_path / "out", {"seed": 1}, shared=True)
    assert json.loads((tmp_path / "out/drawn.json").read_text()) == {"seed": 0}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["drawn.json"]


def test_a_model_with_another_vocabulary_is_another_model(pipeline, dreambench, tmp_path):
    model = Path(shutil.copytree(pipeline, tmp_path / "model"))
    asked = read_dreambench(dreambench, 1)
    before = drawn_by(model, asked, Sampler(), 0, None)
    assert drawn_by(pipeline, asked, Sampler(), 0, None) == before
    (model / "tokenizer/merges.txt").write_text("a b\n")
    assert drawn_by(model, asked, Sampler(), 0, None)["model"] != before["model"]


def test_what_is_no_result_or_no_place_for_one_is_told(refused, drawn, tmp_path):
    (tmp_path / "result.json").write_text("{}")
    assert "not a result of `sdd evaluate`" in refused("compare", drawn, tmp_path)
    (tmp_path / "result.json").write_text("[]")
    assert "not a result of `sdd evaluate`" in refused("compare", tmp_path)
    whole = json.loads((drawn / "result.json").read_text())
    every: tuple[dict[str, Any], ...] = (
        {"images": [{"file": "a.png"}]},
        {"measured": {"protocol": {}}},
        {"overall": []},
        {"overall": {"dino": {"mean": "high", "low": 0, "high": 1}}},
        {"subjects": {"mug": []}},
    )
    for damaged in every:
        (tmp_path / "result.json").write_text(json.dumps(whole | damaged))
        assert "not a result of `sdd evaluate`" in refused("compare", tmp_path), damaged
    (tmp_path / "result.json").write_text(json.dumps(whole | {"images": whole["images"][1:]}))
    assert "were not measured alike" in refused("compare", drawn, tmp_path)
    assert "no result.json there" in refused("compare", drawn, tmp_path / "none")
    assert "a table is .md, a page is .html" in refused("compare", drawn, "--save", tmp_path / "a.pdf")
    assert "--save" not in refused("compare", drawn, "--save", tmp_path / "no/a.md")
