"""A short run of every fuzzer; `python -m tests.fuzz` runs them as long as you like."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_what_strangers_send_ends_with_a_result_or_the_error_of_its_kind(name: str) -> None:
    strategy, read = TARGETS[name]
    settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))(given(strategy)(read))()
