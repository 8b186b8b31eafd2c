"""Small datasets in the shard format, without running a model for them, and a web server that misbehaves."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.server
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from datapipe.schema import Entity, Reason, Sample, Slice, StageName
from datapipe.shards import Provenance, Store, write_shard
from tests.conftest import jpeg, rle
from train.stream.dataset import Stream
from train.stream.loader import StreamLoader
from train.stream.reader import Columns, RawMembers

PROVENANCE = Provenance("recipe", "code", "input", {"caption": "toy@1"})
TAGS = ("mug", "fish", "robot")


def sample(row: int, entities: int = 1, caption: str = "a mug {row}") -> Sample:
    """A kept sample whose image, caption, size and entities follow from its row."""
    width, height = 40 + row % 17, 32 + row % 5
    made = [
        Entity(TAGS[(row + i) % 3], (2, 5), (4.0, 4.0, 20.0 + i, 24.0), round(0.9 - 0.1 * i, 1), 0.8,
               rle(height, width, (4, 4, 20 + i, 24)), 0.95, 0.97)
        for i in range(entities)
    ]  # fmt: skip
    return Sample(
        row=row, caption=caption.format(row=row), image=jpeg(width, height, row), width=width, height=height,
        original_width=width, original_height=height, sha256="ab" * 32, phash=row, candidates=tuple(made),
    ).kept()  # fmt: skip


def write_dataset(folder: Path | str, sizes: Sequence[int], first_row: int = 0, caption: str = "a mug {row}") -> Path:
    """Shards of as many kept samples as `sizes` says, each with a dropped row at its end."""
    store = Store(str(folder))
    row = first_row
    for index, size in enumerate(sizes):
        samples = [sample(r, 1 + r % 3, caption) for r in range(row, row + size)]
        dropped = Sample(row=row + size).dropped(StageName.SCREEN, Reason.TOO_SMALL)
        write_shard(store, "shard", Slice(index, (*samples, dropped)), PROVENANCE)
        row += size + 1
    return Path(folder)


def ids(batches: Sequence[Columns]) -> list[str]:
    return [key for batch in batches for key in batch["key"]]


def joined(by_rank: Sequence[Columns]) -> Columns:
    """The parts of one batch that the ranks got, put together."""
    return {
        name: torch.cat([b[name] for b in by_rank])
        if isinstance(by_rank[0][name], torch.Tensor)
        else [item for b in by_rank for item in b[name]]
        for name in by_rank[0]
    }


def digest(batch: Columns) -> str:
    """A hash over every bit of it."""
    plain = {name: _plain(value) for name, value in batch.items()}
    return hashlib.sha256(repr(sorted(plain.items())).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes(), tuple(value.shape)
    if isinstance(value, RawMembers):
        return [{name: bytes(content) for name, content in value[i].items()} for i in range(len(value))]
    return value


def take(count: int, ranks: int, workers: int, state: dict[str, Any] | None, make: Any) -> tuple[list[Columns], Any]:
    """The next `count` batches, each put together from all ranks, and the state after them. `make(rank, ranks)`: the
    stream."""
    loaders = [StreamLoader(make(rank, ranks), workers) for rank in range(ranks)]
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(state)
    batches = []
    iterators = [through_epochs(loader) for loader in loaders]
    for _ in range(count):
        batches.append(joined([next(iterator) for iterator in iterators]))
    states = [loader.state_dict() for loader in loaders]
    assert all(s == states[0] for s in states)
    return batches, states[0]


def through_epochs(loader: StreamLoader) -> Iterator[Columns]:
    while True:
        yield from loader


def streams(path: Any, **settings: Any) -> Any:
    """rank, ranks -> a stream with these settings."""
    return lambda rank, ranks: Stream(path, rank=rank, ranks=ranks, **settings)


@contextlib.contextmanager
def web(folder: Path, faults: Sequence[str] = (), of: str = ".tar") -> Iterator[tuple[str, Counter[str]]]:
    """A real server of a folder. `faults`: what it does to the first requests for a file that ends in `of`, one after
    another: "fail" (503), "stall", "truncate", "garble". Yields its address and how often each path was asked for."""
    left = list(faults)
    asked: Counter[str] = Counter()
    released = threading.Event()

    class Handler(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked[self.path] += 1
            fault = left.pop(0) if left and self.path.endswith(of) else None
            if fault is None:
                super().do_GET()
                return
            if fault == "fail":
                self.send_error(503)
                return
            data = (folder / self.path.lstrip("/")).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if fault == "garble":
                self.wfile.write(bytes(len(data)))
                return
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            if fault == "stall":
                released.wait(30)
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        released.set()
        server.shutdown()
        server.server_close()
        thread.join()
