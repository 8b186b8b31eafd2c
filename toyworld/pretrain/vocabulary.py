"""The WordPiece vocabulary of the toy models: every word of the toy world is one token, and no text fails."""

from __future__ import annotations

import string

from transformers import BertTokenizerFast

from toyworld.render import VOCABULARY

# Ids that BERT's own vocabulary has. transformers' Grounding DINO finds phrases by 101, 102, 1012 and 1029.
_FIXED = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}
_BLIP = ["[DEC]", "[ENC]"]
_SIZE = 1100


def build_tokenizer(longest: int = 256) -> BertTokenizerFast:
    """A lower-casing BERT tokenizer of 1100 entries; an odd word falls apart into letters, an odd letter is [UNK]."""
    letters = string.ascii_lowercase + string.digits
    marks = [mark for mark in string.punctuation if mark not in _FIXED]
    words = [*_BLIP, *VOCABULARY, *letters, *(f"##{letter}" for letter in letters), *marks]
    table = dict(_FIXED)
    taken = set(_FIXED.values())
    free = (index for index in range(104, _SIZE) if index not in taken)
    for word in dict.fromkeys(words):
        if word not in table:
            table[word] = next(free)
    unused = (index for index in range(_SIZE) if index not in set(table.values()))
    table |= {f"[unused{index}]": index for index in unused}
    ordered = dict(sorted(table.items(), key=lambda entry: entry[1]))
    return BertTokenizerFast(vocab=ordered, model_max_length=longest, additional_special_tokens=_BLIP)
