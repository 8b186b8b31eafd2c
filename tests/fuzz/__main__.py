"""Runs the fuzzers long: python -m tests.fuzz [--inputs 1000000] [NAME ...]"""

from __future__ import annotations

import argparse
import time

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.targets import TARGETS

AT_ONCE = 20_000
"""Inputs of one run of hypothesis, which remembers all of them."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Feeds readers with what strangers may send, until one fails.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--inputs", type=int, default=1_000_000, help="in all; default: 1,000,000")
    parser.add_argument("--seed", type=int, default=0, help="of the first run; default: 0")
    given_ = parser.parse_args()
    names = given_.names or list(TARGETS)
    if unknown := set(names) - set(TARGETS):
        parser.error(f"no fuzzer {', '.join(sorted(unknown))}")
    for name in names:
        strategy, read = TARGETS[name]
        started, done, number = time.monotonic(), 0, given_.seed
        while done < given_.inputs // len(names):
            count = min(AT_ONCE, given_.inputs // len(names) - done)
            fuzz = settings(
                max_examples=count,
                deadline=None,
                database=None,
                phases=(Phase.generate, Phase.shrink),
                suppress_health_check=list(HealthCheck),
            )(seed(number)(given(strategy)(read)))
            fuzz()
            done, number = done + count, number + 1
        print(f"{name}: {done:,} inputs in {time.monotonic() - started:.0f} s, no fault", flush=True)


if __name__ == "__main__":
    main()
