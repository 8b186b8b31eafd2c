"""Reads a stream until it is killed; what it has seen is saved in one piece with the stream's state, as a trainer saves
its model. Run as a process of its own."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

from train.stream.dataset import Stream
from train.stream.loader import StreamLoader


def main() -> None:
    dataset, cache, checkpoint, workers = sys.argv[1:]
    loader, seen = StreamLoader(Stream(dataset, 6, cache=Path(cache)), int(workers)), []
    if Path(checkpoint).exists():
        saved = json.loads(Path(checkpoint).read_text())
        loader.load_state_dict(saved["state"])
        seen = saved["seen"]
    for batch in itertools.chain.from_iterable(itertools.repeat(loader)):
        seen += batch["key"]
        temporary = Path(checkpoint + ".tmp")
        temporary.write_text(json.dumps({"state": loader.state_dict(), "seen": seen}))
        temporary.replace(checkpoint)
        print("saved", flush=True)


if __name__ == "__main__":
    main()
