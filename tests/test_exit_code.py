"""Every command ends with its own exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.toy import PROJECT

ABORTS_AT_THE_END = """
import atexit, ctypes

libc = ctypes.CDLL(None)
# As a native library whose thread is still at work: the C++ runtime aborts among its destructors.
libc.__cxa_atexit(libc.abort, None, None)
atexit.register(print, "python's own end")
"""


UNFORESEEN = """
import sdd.__main__ as entry

def run():
    raise ValueError("nobody foresaw this")

entry._run = run
entry.main()
"""

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the runtime's own list of what to call at the end is glibc's"
)


def ended(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A process of Python's in which a native library aborts at the end."""
    (folder / "sitecustomize.py").write_text(ABORTS_AT_THE_END)
    path = os.pathsep.join([str(folder), str(PROJECT)])
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(("words", "code"), [(("--version",), 0), (("verify", "nowhere"), 2)])
def test_what_native_libraries_do_at_the_end_changes_no_exit_code(tmp_path: Path, words: tuple[str, ...], code: int):
    done = ended(tmp_path, "-m", "sdd", *words)
    assert done.returncode == code, done.stderr
    assert done.stdout.endswith("python's own end\n")


def test_an_error_that_nobody_foresaw_ends_with_its_traceback_and_exit_code_1(tmp_path: Path):
    done = ended(tmp_path, "-c", UNFORESEEN)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("Traceback (most recent call last):\n")
    assert done.stderr.endswith("\nValueError: nobody foresaw this\n")
    assert done.stdout.endswith("python's own end\n")
