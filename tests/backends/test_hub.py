"""Each way in which the model hub can refuse is a line of its own that says what to do, and what was loaded is known by
its commit. A local server plays the hub."""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from datapipe.backends.hub import PUBLISHED, licence_of
from datapipe.backends.loading import ModelSettings, check_model, load_tokenizer, model_identity, pinned
from datapipe.backends.sam import TransformersSam
from datapipe.growing import with_input
from datapipe.plan import Plan, check_folder, claim_folder, make_plan, read_run
from datapipe.recipe import Recipe, check_stages, load_recipe
from datapipe.shards import Store
from datapipe.sources import SourceSettings, open_source
from datapipe.stages.segment import SegmentSettings
from subject_diffusion.errors import BackendError, RunError
from tests.backends.hub_server import Hub, Repository
from tests.conftest import jpeg
from tests.toy import PROJECT, TOY_RECIPE

FIRST, SECOND = "1" * 40, "2" * 40
SAM = PROJECT / "toyworld/weights/sam"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    other = shutil.copytree(SAM, tmp_path / "other")
    (other / "config.json").write_text((SAM / "config.json").read_text() + " ")
    pickled = shutil.copytree(SAM, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    repositories = {
        "toy/sam": Repository({"main": FIRST, "v2": SECOND}, {FIRST: SAM, SECOND: other}),
        "toy/gated": Repository({"main": FIRST}, {FIRST: SAM}, gated=True),
        "toy/pickled": Repository({"main": FIRST}, {FIRST: pickled}),
        "toy/empty": Repository({"main": FIRST}, {FIRST: tmp_path / "nothing"}),
    }
    with Hub(repositories).served() as serving:
        set_endpoint(monkeypatch, serving.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("transformers.utils.hub.HF_HUB_CACHE", str(tmp_path / "cache"), raising=False)
        yield serving


def set_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """What HF_ENDPOINT does before huggingface_hub is imported."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def line(settings: ModelSettings) -> str:
    with pytest.raises(BackendError) as refused:
        check_model(pinned(settings))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_model_of_the_hub_is_checked_without_its_weights_and_then_loaded(hub):
    settings = pinned(SegmentSettings(model="toy/sam"))
    settings.check()
    assert not [path for path in hub.asked if path.endswith(".safetensors")]
    assert TransformersSam(settings).side == 128


def test_a_gated_model_says_where_to_accept_its_license_and_how_to_log_in(hub):
    said = line(ModelSettings(model="toy/gated"))
    assert f"toy/gated: gated: accept its license at {hub.url}/toy/gated, then `hf auth login`" in said


def test_a_mistyped_name_says_that_there_is_no_such_model(hub):
    assert f"toy/samm: the hub has no model of this name at {hub.url}; check the spelling" in line(
        ModelSettings(model="toy/samm")
    )


def test_a_wrong_revision_is_named_with_the_place_that_lists_them(hub):
    said = line(SegmentSettings(model="toy/sam", revision="v9"))
    assert f"has no revision v9; set segment.revision to one listed at {hub.url}/toy/sam/commits" in said
    said = line(SegmentSettings(model="toy/sam", revision="3" * 40))
    assert f"has no revision {'3' * 40}" in said


def test_without_a_connection_it_says_how_to_bring_the_model(hub, monkeypatch):
    set_endpoint(monkeypatch, "http://127.0.0.1:9")
    said = line(SegmentSettings(model="toy/sam"))
    assert "not in the cache, and the hub at http://127.0.0.1:9 cannot be reached" in said
    assert (
        "where there is a connection, `hf download toy/sam --exclude '*.bin' --exclude '*.h5' --local-dir FOLDER`"
        in said
    )
    assert said.endswith("then here --set segment.model=FOLDER")


@pytest.mark.parametrize("unpinned", [(), ("caption.revision=null", "ground.revision=null")])
def test_all_models_that_are_missing_are_named_at_once(hub, monkeypatch, unpinned):
    set_endpoint(monkeypatch, "http://127.0.0.1:9")
    recipe = load_recipe("sdd", unpinned)
    with pytest.raises(BackendError) as refused:
        check_stages(recipe.pinned())
    caption, ground, segment = str(refused.value).splitlines()
    assert caption.startswith("caption.model Salesforce/blip2-opt-2.7b: not in the cache (about 15 GB), and the hub")
    assert ground.startswith("ground.model IDEA-Research/grounding-dino-tiny: not in the cache (about 0.7 GB)")
    assert segment.startswith("segment.model facebook/sam-vit-huge: not in the cache (about 2.6 GB)")
    assert f"`hf download facebook/sam-vit-huge --revision {recipe.segment.revision} " in segment


def test_a_hub_that_does_not_answer_is_not_waited_for_long(hub, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        set_endpoint(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr("datapipe.backends.hub.ANSWER_S", 0.2)
        assert "cannot be reached" in line(SegmentSettings(model="toy/sam", revision=FIRST))


def test_the_size_of_every_model_of_the_recipes_is_known_and_in_their_table():
    table = (PROJECT / "manifests/recipes/README.md").read_text()
    for name in ("sdd", "modern", "sam3"):
        for settings in models_of(load_recipe(name)):
            told = PUBLISHED[settings.model]
            (row,) = (line for line in table.splitlines() if line.startswith(f"| `{settings.model}` |"))
            assert row.startswith(f"| `{settings.model}` | {told.gb:g} GB | {told} | ")
            assert f"`{name}`" in row
            assert licence_of(f"{settings.model}@{settings.revision}") == str(told)
    assert licence_of("toyworld/weights/blip@0123") == licence_of("alt_text") == ""
    assert licence_of("facebook/sam3, served") == "SAM License, gated"


def test_offline_by_choice_is_not_called_a_lost_connection(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids" in line(ModelSettings(model="toy/sam"))


def test_a_hub_that_is_down_is_not_called_a_lost_connection(hub):
    hub.broken = 503
    assert f"the hub at {hub.url} answers 503; try again later" in line(ModelSettings(model="toy/sam"))


def test_a_repository_without_the_files_is_refused(hub):
    assert "lacks a file that it needs" in line(ModelSettings(model="toy/empty"))
    assert "has its weights as pytorch_model.bin only" in line(ModelSettings(model="toy/pickled"))


def test_what_is_no_name_of_a_hub_model_is_refused(hub):
    assert "no name of a hub's model" in line(ModelSettings(model="toy/s am"))
    assert "no such folder" in line(ModelSettings(model="sam-vit-huge"))
    assert not hub.asked


def test_a_refusal_while_loading_is_the_same_line(hub):
    with pytest.raises(BackendError, match="the hub has no model of this name"):
        load_tokenizer(ModelSettings(model="toy/samm"))


def test_the_commit_that_a_branch_stands_for_is_what_a_run_records(hub):
    settings = pinned(ModelSettings(model="toy/sam"))
    assert settings.revision == FIRST
    assert model_identity(settings) == f"toy/sam@{FIRST}"
    hub.repositories["toy/sam"].revisions["main"] = SECOND
    assert model_identity(pinned(ModelSettings(model="toy/sam"))) == f"toy/sam@{SECOND}"
    assert model_identity(pinned(ModelSettings(model="toy/sam", revision="v2"))) == f"toy/sam@{SECOND}"


def test_a_commit_needs_no_hub_and_a_branch_is_remembered_without_a_connection(hub, monkeypatch):
    assert pinned(ModelSettings(model="toy/sam")).revision == FIRST
    hub.asked.clear()
    assert pinned(ModelSettings(model="any/model", revision=SECOND)).revision == SECOND
    assert not hub.asked
    set_endpoint(monkeypatch, "http://127.0.0.1:9")
    assert pinned(ModelSettings(model="toy/sam")).revision == FIRST


def test_a_recipe_is_pinned_as_a_whole_and_local_models_stay_as_they_are(hub):
    recipe = load_recipe(TOY_RECIPE.with_name("toy.yaml"), ["segment.model=toy/sam", "toyworld=null"])
    assert isinstance(recipe, Recipe)
    pinned_recipe = recipe.pinned()
    assert pinned_recipe.identity() == {**recipe.identity(), "segment.revision": FIRST}


def test_a_run_records_the_commit_for_every_model_and_a_branch_that_moved_is_another_recipe(hub, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/0.jpg").write_bytes(jpeg())
    store = Store(str(tmp_path / "out"))
    source = open_source(SourceSettings(path=str(tmp_path / "images")), scratch=store.root)
    recipe = load_recipe(TOY_RECIPE, ["segment.model=toy/sam", "toyworld=null"])

    def plan_of(recipe: Recipe) -> Plan:
        return make_plan(recipe.pinned(), *with_input(source, store, recipe.slice_rows, append=False), store)

    claim_folder(plan_of(recipe), store)
    assert read_run(store).models["segment"] == f"toy/sam@{FIRST}"
    hub.repositories["toy/sam"].revisions["main"] = SECOND
    with pytest.raises(RunError, match=f"segment.revision was '{FIRST}' and is now '{SECOND}'"):
        check_folder(plan_of(recipe), store)
    kept = load_recipe(TOY_RECIPE, ["segment.model=toy/sam", "toyworld=null", f"segment.revision='{FIRST}'"])
    check_folder(plan_of(kept), store)


@pytest.mark.parametrize("name", ["sdd", "modern", "sam3"])
def test_a_recipe_pins_every_model_of_the_hub_or_says_how(name):
    recipe = load_recipe(name)
    unpinned = [settings.model for settings in models_of(recipe) if settings.revision is None]
    assert all(len(settings.revision) == 40 for settings in models_of(recipe) if settings.revision is not None)
    text = (PROJECT / f"manifests/recipes/{name}.yaml").read_text()
    assert all(f"https://huggingface.co/{model}/commits/main" in text for model in unpinned)
    assert unpinned or recipe.pinned() == recipe
    for settings in models_of(recipe) if name != "sdd" else ():
        assert re.search(rf"{settings.model} +# .*{PUBLISHED[settings.model].licence}.*gated", text)


def models_of(recipe: Recipe) -> list[ModelSettings]:
    """Those that it loads."""
    blocks: list[Any] = list(recipe.stages().values())
    return [block for block in blocks if isinstance(block, ModelSettings) and block.computes_here]
