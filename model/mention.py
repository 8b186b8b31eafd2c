"""Where a prompt speaks of a subject. Imports nothing that takes seconds."""

import re


def find_mention(prompt: str, tag: str) -> re.Match[str] | None:
    """Where the tag is first a word of the prompt, in any case: "teapots" does not count as "teapot"."""
    words = re.escape(tag.strip())
    return re.search(rf"(?<!\w){words}(?!\w)", prompt, re.IGNORECASE) if words else None


def mentions(prompt: str, tag: str) -> bool:
    """Whether there is a `find_mention`."""
    return find_mention(prompt, tag) is not None
