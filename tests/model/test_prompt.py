"""The fused prompt: its words, what is cut when it is too long, and where images stand in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTextModel, CLIPTokenizer

from model import ModelError, PromptTokenizer
from model.prompt import encode_prompt
from tests.model.bases import assert_same


@pytest.fixture(scope="session")
def tokenizer(sd1: Path) -> Any:
    return CLIPTokenizer.from_pretrained(sd1 / "tokenizer")


def test_the_prompt_reads_as_the_paper_has_it(tokenizer: Any) -> None:
    prompts = PromptTokenizer(tokenizer, 77, 3)(["a mug on a dog"], [["red mug", "dog"]])
    words = [tokenizer.decode([i]).strip() for i in prompts.ids[0].tolist()]
    first, second, none = prompts.placeholders[0].tolist()
    words[first], words[second] = "[PH0]", "[PH1]"
    text = " ".join(w for w in words if "<|" not in w)
    assert text == "a mug on a dog , the red mug is [PH0] , the dog is [PH1]"
    assert none == -1
    weights = prompts.tag_weights[0]
    assert [words[i] for i in weights[0].nonzero().flatten()] == ["red", "mug"]
    assert [words[i] for i in weights[1].nonzero().flatten()] == ["dog"]
    assert weights.sum(-1).tolist() == [1, 1, 0]


@given(st.text("abc mug", max_size=400), st.lists(st.text("abcmug ", max_size=200), max_size=4))
def test_every_placeholder_survives_whatever_the_length(tokenizer: Any, caption: str, tags: list[str]) -> None:
    prompts = PromptTokenizer(tokenizer, 77, 4)([caption], [tags])
    ids, placeholders = prompts.ids[0], prompts.placeholders[0]
    assert ids.shape == (77,) and ids[0] == tokenizer.bos_token_id
    places = placeholders[: len(tags)].tolist()
    assert places == sorted(set(places)) and all(0 < p < 76 for p in places)
    assert (placeholders[len(tags) :] == -1).all()
    ends = (ids == tokenizer.eos_token_id).nonzero().flatten().tolist()
    assert [e for e in ends if e not in places]


def test_a_long_caption_is_cut_and_a_long_tag_keeps_its_last_word(tokenizer: Any) -> None:
    prompts = PromptTokenizer(tokenizer, 20, 1)(["a mug " * 40], [["big " * 40 + "robot"]])
    (last,) = tokenizer("robot", add_special_tokens=False).input_ids
    assert prompts.ids[0, prompts.placeholders[0, 0] - 2] == last
    assert prompts.ids[0, -1] == tokenizer.eos_token_id


def test_a_prompt_without_subjects_is_the_bases_own(tokenizer: Any) -> None:
    texts = ["a mug, of the dog.", "", "robot " * 100]
    expected = tokenizer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    assert torch.equal(PromptTokenizer(tokenizer, 77, 2)(texts, [[], [], []]).ids, expected)


def test_more_subjects_than_the_model_takes_are_refused(tokenizer: Any) -> None:
    with pytest.raises(ModelError, match="max_subjects=1"):
        PromptTokenizer(tokenizer, 77, 1)(["a mug and a dog"], [["mug", "dog"]])


def test_an_image_stands_in_for_a_words_embedding_before_positions_are_added(sd2: Path) -> None:
    encoder = CLIPTextModel.from_pretrained(sd2 / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(sd2 / "tokenizer")
    prompts = PromptTokenizer(tokenizer, 77, 2)(["a mug"], [["mug"]])
    (dog,) = tokenizer("dog", add_special_tokens=False).input_ids
    words = encoder.embeddings.token_embedding(torch.tensor([[dog, 0]]))
    ids = prompts.ids.clone()
    ids[0, prompts.placeholders[0, 0]] = dog
    with torch.no_grad():
        found = encode_prompt(encoder, prompts.ids, prompts.placeholders, words)
        assert_same(found, encoder(ids).last_hidden_state)
