"""Run as a program: writes a shard again and again, each time in a process that is killed one step later.

One program forks them all: imports take longer than the test. Prints the number of steps that a commit takes.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datapipe.shards.store as store_module
from datapipe.shards import Provenance, Store, write_shard
from tests.shards.test_commit import mixed_slice

STEPS = ("fsync", "replace", "open", "close")


def main(folder: Path) -> None:
    fatal, status = 0, -signal.SIGKILL
    while status == -signal.SIGKILL:
        fatal += 1
        if (child := os.fork()) == 0:
            write_until(fatal, folder / str(fatal))
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        sys.exit(f"the writer of step {fatal} ended with {status}")
    print(fatal - 1)


def write_until(fatal: int, out: Path) -> None:
    """Dies before its `fatal`-th step, if there are as many."""
    steps = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return wrapper

    for name in STEPS:
        setattr(os, name, counted(getattr(os, name)))
    store_module.HashingFile.write = counted(store_module.HashingFile.write)  # type: ignore[method-assign]  # to count it
    write_shard(Store(str(out)), "shard", mixed_slice(), Provenance("recipe", "code", "input", {"caption": "toy@1"}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
