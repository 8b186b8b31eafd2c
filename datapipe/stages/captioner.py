"""What stages that put images into words have in common: which model does, and how it is asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from datapipe.backends.loading import ModelSettings, check_model, model_identity, pinned
from datapipe.backends.protocol import Captioner
from datapipe.stages.stage import StageSettings
from subject_diffusion.errors import BackendError
from subject_diffusion.settings import EXECUTION_ONLY


class CaptionerSettings(StageSettings, ModelSettings):
    """A model that puts images into words."""

    backend: Literal["transformers", "openai", "alt_text"] = "transformers"
    """transformers: an image-to-text model, in the run's own processes; openai: a chat model behind an HTTP server that
    speaks OpenAI's chat completions (vLLM, SGLang, TGI, Ollama); alt_text: the text that came with the image."""
    model: str = "Salesforce/blip2-opt-2.7b"
    """Hub id or folder of BLIP, BLIP-2 or another image-to-text model; for openai the server's name of it. The paper:
    BLIP-2."""
    prompt: str = ""
    """With BLIP, BLIP-2 and GIT text that the caption continues, with all others what the caption answers. Default:
    nothing, or for a chat model "Describe the image in one sentence.", for PaliGemma "caption en", for InstructBLIP
    "A short image description.", for Florence-2 its task <CAPTION>."""
    max_new_tokens: int = Field(40, ge=1)
    """Maximum length of a caption, in tokens. Inferred."""
    num_beams: int = Field(1, ge=1)
    """Beams of the search; 1 is greedy. Inferred."""
    min_pixels: int = Field(256 * 28 * 28, ge=1)
    """A chat model's image is enlarged to at least this width × height. From Qwen2.5-VL's model card: 256 tokens."""
    max_pixels: int = Field(1280 * 28 * 28, ge=1)
    """A chat model's image is shrunk to at most this width × height, because memory and time grow with it. From
    Qwen2.5-VL's model card: 1,280 tokens."""

    server: Annotated[str, EXECUTION_ONLY] = ""
    """For openai: the server's address, such as http://localhost:8000/v1. Its key, if it wants one, is OPENAI_API_KEY
    in the environment of each node. Each micro-batch is asked about at once."""
    server_deadline_s: Annotated[float, EXECUTION_ONLY] = Field(120.0, gt=0)
    """Seconds that the server has for one image, all attempts together; less than run.deadline_s."""
    server_retries: Annotated[int, EXECUTION_ONLY] = Field(4, ge=0)
    """How often an image is asked about again after a fault that may pass."""

    @model_validator(mode="after")
    def _server_for_openai_alone(self) -> Self:
        if self.backend != "openai":
            if self.server:
                raise ValueError(f"server is for backend=openai, and backend is {self.backend}")
            return self
        # The record of a run has none, because where the server was does not matter.
        if self.server:
            address = urlsplit(self.server)
            if address.username or address.password:
                raise ValueError("server: keep passwords out of the address; the key is OPENAI_API_KEY")
            if address.scheme not in ("http", "https") or not address.hostname or address.query or address.fragment:
                raise ValueError(f"server {self.server!r}: no address such as http://localhost:8000/v1")
            address.port  # noqa: B018  # raises ValueError for one that is no number
        return self

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is more than max_pixels {self.max_pixels}")
        return self

    def check(self) -> None:
        if self.backend == "transformers":
            check_model(self, processor=True, tokenizer=True)
        elif self.backend == "openai":
            from datapipe.backends.openai_server import check_server

            if not self.server:
                raise BackendError(
                    f"{self.block}.server: backend=openai needs an address such as http://localhost:8000/v1"
                )
            check_server(self.server, self.model, self.block)

    @property
    def block(self) -> str:
        """The recipe's block of these settings, which errors name."""
        return self.key.partition(".")[0]

    @property
    def computes_here(self) -> bool:
        return self.backend == "transformers"

    def pinned(self) -> Self:
        return pinned(self) if self.backend == "transformers" else self

    def model_used(self) -> str:
        if self.backend == "transformers":
            return model_identity(self)
        return f"{self.model}, served" if self.backend == "openai" else self.backend


def build_captioner(
    settings: CaptionerSettings, chat_prompt: str, schema: Mapping[str, Any] | None = None
) -> Captioner | None:
    """The captioner, loaded; None for alt texts, which want none. Raises BackendError.

    chat_prompt: what a chat model is asked where the settings have no prompt; schema: JSON schema of the answers that
    the prompt asks for, which are text by default.
    """
    if settings.backend == "transformers":
        from datapipe.backends.image_to_text import ImageToText

        return ImageToText(
            settings,
            settings.prompt,
            settings.max_new_tokens,
            settings.num_beams,
            min_pixels=settings.min_pixels,
            max_pixels=settings.max_pixels,
            chat_prompt=chat_prompt,
            must_chat=schema is not None,
        )
    if settings.backend == "openai":
        from datapipe.backends.openai_server import OpenAIServer

        return OpenAIServer(
            settings.server,
            settings.model,
            settings.prompt or chat_prompt,
            settings.max_new_tokens,
            min_pixels=settings.min_pixels,
            max_pixels=settings.max_pixels,
            deadline_s=settings.server_deadline_s,
            retries=settings.server_retries,
            schema=schema,
        )
    return None
