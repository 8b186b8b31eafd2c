"""What a user can do wrong with the model: each message is one line that says what is wrong, where, and what to do."""

from subject_diffusion.errors import SddError


class ModelError(SddError, ValueError):
    """A base folder, prompt, subject or size that the model cannot use as it is. A ValueError, as diffusers raises."""
