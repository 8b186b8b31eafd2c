"""Whether a prompt speaks of a subject. Imports nothing that takes seconds."""

import re


def mentions(prompt: str, tag: str) -> bool:
    """Whether the tag is a word of the prompt: "teapots" does not count as "teapot"."""
    words = re.escape(tag.strip())
    return bool(words) and re.search(rf"(?<!\w){words}(?!\w)", prompt, re.IGNORECASE) is not None
