"""What several tests need: samples as the stages would leave them, a dataset made by the real pipeline, commands."""

from __future__ import annotations

import io
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

# Models this small are slower with more threads, much slower where another process wants the same cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import boto3
import hypothesis
import numpy as np
import pytest
from filelock import FileLock
from moto.server import ThreadedMotoServer
from PIL import Image

from datapipe.schema import RLE, Entity, Rejection, Sample, Tag
from datapipe.shards import Provenance
from tests import commands
from tests.nodes import Nodes, two_nodes
from tests.toy import MADE_IMAGES, MADE_PORT, MADE_SELECT, PROJECT, Made, make
from toyworld.server import TRUTH, ToyWebSettings, web_folder

# Where the tests run in the background, Ctrl-C may be ignored, and the commands that they interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says nothing about whether it is right.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def jpeg(width: int = 48, height: int = 32, seed: int = 0) -> bytes:
    """A JPEG of smooth noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(sink, "JPEG")
    return sink.getvalue()


def rle(height: int, width: int, box: tuple[int, int, int, int]) -> RLE:
    """A mask that fills a box (x1, y1, x2, y2)."""
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[box[1] : box[3], box[0] : box[2]] = 1
    return RLE.of(mask)


def kept_sample(row: int) -> Sample:
    """A kept sample with one entity and one candidate that was refused."""
    entity = Entity("mug", (2, 5), (4.0, 4.0, 20.0, 24.0), 0.9, 0.8, rle(32, 48, (4, 4, 20, 24)), 0.95, 0.97)
    refused = Entity("mug", (2, 5), (0.0, 0.0, 2.0, 2.0), 0.3, 0.3, None, None, None, Rejection.AREA)
    return Sample(
        row=row,
        url=f"http://example.com/{row}.jpg",
        alt_text="ein Becher ☕",
        scores=(("punsafe", 0.01),),
        image=jpeg(seed=row),
        http_status=200,
        width=48,
        height=32,
        original_width=48,
        original_height=32,
        sha256="ab" * 32,
        phash=2**63 + row,
        caption="a mug",
        caption_model="toy@1",
        tags=(Tag("mug", (2, 5)),),
        candidates=(entity, refused),
    ).kept()


WHOLE_RUNS = (
    "test_run.py",
    "test_running.py",
    "test_resuming.py",
    "test_cluster.py",
    "test_demo.py",
    "test_before_the_run.py",
    "test_growing.py",
    "test_overlap.py",
    "test_trials.py",
    "test_stopping_early.py",
    "test_toy_world.py",
    "test_examples.py",
    "test_doctor.py",
    "test_custom.py",
    "test_watch.py",
    "test_photographs.py",
    "test_checkpoints.py",
)
"""The slowest files, slowest first. They come first, so that no process is left with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(WHOLE_RUNS)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture
def provenance() -> Provenance:
    return Provenance("recipe", "code", "input", {"caption": "toy@1"})


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """The address of a bucket in a real S3-speaking server on loopback."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Made:
    """Made once per session from the toy web, by whichever worker asks first, for all that looks into datasets."""
    root = tmp_path_factory.getbasetemp()
    folder = (root if worker_id == "master" else root.parent) / "made" / "toy"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            make(folder, MADE_SELECT)
    return Made(folder, web_folder(ToyWebSettings(images=MADE_IMAGES, port=MADE_PORT), PROJECT / "out") / TRUTH)


@pytest.fixture
def copied(made: Made, tmp_path: Path) -> Path:
    """The dataset, to be damaged."""
    return shutil.copytree(made.folder, tmp_path / "toy")


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    """A Ray cluster of two nodes, on this machine."""
    with two_nodes() as nodes:
        yield nodes


Sdd = Callable[..., tuple[int, str, str]]


@pytest.fixture
def sdd() -> Sdd:
    """A command, in this process: its exit code, standard output and standard error."""
    return commands.sdd


@pytest.fixture
def refused(sdd: Sdd) -> Callable[..., str]:
    """What a command says in one line when it cannot be done."""

    def command(*words: str | Path) -> str:
        code, _, error = sdd(*words)
        assert code == 2, error
        assert error.startswith("sdd: ")
        assert error.count("\n") == 1, error
        return error

    return command
