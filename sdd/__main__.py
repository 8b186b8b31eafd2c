"""The command `sdd`, and `python -m sdd`."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn

RESUMABLE = frozenset({"dataset", "import", "reselect", "pairs", "train", "ablate", "sweep", "sample", "evaluate"})


def main() -> None:
    """Entry point. The process ends with the command's own exit code."""
    try:
        _until_stopped()
    except SystemExit as ended:
        if isinstance(ended.code, str):
            raise
        _end(ended.code or 0)
    except Exception as error:  # whatever nobody foresaw ends with its own exit code, too
        sys.excepthook(type(error), error, error.__traceback__)
        _end(1)


def _end(code: int) -> NoReturn:
    """Ends the process without the destructors of native libraries: where one of their threads outlives the
    interpreter, the C++ runtime aborts, and the exit code is SIGABRT's."""
    atexit._run_exitfuncs()
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _until_stopped() -> None:
    """Runs the command. SIGTERM ends it as Ctrl-C does, and what keeps the code from being imported at all is one line,
    too."""
    stopped_by: list[int] = []

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        stopped_by.append(number)
        raise KeyboardInterrupt

    def again(dropped: sys.UnraisableHookArgs) -> None:
        """Python drops what a handler raises where nothing can catch it, as in a destructor."""
        if not (stopped_by and isinstance(dropped.exc_value, KeyboardInterrupt)):
            sys.__unraisablehook__(dropped)
            return
        timer = threading.Timer(0.05, signal.pthread_kill, (threading.main_thread().ident, stopped_by[-1]))
        timer.daemon = True
        timer.start()

    sys.unraisablehook = again
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as for a shell's command in the background
            signal.signal(number, stop)
    try:
        _run()
    except BaseException:  # while everything ends, one error more may come of the end
        if not stopped_by:
            raise
        goes_on = "; the same command goes on from here" if sys.argv[1:2] and sys.argv[1] in RESUMABLE else ""
        print(f"sdd: stopped{goes_on}", file=sys.stderr)
        sys.exit(128 + stopped_by[0])


def _run() -> None:
    try:
        import subject_diffusion  # noqa: F401  (first of all: looks for packages of the same names)
        from sdd.cli import main as command
    except ImportError as error:
        print(f"sdd: {error}", file=sys.stderr)
        sys.exit(2)
    command()


if __name__ == "__main__":
    main()
