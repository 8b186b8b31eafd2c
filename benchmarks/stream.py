"""The stream beside the loaders that people use: `python benchmarks/stream.py [--images 2048]`.

All on the same JPEGs (512 px, in tars of 128, page cache warm), in one run, with 1 and 2 workers: images/s with
decoding and resizing, images/s without, and the seconds to the first batch after a resume in the middle of an epoch.
The others live in an environment of their own, `out/peers`, made on the first run; each decodes with the faster of
Pillow and torchvision. The limit is a loop that only reads, decodes and resizes, in as many processes as there are
workers.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import webdataset
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from torchvision.io import ImageReadMode, decode_jpeg

from train.stream.dataset import Stream
from train.stream.loader import StreamLoader
from train.stream.tar_sample import RawSample, decode_image

HERE = Path(__file__).parent
PEERS = ("webdataset", "mosaicml-streaming", "litdata")
SIDES = (384, 256)
BATCH = 64
PER_SHARD = 128
WORKERS = (1, 2)
EPOCHS = 5  # where nothing is decoded one is too short to time
PATIENCE_S = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2048)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
    try:
        report = measure(folder, arguments.images)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(report))


def measure(folder: Path, images: int) -> dict[str, float]:
    """Prints a table for each question; returns the ratios that the README states."""
    python = peers_python()
    tars = folder / "tars"
    write_images(tars, images)
    data = {"webdataset": tars, **{name: folder / name for name in PEERS[1:]}}
    for name in PEERS[1:]:
        peer(python, "convert", name, data[name], "--tars", str(tars))
    show("decode, images/s, one core", decoder_speeds(tars))

    def ours(workers: int, transform: Any) -> StreamLoader:
        return StreamLoader(Stream(str(tars), BATCH, transform, cache=folder / "cache"), workers)

    sum(1 for _ in ours(1, None))  # the index, and a pass over the files
    report: dict[str, float] = {}
    for workers in WORKERS:
        for side in SIDES:
            speeds = {name: with_faster_decoder(python, name, data[name], side, workers) for name in PEERS}
            speeds["this"] = speed(ours(workers, Resized(side)))
            speeds["limit"] = limit(tars, side, workers)
            show(f"512 px to {side} px, {workers} workers, images/s", speeds)
            best = max(speeds[name] for name in PEERS)
            report[f"this / best other, to {side} px, {workers} workers"] = speeds["this"] / best
            report[f"this / limit, to {side} px, {workers} workers"] = speeds["this"] / speeds["limit"]
        epochs = ("--epochs", str(EPOCHS))
        speeds = {name: peer(python, "speed", name, data[name], *epochs, workers=workers) for name in PEERS}
        speeds["this"] = speed(ours(workers, None), EPOCHS)
        show(f"without decoding, {workers} workers, images/s", speeds)
        report[f"this / webdataset, without decoding, {workers} workers"] = speeds["this"] / speeds["webdataset"]
    skip = images // BATCH // 2
    seconds = {name: peer(python, "resume", name, data[name], "--skip", str(skip), workers=2) for name in PEERS}
    seconds["this"] = resume(lambda: ours(2, None), skip)
    show("first batch after a resume in the middle of an epoch, 2 workers, s", seconds)
    report["seconds to the first batch after a resume"] = seconds["this"]
    show("ratios", report)
    return report


def with_faster_decoder(python: Path, name: str, data: Path, side: int, workers: int) -> float:
    """Images/s of a peer that decodes and resizes."""
    sized = ("--side", str(side))
    decoders = ("pillow", "torchvision")
    return float(
        np.nanmax([peer(python, "speed", name, data, "--decoder", d, *sized, workers=workers) for d in decoders])
    )


class Resized:
    """Decoded, and resized to a square."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, raw: RawSample, rng: np.random.Generator) -> dict[str, NDArray[np.uint8]]:
        return {"image": resized(raw.image(self.side), self.side)}


def resized(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    if pixels.shape[:2] != (side, side):
        pixels = np.asarray(cv2.resize(pixels, (side, side), interpolation=cv2.INTER_AREA), np.uint8)
    return pixels.transpose(2, 0, 1)


def write_images(folder: Path, count: int) -> None:
    """Tars of JPEGs as large as photographs are: noise whose spectrum falls as theirs does, about 60 kB each."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(1024), np.fft.rfftfreq(1024), indexing="ij"))
    frequency[0, 0] = 1
    fields = []
    for _ in range(6):
        spectrum = np.fft.rfft2(rng.standard_normal((1024, 1024))) / frequency
        field = np.fft.irfft2(spectrum)
        fields.append(np.clip(128 + 60 * field / field.std(), 0, 255).astype(np.uint8))
    for shard in range(-(-count // PER_SHARD)):
        with webdataset.TarWriter(str(folder / f"images-{shard:04d}.tar")) as writer:
            for number in range(shard * PER_SHARD, min((shard + 1) * PER_SHARD, count)):
                chosen = rng.permutation(6)[:3]
                corners = rng.integers(0, 512, (3, 2))
                planes = [fields[f][y : y + 512, x : x + 512] for f, (y, x) in zip(chosen, corners, strict=True)]
                gray = planes[0].astype(np.float32)
                pixels = np.stack([0.7 * gray + 0.3 * p for p in planes], axis=-1).astype(np.uint8)
                sink = io.BytesIO()
                Image.fromarray(pixels).save(sink, "JPEG", quality=90)
                writer.write({"__key__": f"{number:06d}", "jpg": sink.getvalue()})


def decoder_speeds(tars: Path) -> dict[str, float]:
    """Images/s of each decoder that could be used, on one core: whole images and, where it can, at half their size."""
    stream = Stream(str(tars), 1, mode="evaluate", cache=tars.parent / "cache")
    images = [bytes(batch["members"][0]["jpg"]) for batch in itertools.islice(stream, 200)]
    torch.set_num_threads(1)
    cv2.setNumThreads(1)

    def drafted(data: bytes) -> Any:
        image = Image.open(io.BytesIO(data))
        image.draft("RGB", (256, 256))
        return np.asarray(image)

    flags = cv2.IMREAD_COLOR
    decoders: dict[str, Callable[[bytes], Any]] = {
        "Pillow": lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB")),
        "torchvision": lambda data: decode_jpeg(
            torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB
        ),
        "OpenCV": lambda data: cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), flags), cv2.COLOR_BGR2RGB),
        "simplejpeg": decode_image,
        "Pillow, half": drafted,
        "OpenCV, half": lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_REDUCED_COLOR_2),
        "simplejpeg, half": lambda data: decode_image(data, 256),
    }
    speeds = {}
    for name, decode in decoders.items():
        started = time.perf_counter()
        for data in images:
            decode(data)
        speeds[name] = len(images) / (time.perf_counter() - started)
    return speeds


def speed(loader: StreamLoader, epochs: int = 1) -> float:
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
    return count * BATCH / spent


def resume(make: Callable[[], StreamLoader], skip: int) -> float:
    loader = make()
    for _ in zip(range(skip), loader, strict=False):
        pass
    state = loader.state_dict()
    del loader
    fresh = make()
    started = time.perf_counter()
    fresh.load_state_dict(state)
    next(iter(fresh))
    return time.perf_counter() - started


def limit(tars: Path, side: int, workers: int) -> float:
    """Images a second of `workers` processes that read, decode and resize, and do nothing else."""
    stream = Stream(str(tars), 1, cache=tars.parent / "cache")
    index = stream.plan.indices[0]
    places = [(index.shards[shard].url, offset, size) for shard, offset, size in index.places(np.arange(len(index)))]
    context = multiprocessing.get_context("fork")
    with context.Pool(workers) as pool:
        pool.map(_decode_all, [(places[:64], side)] * workers)
        started = time.perf_counter()
        pool.map(_decode_all, [(places[w::workers], side) for w in range(workers)], chunksize=1)
        return len(places) / (time.perf_counter() - started)


def _decode_all(work: tuple[list[tuple[str, int, int]], int]) -> None:
    places, side = work
    cv2.setNumThreads(1)
    files: dict[str, int] = {}
    for path, offset, size in places:
        if path not in files:
            files[path] = os.open(path, os.O_RDONLY)
        data = os.pread(files[path], size, offset)
        resized(decode_image(data[data.index(b"\xff\xd8\xff") :], side), side)
    for descriptor in files.values():
        os.close(descriptor)


def peers_python() -> Path:
    """The interpreter of the other loaders' environment; made when it is not there."""
    folder = Path("out/peers")
    python = folder / "bin/python"
    if not (folder / "installed").exists():
        print(f"installing the other loaders into {folder} (once)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        requirements = HERE / "stream_peers.txt"
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "-r", str(requirements)], check=True)
        (folder / "installed").touch()
    return python


def peer(python: Path, what: str, name: str, data: Path, *more: str, workers: int = 1) -> float:
    """One measurement of another loader."""
    command = [str(python), str(HERE / "stream_peers.py"), what, name, str(data), "--workers", str(workers), *more]
    try:
        done = subprocess.run(
            [*command, "--batch", str(BATCH)], capture_output=True, text=True, check=False, timeout=PATIENCE_S
        )
    except subprocess.TimeoutExpired:
        print(f"{name}: no result after {PATIENCE_S} s: {' '.join(command)}", file=sys.stderr)
        return float("nan")
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr[-1000:]}")
    return 0.0 if what == "convert" else float(done.stdout.strip().splitlines()[-1])


def show(title: str, values: dict[str, float]) -> None:
    table = Table(title, "", box=None)
    for name, value in values.items():
        table.add_row(name, f"{value:.3g}" if value < 100 else f"{value:,.0f}")
    Console().print(table, "")


if __name__ == "__main__":
    main()
