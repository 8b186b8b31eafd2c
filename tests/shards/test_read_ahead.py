"""Files of a bucket are read some ahead, and come in order all the same."""

from __future__ import annotations

import threading

import pytest

from datapipe.shards import Store
from datapipe.shards.read_ahead import AT_ONCE, read_ahead
from subject_diffusion.errors import ShardError


def test_a_buckets_files_come_in_order_and_some_at_the_same_time(bucket):
    store = Store(f"{bucket}/ahead")
    together = threading.Barrier(AT_ONCE, timeout=60)

    def read(number: int) -> int:
        if number < AT_ONCE:
            together.wait()
        return number

    assert list(read_ahead(store, read, range(3 * AT_ONCE))) == list(range(3 * AT_ONCE))


def test_no_more_are_read_than_asked_for_and_a_few(bucket, tmp_path):
    for store, ahead in ((Store(f"{bucket}/ahead"), AT_ONCE), (Store(str(tmp_path)), 1)):
        begun: list[int] = []
        found = read_ahead(store, begun.append, range(1000))
        next(found)
        del found
        assert 1 <= len(begun) <= ahead


def test_an_error_comes_in_its_place(bucket):
    def read(number: int) -> int:
        if number == 40:
            raise ShardError("damaged")
        return number

    found = read_ahead(Store(f"{bucket}/ahead"), read, range(100))
    assert [next(found) for _ in range(40)] == list(range(40))
    with pytest.raises(ShardError, match="damaged"):
        next(found)
