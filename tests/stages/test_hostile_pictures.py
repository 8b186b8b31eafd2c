"""Pictures from strangers: each has its verdict, in bounded time and memory, and what it tells of its owner can go."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from datapipe.decoding import decode_image, open_image
from datapipe.image_file import ImageRefusedError
from datapipe.metadata import jpeg_header, without_metadata
from datapipe.schema import Reason, Sample
from datapipe.stages.screen import ScreenSettings, perceptual_hash, white_share
from subject_diffusion.errors import RecipeError
from tests.conftest import jpeg

LIMIT_S = 5.0
"""Seconds of a core for one picture, on a slow machine."""


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, color: int, bits: int, *before: bytes) -> bytes:
    """A PNG of one gray line, again and again: a megabyte at most. `color`: PNG's number; `before`: chunks."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[color]
    line = b"\0" + b"\x55" * (width * channels * bits // 8)
    packer = zlib.compressobj(1)
    data = b"".join([*(packer.compress(line) for _ in range(height)), packer.flush()])
    head = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(before) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def claiming(width: int, height: int) -> bytes:
    """A small JPEG whose frame says it is of this size."""
    data = jpeg(800, 600)
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def with_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes so often."""
    sink = io.BytesIO()
    Image.open(io.BytesIO(jpeg(800, 600))).save(sink, "JPEG", progressive=True)
    data = sink.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + data[-2:]


def frames(kind: str, count: int) -> bytes:
    sink = io.BytesIO()
    first, *rest = (Image.new("RGB", (700, 600), (n % 200, 90, 40)) for n in range(count))
    first.save(sink, kind, save_all=True, append_images=rest)
    return sink.getvalue()


PICTURES: dict[str, tuple[Callable[[], bytes], Reason | None]] = {
    "RGBA of 100 megapixels": (lambda: png(10_000, 10_000, 6, 8), Reason.TOO_MANY_PIXELS),
    "RGBA of 16 bits and 40 megapixels": (lambda: png(8000, 5000, 6, 16), Reason.TOO_MANY_PIXELS),
    "RGB of 16 bits and 60 megapixels": (lambda: png(10_000, 6000, 2, 16), Reason.TOO_MANY_PIXELS),
    "gray of 400 megapixels": (lambda: png(20_000, 20_000, 0, 8), Reason.TOO_MANY_PIXELS),
    "PNG that claims 2^31 x 2^31": (
        lambda: png(1, 1, 2, 8).replace(struct.pack(">II", 1, 1), struct.pack(">II", 2**31 - 1, 2**31 - 1)),
        Reason.UNSUPPORTED_FORMAT,  # the checksum of its header is wrong
    ),
    "JPEG that claims 65,500 x 65,500": (lambda: claiming(65_500, 65_500), Reason.TOO_MANY_PIXELS),
    "JPEG that claims 10,000 x 10,000": (lambda: claiming(10_000, 10_000), None),  # libjpeg fills up what is missing
    "JPEG of 300 scans": (lambda: with_scans(300), Reason.TOO_MANY_SCANS),
    "JPEG of 60 scans": (lambda: with_scans(50), None),
    "GIF of 100 frames": (lambda: frames("GIF", 100), None),
    "WebP of 100 frames": (lambda: frames("WEBP", 100), None),
    "TIFF of 50 pages": (lambda: frames("TIFF", 50), None),
    "PNG with a text bomb": (
        lambda: png(700, 600, 2, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 28), 9))),
        None,
    ),
    "PNG with a profile bomb": (
        lambda: png(700, 600, 2, 8, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 28), 9))),
        None,
    ),
    "SVG": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg' width='900' height='900'/>", Reason.UNSUPPORTED_FORMAT),
    "EPS": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 900 900\n", Reason.UNSUPPORTED_FORMAT),
    "ZIP": (lambda: b"PK\x03\x04" + bytes(1000), Reason.UNSUPPORTED_FORMAT),
    "pickle": (lambda: b"cos\nsystem\n(S'false'\ntR.", Reason.UNSUPPORTED_FORMAT),
    "nothing": (lambda: b"", Reason.UNDECODABLE),
}


@pytest.mark.parametrize("case", PICTURES)
def test_a_hostile_picture_has_its_verdict_in_bounded_time(case: str) -> None:
    make, reason = PICTURES[case]
    data = make()
    stage = ScreenSettings().build()
    neighbor = Sample(row=1, image=jpeg(800, 600))
    started = time.process_time()
    screened, unharmed = stage([Sample(row=0, image=data), neighbor])
    assert time.process_time() - started < LIMIT_S
    assert (screened.verdict and screened.verdict.reason) == reason
    assert unharmed.verdict is None


@pytest.mark.parametrize("case", ["JPEG that claims 65,500 x 65,500", "JPEG of 300 scans", "RGBA of 100 megapixels"])
def test_the_stream_and_the_models_refuse_it_alike(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setattr("datapipe.decoding.MAX_PIXELS", 100_000_000)
    make, reason = PICTURES[case]
    for decode in (decode_image, open_image):
        with pytest.raises(ImageRefusedError) as refused:
            decode(make())
        assert refused.value.reason == reason


def photograph(width: int, height: int, **options: object) -> bytes:
    """Two thirds of it are sky that counts as white, above ground in blots."""
    blots = np.random.default_rng(0).integers(0, 200, (8, 12, 3), np.uint8)
    image = Image.new("RGB", (width, height), (250, 252, 255))
    image.paste(Image.fromarray(blots).resize((width, height // 3), Image.Resampling.BICUBIC), (0, height * 2 // 3))
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=90, **options)
    return sink.getvalue()


@pytest.mark.parametrize("progressive", [False, True])
def test_a_large_jpeg_that_is_kept_is_decoded_smaller_and_judged_alike(
    monkeypatch: pytest.MonkeyPatch, progressive: bool
) -> None:
    data = photograph(4300, 2100, progressive=progressive)
    small = ScreenSettings().normalize(data)
    monkeypatch.setattr("datapipe.image_file.SEEN_PX", 10_000)
    whole = ScreenSettings().normalize(data)
    assert small.data == whole.data == data
    assert (small.width, small.height, small.original_width) == (4300, 2100, 4300)
    assert (small.pixels.shape, whole.pixels.shape) == ((1050, 2150, 3), (2100, 4300, 3))
    assert (perceptual_hash(small.pixels) ^ perceptual_hash(whole.pixels)).bit_count() <= 1
    assert white_share(small.pixels, 0.9) == pytest.approx(white_share(whole.pixels, 0.9), abs=0.001)


@pytest.mark.parametrize("changes", [{"max_side_px": 4000}, {"short_side_px": 1200}])
def test_what_is_encoded_anew_is_made_of_all_pixels(monkeypatch: pytest.MonkeyPatch, changes: dict[str, int]) -> None:
    data = photograph(4300, 2100)
    stored = ScreenSettings(**changes).normalize(data)
    monkeypatch.setattr("datapipe.image_file.SEEN_PX", 10_000)
    assert stored.data == ScreenSettings(**changes).normalize(data).data
    assert stored.pixels.shape[:2] == (stored.height, stored.width)


def test_a_large_jpeg_that_ends_early_is_found_out() -> None:
    data = photograph(4300, 2100)
    (sample,) = ScreenSettings().build()([Sample(row=0, image=data[: len(data) // 2])])
    assert sample.verdict and sample.verdict.reason is Reason.UNDECODABLE


MEASURED = """
import sys
from datapipe.schema import Sample
from datapipe.stages.screen import ScreenSettings
from tests.conftest import jpeg

def status(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) << 10

data = sys.stdin.buffer.read()
stage = ScreenSettings(max_pixels=20_000_000).build()
stage([Sample(row=0, image=jpeg(800, 600))])
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
(sample,) = stage([Sample(row=0, image=data)])
assert sample.width, sample.verdict
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of memory is Linux's to tell")
@pytest.mark.parametrize("kind", ["JPEG", "RGBA", "gray"])
def test_screening_holds_at_most_eleven_bytes_per_pixel(kind: str) -> None:
    sink = io.BytesIO()
    Image.new("RGB", (5000, 4000), (40, 90, 140)).save(sink, "JPEG")
    data = {"JPEG": sink.getvalue(), "RGBA": png(5000, 2900, 6, 8), "gray": png(5000, 4000, 0, 8)}[kind]
    told = subprocess.run([sys.executable, "-c", MEASURED], input=data, capture_output=True, check=True)
    assert int(told.stdout) < 11 * 20_000_000 + (8 << 20)


def told_of() -> Iterator[bytes]:
    """A JPEG that tells who took it and where, in every way there is."""
    image = Image.open(io.BytesIO(jpeg(800, 600)))
    exif = Image.Exif()
    exif[0x013B] = "SECRET"
    exif.get_ifd(0x8825)[1] = "SECRET"
    xmp = b"<x:xmpmeta><exif:GPSLatitude>SECRET</exif:GPSLatitude></x:xmpmeta>"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for progressive in (False, True):
        sink = io.BytesIO()
        image.save(
            sink,
            "JPEG",
            exif=exif,
            xmp=xmp,
            comment=b"SECRET",
            icc_profile=profile,
            progressive=progressive,
            quality=90,
        )
        data = sink.getvalue()
        iptc = b"Photoshop 3.0\0SECRET"
        data = data[:2] + b"\xff\xed" + (len(iptc) + 2).to_bytes(2, "big") + iptc + data[2:]
        last = data.rindex(b"\xff\xda")
        if progressive:  # between two scans
            data = data[:last] + b"\xff\xfe\x00\x08SECRET" + data[last:]
        yield data + b"SECRET behind the end"


@pytest.mark.parametrize("data", list(told_of()), ids=["baseline", "progressive"])
def test_metadata_goes_and_pixels_and_colors_stay(data: bytes) -> None:
    assert data.count(b"SECRET") >= 6
    alone = without_metadata(data)
    assert b"SECRET" not in alone
    assert np.array_equal(decode_image(alone), decode_image(data))
    assert jpeg_header(alone).icc == jpeg_header(data).icc != b""
    kept, stripped = (
        ScreenSettings(strip_metadata=strip).build()([Sample(row=0, image=data)])[0] for strip in (False, True)
    )
    assert kept.image == data
    assert stripped.image == alone
    assert (kept.sha256, kept.phash) == (stripped.sha256, stripped.phash)  # of what was fetched


def test_adobe_rgb_that_only_exif_tells_of_stays() -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA001] = 2
    sink = io.BytesIO()
    Image.open(io.BytesIO(jpeg(800, 600))).save(sink, "JPEG", exif=exif)
    assert np.array_equal(decode_image(without_metadata(sink.getvalue())), decode_image(sink.getvalue()))


@pytest.mark.parametrize("change", [{"short_side_px": 300}, {}])
def test_what_is_encoded_anew_never_has_metadata(change: dict[str, int]) -> None:
    for data in told_of():
        if not change:
            sink = io.BytesIO()
            image = Image.open(io.BytesIO(data))
            image.save(sink, "PNG", exif=image.getexif(), icc_profile=image.info["icc_profile"])
            data = sink.getvalue()
        (sample,) = ScreenSettings(**change).build()([Sample(row=0, image=data)])
        assert sample.image is not None
        assert b"SECRET" not in sample.image
        header = jpeg_header(sample.image)
        assert (header.exif, header.xmp) == (b"", b"")


def test_images_on_a_blocklist_are_dropped_and_nothing_of_them_stays(tmp_path: Path) -> None:
    rows = [Sample(row=seed, image=jpeg(800, 600, seed)) for seed in range(3)]
    first, second, _ = ScreenSettings().build()(rows)
    assert second.phash is not None
    (tmp_path / "a.txt").write_text(f"# comment\n\n{first.sha256.upper()}  some-name.jpg\n")
    (tmp_path / "b.txt").write_text(f"{second.phash ^ 0b11:016x}\n")
    lists = (str(tmp_path / "a.txt"), str(tmp_path / "b.txt"))
    settings = ScreenSettings(hash_blocklist=lists)
    reasons = [s.verdict and s.verdict.reason for s in settings.build()(rows)]
    assert reasons == [Reason.BLOCKLISTED, Reason.BLOCKLISTED, None]
    assert all(s.picture is None for s in settings.build()(rows)[:2])
    exact = ScreenSettings(hash_blocklist=lists, near_duplicate_bits=None).build()(rows)
    assert [s.verdict is None for s in exact] == [False, True, True]
    before = settings.identity()
    (tmp_path / "b.txt").write_text(f"{perceptual_hash(decode_image(jpeg(800, 600, 2))):016x}\n")
    assert settings.identity() != before


@pytest.mark.parametrize(("content", "said"), [("abc\n", "line 1"), (None, "no such file")])
def test_a_blocklist_that_cannot_be_read_is_refused_before_the_run(
    tmp_path: Path, content: str | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "a.txt").write_text(content)
    with pytest.raises(RecipeError, match=said):
        ScreenSettings(hash_blocklist=(str(tmp_path / "a.txt"),)).check()
