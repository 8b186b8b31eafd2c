"""A captioner behind an HTTP server that speaks OpenAI's chat completions, as vLLM, SGLang, TGI and Ollama do."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import threading
from collections.abc import Sequence

import httpx2
from openai import APIConnectionError, APIStatusError, AsyncOpenAI, AuthenticationError, OpenAI, PermissionDeniedError
from PIL import Image

from datapipe.backends.chat import CHAT_PROMPT, bounded
from datapipe.backends.protocol import Pixels, Unanswered
from subject_diffusion.errors import BackendError, one_line

KEY = "OPENAI_API_KEY"
"""The environment's variable with the key. It is read on each node, and never recorded or sent to another."""

CHECK_S = 10.0
"""Seconds that a server has for the list of its models."""

MAX_ANSWER_BYTES = 1 << 20
"""A caption has a few hundred bytes; a server that goes on for longer has gone wrong."""

JPEG_QUALITY = 95


class OpenAIServer:
    """Captions images, all of a call at once. Calls may overlap.

    What may pass (no connection, and the statuses 408, 409, 429 and from 500) is tried again up to `retries` times,
    after as long as the server says; `deadline_s` bounds the seconds of all attempts for an image together. Images are
    brought to between `min_pixels` and `max_pixels` pixels.
    """

    def __init__(
        self,
        url: str,
        model: str,
        prompt: str,
        max_new_tokens: int,
        *,
        min_pixels: int,
        max_pixels: int,
        deadline_s: float,
        retries: int,
    ) -> None:
        self._key = _key()
        self._client = AsyncOpenAI(base_url=url, api_key=self._key, max_retries=retries, timeout=deadline_s)
        self._model, self._prompt, self._max_new_tokens = model, prompt or CHAT_PROMPT, max_new_tokens
        self._pixels, self._deadline_s = (min_pixels, max_pixels), deadline_s
        # One loop for all calls, because the connections that are kept open belong to it.
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="caption server", daemon=True).start()

    def __call__(self, images: Sequence[Pixels]) -> list[str | Unanswered]:
        """See `Captioner`."""
        urls = [_data_url(bounded(Image.fromarray(image), *self._pixels)) for image in images]
        return asyncio.run_coroutine_threadsafe(self._answers(urls), self._loop).result()

    async def _answers(self, urls: Sequence[str]) -> list[str | Unanswered]:
        return await asyncio.gather(*map(self._answer, urls))

    async def _answer(self, url: str) -> str | Unanswered:
        try:
            # The client's own timeout holds between two bytes, so that a server which drips would never meet it.
            async with asyncio.timeout(self._deadline_s):
                return _text(await self._body(url))
        except TimeoutError:
            return Unanswered(f"no answer within {self._deadline_s:g} s", may_pass=True)
        except APIStatusError as error:
            # A server may repeat what it was sent.
            detail = f"status {error.status_code}: {one_line(error)}".replace(self._key, "(key)")
            return Unanswered(detail[:200], may_pass=error.status_code in (408, 409, 429) or error.status_code >= 500)
        except (APIConnectionError, httpx2.HTTPError) as error:  # the latter within the answer
            return Unanswered(f"no connection: {one_line(error.__cause__ or error)}"[:200], may_pass=True)
        except (ValueError, LookupError, TypeError) as error:
            return Unanswered(f"no chat completion: {type(error).__name__}: {one_line(error)}"[:200], may_pass=False)

    async def _body(self, url: str) -> bytes:
        """The bytes of the answer about an image. Raises ValueError for more than MAX_ANSWER_BYTES."""
        request = self._client.chat.completions.with_streaming_response.create(
            model=self._model,
            max_tokens=self._max_new_tokens,
            temperature=0,
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": url}},
                        {"type": "text", "text": self._prompt},
                    ],
                }
            ],
        )
        body = bytearray()
        async with request as response:
            async for part in response.iter_bytes():
                body += part
                if len(body) > MAX_ANSWER_BYTES:
                    raise ValueError(f"more than {MAX_ANSWER_BYTES} bytes")
        return bytes(body)


def check_server(url: str, model: str) -> None:
    """Makes sure that the server is there, takes the key, and serves the model. Raises BackendError."""
    client = OpenAI(base_url=url, api_key=_key(), max_retries=0, timeout=CHECK_S)
    try:
        served = [found.id for found in client.models.list()]
    except (AuthenticationError, PermissionDeniedError):
        raise BackendError(
            f"caption.server {url}: refuses the key; set {KEY} in the environment of each node"
        ) from None
    except APIConnectionError as error:
        why = one_line(error.__cause__ or error)
        raise BackendError(
            f"caption.server {url}: cannot be reached ({why}); start it, or correct the address"
        ) from None
    except APIStatusError as error:
        if error.status_code == 404:  # some servers have no such list, and the test image will tell
            return
        raise BackendError(f"caption.server {url}: answers with status {error.status_code}") from None
    # Ollama's names end in a tag, and "latest" may be left out.
    if served and model not in served and f"{model}:latest" not in served:
        raise BackendError(f"caption.model {model}: {url} does not serve it, but {', '.join(served[:5])}")


def _key() -> str:
    return os.environ.get(KEY) or "none"  # servers of one's own mostly want no key, and the client wants one


def _data_url(image: Image.Image) -> str:
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(sink.getvalue()).decode()


def _text(body: bytes) -> str:
    """The caption of an answer; "" where there is none. Raises ValueError, LookupError or TypeError."""
    content = json.loads(body)["choices"][0]["message"]["content"]
    if not isinstance(content, str | None):
        raise TypeError(f"content is a {type(content).__name__}")
    # A model that thinks first does so in its answer, unless its server takes that out.
    return " ".join((content or "").rpartition("</think>")[2].split())
