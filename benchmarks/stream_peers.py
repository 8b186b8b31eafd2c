"""One measurement of one other loader, in an environment of its own (they pin other versions): see `stream.py`.

Each is used as its documentation says, with an image column of JPEG bytes: shuffled, batched, in worker processes.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional

Decoder = Callable[[bytes, int], Any]


def pillow(data: bytes, side: int) -> torch.Tensor:
    image = Image.open(io.BytesIO(data)).convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def torchvision(data: bytes, side: int) -> torch.Tensor:
    pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    resized: torch.Tensor = functional.resize(pixels, [side, side], antialias=True)
    return resized


def none(data: bytes, side: int) -> bytes:
    return data


DECODERS: dict[str, Decoder] = {"pillow": pillow, "torchvision": torchvision, "none": none}


def samples(tars: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(tars.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None and member.name.endswith(".jpg"):
                    yield member.name[:-4], file.read()


def convert_mosaic(tars: Path, folder: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"key": "str", "image": "bytes"}) as writer:
        for key, image in samples(tars):
            writer.write({"key": key, "image": image})


def convert_litdata(tars: Path, folder: Path) -> None:
    import litdata

    found = list(samples(tars))
    litdata.optimize(_litdata_sample, found, output_dir=str(folder), chunk_bytes="64MB", num_workers=1)


def _litdata_sample(found: tuple[str, bytes]) -> dict[str, Any]:
    return {"key": found[0], "image": found[1]}


def loader_of(name: str, data: Path, decode: Decoder, side: int, batch: int, workers: int) -> Any:
    """A DataLoader over one epoch."""
    settings: dict[str, Any] = {"num_workers": workers, "persistent_workers": True}
    if decode is none:
        settings["collate_fn"] = list  # the default cannot take bytes
    if name == "webdataset":
        import webdataset

        urls = [str(path) for path in sorted(data.glob("*.tar"))]
        dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False).shuffle(1000)
        chosen = dataset.to_tuple("__key__", "jpg").map(lambda found: (found[0], decode(found[1], side)))
        return webdataset.WebLoader(chosen.batched(batch, partial=False), batch_size=None, **settings)
    if name == "mosaicml-streaming":
        from streaming import StreamingDataLoader, StreamingDataset

        class Mosaic(StreamingDataset):  # type: ignore[misc]  # an untyped package
            def __getitem__(self, index: int) -> Any:
                found = super().__getitem__(index)
                return found["key"], decode(found["image"], side)

        dataset = Mosaic(local=str(data), shuffle=True, batch_size=batch, num_canonical_nodes=1)
        return StreamingDataLoader(dataset, batch_size=batch, drop_last=True, **settings)
    import litdata

    class Lit(litdata.StreamingDataset):  # type: ignore[misc]  # an untyped package
        def __getitem__(self, index: Any) -> Any:
            found = super().__getitem__(index)
            return found["key"], decode(found["image"], side)

    dataset = Lit(str(data), shuffle=True, drop_last=True)
    return litdata.StreamingDataLoader(dataset, batch_size=batch, **settings)


def speed(loader: Any, batch: int, epochs: int) -> float:
    """Images a second from the first batch of an epoch to its last, after an epoch to warm up."""
    for _ in loader:
        pass
    count, spent = 0, 0.0
    for _ in range(epochs):
        batches = iter(loader)
        next(batches)
        started = time.perf_counter()
        count += sum(1 for _ in batches)
        spent += time.perf_counter() - started
    return count * batch / spent


def resume(name: str, make: Callable[[], Any], skip: int) -> float:
    """Seconds from a saved state in the middle of an epoch to its next batch; a new loader, as after a restart."""
    loader = make()
    batches = iter(loader)
    for _ in range(skip):
        next(batches)
    state = None if name == "webdataset" else loader.state_dict()
    del batches, loader
    fresh = make()
    started = time.perf_counter()
    if state is None:  # it has no state: read again what was seen
        next(itertools.islice(iter(fresh), skip, None))
    else:
        fresh.load_state_dict(state)
        next(iter(fresh))
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["convert", "speed", "resume"])
    parser.add_argument("name", choices=["webdataset", "mosaicml-streaming", "litdata"])
    parser.add_argument("data", type=Path)
    parser.add_argument("--tars", type=Path)
    parser.add_argument("--decoder", choices=list(DECODERS), default="none")
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--skip", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "convert":
        {"mosaicml-streaming": convert_mosaic, "litdata": convert_litdata}[args.name](args.tars, args.data)
        return

    def make() -> Any:
        return loader_of(args.name, args.data, DECODERS[args.decoder], args.side, args.batch, args.workers)

    value = speed(make(), args.batch, args.epochs) if args.what == "speed" else resume(args.name, make, args.skip)
    print(json.dumps(value))


if __name__ == "__main__":
    main()
