"""A captioner behind an HTTP server that speaks OpenAI's chat completions, as vLLM, SGLang, TGI and Ollama do."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import httpx2
from openai import APIConnectionError, APIStatusError, AsyncOpenAI, AuthenticationError, PermissionDeniedError
from PIL import Image

from datapipe.backends.chat import bounded
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
    brought to between `min_pixels` and `max_pixels` pixels. `schema`: of JSON, which the answers must have.
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
        schema: Mapping[str, Any] | None = None,
    ) -> None:
        self._client = _client(url, max_retries=retries, timeout=deadline_s)
        self._model, self._prompt, self._max_new_tokens = model, prompt, max_new_tokens
        self._format: dict[str, Any] = {}
        if schema is not None:
            named = {"name": "answer", "strict": True, "schema": dict(schema)}
            self._format = {"response_format": {"type": "json_schema", "json_schema": named}}
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
            passes = error.status_code in (408, 409, 429) or error.status_code >= 500
            return Unanswered(f"status {error.status_code}: {_told(error)}"[:200], passes)
        except (APIConnectionError, httpx2.HTTPError) as error:  # the latter within the answer
            return Unanswered(f"no connection: {_told(error.__cause__ or error)}"[:200], may_pass=True)
        except (ValueError, LookupError, TypeError) as error:
            return Unanswered(f"no chat completion: {type(error).__name__}: {_told(error)}"[:200], may_pass=False)

    async def _body(self, url: str) -> bytes:
        """The bytes of the answer about an image."""
        request = self._client.chat.completions.with_streaming_response.create(
            model=self._model,
            max_tokens=self._max_new_tokens,
            temperature=0,
            **self._format,
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
        async with request as response:
            return await _bounded_body(response)


def check_server(url: str, model: str, block: str) -> None:
    """Makes sure that the server is there, takes the key, and serves the model. `block`: of the recipe, which errors
    name. Raises BackendError."""
    where = f"{block}.server {url}"
    try:
        served = asyncio.run(_served(url))
    except (AuthenticationError, PermissionDeniedError):
        raise BackendError(f"{where}: refuses the key; set {KEY} in the environment of each node") from None
    except APIStatusError as error:
        if error.status_code == 404:  # some servers have no such list, and the test image will tell
            return
        raise BackendError(f"{where}: answers with status {error.status_code}") from None
    except (APIConnectionError, httpx2.HTTPError, httpx2.InvalidURL, TimeoutError) as error:
        why = _told(error.__cause__ or error) or f"no answer within {CHECK_S:g} s"
        raise BackendError(f"{where}: cannot be reached ({why}); start it, or correct the address") from None
    except (ValueError, LookupError, TypeError):
        raise BackendError(f"{where}: its list of models is none; is this the address that ends in /v1?") from None
    # Ollama's names end in a tag, and "latest" may be left out.
    if served and model not in served and f"{model}:latest" not in served:
        raise BackendError(f"{block}.model {model}: {url} does not serve it, but {', '.join(served[:5])}")


async def _served(url: str) -> list[str]:
    """The names of the server's models. Raises ValueError, LookupError or TypeError where it sends something else."""
    async with (
        asyncio.timeout(CHECK_S),
        _client(url, max_retries=0, timeout=CHECK_S) as client,
        client.models.with_streaming_response.list() as response,
    ):
        body = await _bounded_body(response)
    return [str(model["id"]) for model in json.loads(body)["data"]]


async def _bounded_body(response: Any) -> bytes:
    """Raises ValueError for more than MAX_ANSWER_BYTES."""
    body = bytearray()
    async for part in response.iter_bytes():
        body += part
        if len(body) > MAX_ANSWER_BYTES:
            raise ValueError(f"more than {MAX_ANSWER_BYTES} bytes")
    return bytes(body)


def _client(url: str, *, max_retries: int, timeout: float) -> AsyncOpenAI:
    """Raises BackendError for a key that no HTTP header can hold."""
    key = _key()
    if not (key.isascii() and key.isprintable()):
        raise BackendError(f"{KEY} in the environment holds characters that no key has; copy it again")
    # Servers of one's own mostly want no key, and the client wants one.
    return AsyncOpenAI(base_url=url, api_key=key or "none", max_retries=max_retries, timeout=timeout)


def _key() -> str:
    return os.environ.get(KEY, "").strip()  # secrets that are mounted as files often end in a newline


def _told(error: BaseException) -> str:
    """An error in one line, without the key: a server may repeat what it was sent."""
    key = _key()
    return one_line(str(error).replace(key, "(key)") if key else error)


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
    _, mark, caption = (content or "").rpartition("</think>")
    if not mark and "<think>" in caption:
        raise ValueError("cut off while thinking; raise max_new_tokens, or turn thinking off")
    return " ".join(caption.split())
