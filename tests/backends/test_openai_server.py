"""Captions from a server that speaks OpenAI's chat completions, and from one that does so badly."""

from __future__ import annotations

import base64
import io
import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datapipe.backends.chat import CHAT_PROMPT, OBJECTS_SCHEMA, caption_and_objects
from datapipe.backends.openai_server import KEY, OpenAIServer, check_server
from datapipe.backends.protocol import Unanswered
from datapipe.probe import probe_sample
from datapipe.recipe import Recipe, recipe_of_run
from datapipe.schema import Outcome, Reason
from datapipe.stages.caption import CaptionSettings
from subject_diffusion.errors import BackendError
from tests.backends.chat_server import ChatServer, completion, drip, flood, hang_up, send

IMAGE = np.full((60, 80, 3), (200, 30, 30), np.uint8)
OTHER = np.full((60, 80, 3), (30, 30, 200), np.uint8)


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer(lambda handler, _: send(handler, 200, completion("a red\n square"))).served() as server:
        yield server


def captioner(server: ChatServer, **options: Any) -> OpenAIServer:
    settings = {"min_pixels": 1, "max_pixels": 1_000_000, "deadline_s": 20.0, "retries": 2} | options
    return OpenAIServer(server.url, "tiny-vl", settings.pop("prompt", CHAT_PROMPT), 30, **settings)


def shown(question: dict[str, Any]) -> Image.Image:
    url = question["messages"][0]["content"][0]["image_url"]["url"]
    return Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))))


def is_red(question: dict[str, Any]) -> bool:
    red, _, blue = np.asarray(shown(question))[5, 5]
    return bool(red > blue)


def test_a_server_is_shown_the_image_and_asked_for_a_caption(server):
    assert captioner(server, max_pixels=1200)([IMAGE]) == ["a red square"]
    (question,) = server.asked
    assert question["model"] == "tiny-vl"
    assert question["max_tokens"] == 30
    assert question["temperature"] == 0
    assert question["messages"][0]["content"][1] == {"type": "text", "text": CHAT_PROMPT}
    assert shown(question).size == (40, 30)
    assert captioner(server, prompt="What is it?")([IMAGE, OTHER]) == ["a red square"] * 2
    assert server.asked[-1]["messages"][0]["content"][1]["text"] == "What is it?"


def test_captions_come_in_the_order_of_the_images(server):
    def answer(handler, question):
        send(handler, 200, completion("red" if is_red(question) else "blue"))

    server.answer = answer
    images = [IMAGE, OTHER] * 10
    assert captioner(server)(images) == ["red", "blue"] * 10


def test_what_a_model_thinks_first_is_no_caption(server):
    server.answer = lambda handler, _: send(handler, 200, completion("<think>it is red</think>\n\na square"))
    assert captioner(server)([IMAGE]) == ["a square"]


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_fault_that_passes_costs_nothing(server, status):
    def answer(handler, _):
        if len(server.asked) < 3:
            send(handler, status, {"error": "later"}, {"Retry-After-Ms": "10"})
        else:
            send(handler, 200, completion("a square"))

    server.answer = answer
    assert captioner(server)([IMAGE]) == ["a square"]
    assert len(server.asked) == 3


@pytest.mark.parametrize(("status", "may_pass", "attempts"), [(400, False, 1), (413, False, 1), (503, True, 3)])
def test_a_fault_that_stays_costs_its_image_alone(server, status, may_pass, attempts):
    def answer(handler, question):
        if is_red(question):
            send(handler, 200, completion("red"))
        else:
            send(handler, status, {"error": "no"}, {"Retry-After-Ms": "10"})

    server.answer = answer
    first, bad, last = captioner(server)([IMAGE, OTHER, IMAGE])
    assert (first, last) == ("red", "red")
    assert isinstance(bad, Unanswered)
    assert bad.detail.startswith(f"status {status}")
    assert bad.may_pass is may_pass
    assert len(server.asked) == 2 + attempts


@pytest.mark.parametrize("misbehaves", [drip, hang_up], ids=["drips", "hangs up"])
def test_an_answer_that_never_ends_well_is_given_up(server, misbehaves):
    server.answer = misbehaves
    (found,) = captioner(server, deadline_s=1.0, retries=0)([IMAGE])
    assert isinstance(found, Unanswered)
    assert found.may_pass


def test_an_answer_without_bound_is_cut_off(server):
    server.answer = flood
    (found,) = captioner(server)([IMAGE])
    assert isinstance(found, Unanswered)
    assert "more than 1048576 bytes" in found.detail


@pytest.mark.parametrize("body", [[], {}, {"choices": []}, {"choices": [{"message": None}]}, completion(["a"]), "text"])
def test_an_answer_of_another_form_is_named(server, body):
    server.answer = lambda handler, _: send(handler, 200, body)
    (found,) = captioner(server)([IMAGE])
    assert isinstance(found, Unanswered)
    assert found.detail.startswith("no chat completion: ")
    assert not found.may_pass


def test_the_key_is_sent_and_never_recorded(server, monkeypatch):
    monkeypatch.setenv(KEY, "sk-secret-1234")
    sent = []

    def answer(handler, _):
        sent.append(handler.headers["Authorization"])
        send(handler, 400, {"error": {"message": f"bad request from {handler.headers['Authorization']}"}})

    server.answer = answer
    (found,) = captioner(server)([IMAGE])
    assert sent == ["Bearer sk-secret-1234"]
    assert isinstance(found, Unanswered)
    assert "(key)" in found.detail
    assert "secret" not in found.detail


def test_the_stage_records_who_wrote_the_caption_and_which_images_have_none(server):
    settings = CaptionSettings(backend="openai", model="tiny-vl", server=server.url, server_retries=0)
    settings.check()
    stage = settings.build()
    (sample,) = stage([probe_sample()])
    assert (sample.caption, sample.caption_model) == ("a red square", "tiny-vl, served")
    server.answer = lambda handler, _: send(handler, 200, completion(None))
    (sample,) = stage([probe_sample()])
    assert sample.verdict
    assert (sample.verdict.outcome, sample.verdict.reason) == (Outcome.DROPPED, Reason.NO_CAPTION)
    server.answer = lambda handler, _: send(handler, 500, {})
    (sample,) = stage([probe_sample()])
    assert sample.verdict
    assert (sample.verdict.outcome, sample.verdict.reason) == (Outcome.FAILED, Reason.NO_ANSWER)
    assert sample.verdict.retryable


LISTED = '{"caption": "A red mug and\\n another mug", "objects": ["red mug", "Mug", "spoon", ""]}'


def test_a_server_is_made_to_list_the_objects_and_their_spans_are_found(server):
    server.answer = lambda handler, _: send(handler, 200, completion(LISTED))
    blocks = {"caption": {"backend": "openai", "model": "tiny-vl", "server": server.url, "objects": True}}
    recipe = Recipe.model_validate(blocks | {"tag": {"backend": "caption", "min_tags": 2}})
    (sample,) = recipe.caption.build()([probe_sample()])
    (sample,) = recipe.tag.build()([sample])
    assert sample.caption == "A red mug and another mug"
    assert [(t.text, sample.caption[slice(*t.span)]) for t in sample.tags] == [("red mug", "red mug"), ("mug", "mug")]
    assert sample.verdict is None
    assert server.asked[0]["response_format"]["json_schema"]["schema"] == OBJECTS_SCHEMA
    assert server.asked[0]["messages"][0]["content"][1]["text"].startswith(CHAT_PROMPT)
    server.answer = lambda handler, _: send(handler, 200, completion("a red mug"))
    (sample,) = recipe.caption.build()([probe_sample()])
    assert sample.verdict and sample.verdict.reason is Reason.NO_ANSWER and not sample.verdict.retryable
    assert "not the JSON that it was asked for" in sample.verdict.detail
    for alone in (blocks, {"tag": {"backend": "caption"}}):
        with pytest.raises(ValueError, match=r"caption\.objects and tag\.backend=caption go together"):
            Recipe.model_validate(alone)


@pytest.mark.parametrize(
    "answer",
    ["", "{}", "[]", "}{", '{"caption": 1, "objects": []}', '{"caption": "a", "objects": "a"}', '{"caption": "a"}',
     '{"caption": "a", "objects": [1]}', '{"a":' * 3000 + "1" + "}" * 3000, "{" + "a" * 30_000 + "}"],
    ids=range(10),
)  # fmt: skip
def test_an_answer_that_lists_no_objects_is_refused(answer):
    with pytest.raises(ValueError):  # noqa: PT011  # json's own words among them
        caption_and_objects(answer)


@given(st.text(max_size=40), st.lists(st.text(max_size=6), max_size=5))
def test_objects_lie_apart_in_the_caption_whatever_is_listed(caption, objects):
    fenced = f"```json\n{json.dumps({'caption': caption, 'objects': objects})}\n```"
    found, tags = caption_and_objects(fenced)
    assert all(found[slice(*tag.span)].lower() == tag.text != "" for tag in tags)
    assert all(one.span[1] <= other.span[0] for one, other in itertools.pairwise(tags))


def test_thinking_that_is_cut_off_is_no_caption(server):
    server.answer = lambda handler, _: send(handler, 200, completion("<think> Okay, the user wants one"))
    (found,) = captioner(server)([IMAGE])
    assert isinstance(found, Unanswered)
    assert "raise max_new_tokens" in found.detail


def test_a_key_of_a_mounted_file_ends_where_its_line_does(server, monkeypatch):
    monkeypatch.setenv(KEY, "sk-secret-1234\n")
    assert captioner(server)([IMAGE]) == ["a red square"]
    monkeypatch.setenv(KEY, "sk-schlüssel")
    with pytest.raises(BackendError, match=r"^OPENAI_API_KEY in the environment holds characters that no key has"):
        check_server(server.url, "tiny-vl", "caption")


def test_where_no_key_is_wanted_answers_are_recorded_as_they_are(server, monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    server.answer = lambda handler, _: send(handler, 400, {"error": {"message": "none of the images"}})
    (found,) = captioner(server)([IMAGE])
    assert isinstance(found, Unanswered)
    assert "none of the images" in found.detail


def test_where_the_server_is_does_not_make_another_run(server):
    one, other = (CaptionSettings(backend="openai", server=url) for url in (server.url, "https://elsewhere/v1"))
    assert one.identity() == other.identity()


@pytest.mark.parametrize(
    ("models", "said"),
    [
        (["other", "third"], "caption.model tiny-vl: {url} does not serve it, but other, third"),
        (401, "caption.server {url}: refuses the key; set OPENAI_API_KEY in the environment of each node"),
        (500, "caption.server {url}: answers with status 500"),
        ("text", "caption.server {url}: its list of models is none; is this the address that ends in /v1?"),
        ([1], "caption.server {url}: its list of models is none; is this the address that ends in /v1?"),
    ],
)
def test_a_server_that_cannot_caption_is_refused_before_the_run(server, models, said):
    server.models = models
    with pytest.raises(BackendError) as refused:
        check_server(server.url, "tiny-vl", "caption")
    assert str(refused.value) == said.format(url=server.url)


@pytest.mark.parametrize("models", [["tiny-vl"], ["tiny-vl:latest"], [], 404])
def test_a_server_that_may_serve_the_model_is_taken(server, models):
    server.models = models
    check_server(server.url, "tiny-vl", "caption")


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(BackendError, match=r"caption\.server http://127\.0\.0\.1:9/v1: cannot be reached"):
        check_server("http://127.0.0.1:9/v1", "tiny-vl", "caption")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"backend": "openai", "server": "localhost:8000"}, "no address such as http://localhost:8000/v1"),
        ({"backend": "openai", "server": "http://localhost:abc/v1"}, "abc"),
        ({"backend": "openai", "server": "https://user:word@host/v1"}, "keep passwords out of the address"),
        ({"server": "http://localhost:8000/v1"}, "server is for backend=openai, and backend is transformers"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        CaptionSettings(**settings)


def test_a_server_is_needed_before_the_run_and_not_to_read_what_one_made():
    recipe = Recipe.model_validate({"caption": {"backend": "openai", "server": "http://localhost:8000/v1"}})
    again = recipe_of_run(recipe.identity())
    assert again.hash() == recipe.hash()
    with pytest.raises(BackendError, match=r"backend=openai needs an address"):
        again.caption.check()


def test_a_server_has_less_time_than_its_worker():
    caption = {"backend": "openai", "server": "http://localhost:8000/v1", "server_deadline_s": 900}
    with pytest.raises(ValueError, match=r"must be less than run\.deadline_s 600"):
        Recipe.model_validate({"caption": caption})
