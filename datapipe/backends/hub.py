"""The model hub: one file of a repository, the commit that a revision stands for, and what to do when the hub refuses.

huggingface_hub is imported where it is used, because every command that reads a recipe imports this file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from subject_diffusion.errors import BackendError, one_line

ANSWER_S = 3.0
"""How long the hub may take to answer. Its client would wait as long as the system does: minutes."""
UNUSED_FILES = ("*.bin", "*.h5")
"""The same weights again, in formats that are not loaded."""

_COMMIT = re.compile(r"[0-9a-f]{40}")


class Published(NamedTuple):
    """What its page says of a model. `gb`: size of its weights; `licence`: of the weights; `gated`: whether it must be
    accepted there before anything is downloaded."""

    gb: float
    licence: str
    gated: bool = False

    def __str__(self) -> str:
        return f"{self.licence}, gated" if self.gated else self.licence


PUBLISHED = {
    "Salesforce/blip2-opt-2.7b": Published(15.0, "MIT"),
    "IDEA-Research/grounding-dino-tiny": Published(0.7, "Apache-2.0"),
    "facebook/sam-vit-huge": Published(2.6, "Apache-2.0"),
    "Qwen/Qwen3-VL-4B-Instruct": Published(8.9, "Apache-2.0"),
    "openmmlab-community/mm_grounding_dino_tiny_o365v1_goldg_v3det": Published(0.7, "Apache-2.0"),
    "facebook/sam2.1-hiera-large": Published(0.9, "Apache-2.0"),
    "facebook/sam3": Published(3.4, "SAM License", gated=True),
    "bert-base-uncased": Published(0.4, "Apache-2.0"),
}
"""The models of the recipes. Weights are float32, Qwen's bfloat16."""


def licence_of(model: str) -> str:
    """The license of a model as a run records it ("id@commit", "NAME, served"); "" where it is not known here."""
    found = PUBLISHED.get(re.split(r"@|, served$", model)[0])
    return str(found) if found else ""


class HubModel(NamedTuple):
    """A repository of the hub, at a revision (None: main). `key`: the recipe's, which errors name."""

    key: str
    id: str
    revision: str | None

    def commit(self) -> str:
        """The commit that the revision stands for now; without a connection, when the hub was last asked. Raises
        BackendError."""
        from huggingface_hub import HfApi

        if self.revision is not None and _COMMIT.fullmatch(self.revision):
            return self.revision
        try:
            return str(HfApi().resolve_revision(self.id, revision=self.revision).resolved)
        except Exception as error:  # the hub client raises its own, the HTTP client's and the system's classes
            raise self.refused(error) from None

    def file_names(self) -> list[str] | None:
        """Every file of the repository; None where the hub is out of reach. Raises BackendError when it refuses."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            listed = HfApi().model_info(self.id, revision=self.revision, timeout=ANSWER_S).siblings
        except (HfHubHTTPError, HFValidationError) as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code >= 500:
                return None
            raise self.refused(error) from None
        except Exception:  # no connection, as the HTTP client, of whichever version, calls it
            return None
        return [file.rfilename for file in listed or []]

    def answers(self) -> bool:
        """Whether the hub can be reached, even if it refuses."""
        try:
            return self.file_names() is not None
        except BackendError:
            return True

    def file(self, name: str, cached: bool = False) -> Path:
        """Fetches a file and returns its local path. `cached`: takes it from the cache only. Raises BackendError."""
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(self.id, name, revision=self.revision, local_files_only=cached))
        except Exception as error:  # as in `commit`
            raise self.refused(error) from None

    def refused(self, error: BaseException) -> BackendError:
        """What happened and what to do, for an error of the hub client or one that it caused."""
        return BackendError(f"{self.key} {self.id}: {self.advice(error) or one_line(error)}")

    def advice(self, error: BaseException) -> str | None:
        """One line for each way in which the hub refuses; None when the error is none of the hub's."""
        from huggingface_hub import constants, errors

        page = f"{constants.ENDPOINT}/{self.id}"
        setting = self.key.rpartition(".")[0]
        for cause in _causes(error):
            match cause:
                case errors.GatedRepoError():
                    return f"gated: accept its license at {page}, then `hf auth login` (or set HF_TOKEN), and run again"
                case errors.RepositoryNotFoundError():
                    return (
                        f"the hub has no model of this name at {constants.ENDPOINT}; check the spelling, or, "
                        "if it is private, `hf auth login` (or set HF_TOKEN)"
                    )
                case errors.RevisionNotFoundError():
                    return (
                        f"has no revision {self.revision}; set {setting}.revision to one listed at {page}/commits, "
                        "or to main"
                    )
                case errors.RemoteEntryNotFoundError():
                    return f"the hub's repository lacks a file that it needs; it must be in hub format, see {page}/tree"
                case errors.OfflineModeIsEnabled():
                    return (
                        f"not in the cache{self._size()}, and HF_HUB_OFFLINE forbids to fetch it; {self._to_bring_it()}"
                    )
                case errors.HFValidationError():
                    return "no name of a hub's model (owner/name), and no folder"
                case errors.HfHubHTTPError() if cause.response is not None:
                    return f"the hub at {constants.ENDPOINT} answers {cause.response.status_code}; try again later"
        unreachable = errors.LocalEntryNotFoundError, errors.RevisionResolutionError, ConnectionError
        if any(isinstance(cause, unreachable) for cause in _causes(error)):
            where = f"the hub at {constants.ENDPOINT} cannot be reached"
            return f"not in the cache{self._size()}, and {where}; {self._to_bring_it()}"
        return None

    def _size(self) -> str:
        return f" (about {PUBLISHED[self.id].gb:g} GB)" if self.id in PUBLISHED else ""

    def _to_bring_it(self) -> str:
        revision = f" --revision {self.revision}" if self.revision else ""
        unused = "".join(f" --exclude '{pattern}'" for pattern in UNUSED_FILES)
        return (
            f"where there is a connection, `hf download {self.id}{revision}{unused} --local-dir FOLDER`, then here "
            f"--set {self.key}=FOLDER"
        )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it, the latest first."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__
