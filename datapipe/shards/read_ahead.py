"""Many small files of a dataset, read one after another: from a bucket, several at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from datapipe.shards.store import Store

AT_ONCE = 32

T = TypeVar("T")
R = TypeVar("R")


def read_ahead(store: Store, read: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """What `read` returns for each item, in order. From a bucket, which takes tens of milliseconds to answer, up to
    `AT_ONCE` of them are read at the same time."""
    if store.local:
        yield from map(read, items)
        return
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="read-ahead") as pool:
        under_way: deque[Future[R]] = deque()
        for item in items:
            under_way.append(pool.submit(read, item))
            if len(under_way) == AT_ONCE:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
