"""What is behind a reference."""

from typing import Literal

ReferenceBackground = Literal["white", "photo", "original"]
"""What is behind a subject in its reference: white, as the released code samples; a photo, as it trains; or what was
there, inside the subject's box."""
