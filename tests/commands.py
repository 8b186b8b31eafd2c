"""Commands as a user types them, in this process: importing torch takes seconds, and each process pays for it."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

import pytest

from sdd.cli import main


def sdd(*words: str | Path, columns: int | None = None) -> tuple[int, str, str]:
    """A command: its exit code, standard output and standard error.

    columns: of the terminal; by default this one's.
    """
    code, out, err = 0, io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["sdd", *map(str, words)])
        if columns:
            patch.setenv("COLUMNS", str(columns))
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    return code, out.getvalue(), err.getvalue()
