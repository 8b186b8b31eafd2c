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


@pytest.mark.skipif(sys.platform != "linux", reason="the runtime's own list of what to call at the end is glibc's")
@pytest.mark.parametrize(("words", "code"), [(("--version",), 0), (("verify", "nowhere"), 2)])
def test_what_native_libraries_do_at_the_end_changes_no_exit_code(tmp_path: Path, words: tuple[str, ...], code: int):
    (tmp_path / "sitecustomize.py").write_text(ABORTS_AT_THE_END)
    path = os.pathsep.join([str(tmp_path), str(PROJECT)])
    done = subprocess.run(
        [sys.executable, "-m", "sdd", *words], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert done.stdout.endswith("python's own end\n")
