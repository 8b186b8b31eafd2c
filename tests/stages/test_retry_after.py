from __future__ import annotations

import datetime
from email.utils import format_datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from datapipe.stages.retry_after import LONGEST_S, Pauses, retry_after_s

NOW = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
ZONES = st.sampled_from(["GMT", "+0000", "-0000", "-1200", "+1400", "+9999", "-9999", "EST", "", "XYZ"])


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        (" 120 ", 120.0),
        ("9" * 5000, LONGEST_S),
        (format_datetime(NOW + datetime.timedelta(seconds=30), usegmt=True), 30.0),
        ("Fri, 02 Jan 2026 04:04:35 +0100", 30.0),
        ("Fri, 02 Jan 2026 03:04:35 -0000", 30.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", LONGEST_S),
        ("Fri, 31 Dec 9999 23:59:59 -1200", LONGEST_S),
        ("-5", None),
        ("1.5", None),
        ("٣", None),
        ("", None),
        ("soon", None),
    ],
)
def test_retry_after_is_read(value: str, seconds: float | None) -> None:
    assert retry_after_s(value, NOW) == seconds


@given(
    st.one_of(
        st.text(),
        st.integers().map(str),
        st.builds(
            "{}, {} {} {} {}:{}:{} {}".format,
            st.sampled_from(["Mon", "Fri", "x"]),
            st.integers(-1, 40),
            st.sampled_from(["Jan", "Dec", "Foo", "1"]),
            st.integers(-1, 100_000),
            st.integers(-1, 99),
            st.integers(-1, 99),
            st.integers(-1, 99),
            ZONES,
        ),
    )
)
@example("Mon, 01 Jan 0001 00:00:00 +1400")
@example("Fri, 31 Dec 9999 23:59:59 -9999")
@example("1 Jan 99999999999999999999 00:00:00 GMT")
def test_any_value_gives_seconds_or_nothing(value: str) -> None:
    seconds = retry_after_s(value, NOW)
    assert seconds is None or 0 <= seconds <= LONGEST_S


def test_the_longest_pause_of_a_host_counts_and_other_hosts_have_none() -> None:
    pauses = Pauses()
    pauses.ask("a.example", 100)
    pauses.ask("a.example", 1)
    assert 99 < pauses.left_s("a.example") <= 100
    assert pauses.left_s("b.example") == 0
