"""Whatever the web sends becomes an upright RGB or grey JPEG, or a reason why not."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from datapipe.images import ImageRefusedError, decode_rgb, normalise
from datapipe.schema import Reason
from tests.conftest import jpeg

MAX_PIXELS = 100_000_000


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, format, **options)
    return sink.getvalue()


def half_and_half(mode: str = "RGB", left: object = (200, 30, 30), right: object = (30, 30, 200)) -> Image.Image:
    """40 x 20 pixels, of two colours."""
    image = Image.new(mode, (40, 20), left)
    image.paste(right, (20, 0, 40, 20))
    return image


def test_an_upright_jpeg_keeps_its_own_bytes():
    for data in (jpeg(), encoded(half_and_half("L", 20, 200), "JPEG")):
        assert normalise(data, MAX_PIXELS).data == data


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_other_formats_are_stored_as_jpeg(format):
    image = normalise(encoded(half_and_half(), format), MAX_PIXELS)
    assert image.data.startswith(b"\xff\xd8")
    np.testing.assert_allclose(decode_rgb(image.data)[10, 5], (200, 30, 30), atol=12)
    assert decode_rgb(image.data).shape == (20, 40, 3)


def test_an_image_that_exif_turns_is_stored_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = normalise(encoded(half_and_half(), "JPEG", exif=exif), MAX_PIXELS)
    assert (image.original_width, image.original_height) == (20, 40)
    pixels = decode_rgb(image.data)
    assert pixels.shape == (40, 20, 3)
    np.testing.assert_allclose(pixels[5, 10], (200, 30, 30), atol=12)
    assert not Image.open(io.BytesIO(image.data)).getexif()


def test_cmyk_is_converted():
    data = encoded(half_and_half().convert("CMYK"), "JPEG")
    image = normalise(data, MAX_PIXELS)
    assert image.data != data
    np.testing.assert_allclose(decode_rgb(image.data)[10, 5], (200, 30, 30), atol=40)


def test_sixteen_bits_are_scaled_and_not_clipped():
    ramp = np.linspace(0, 65535, 800, dtype=np.uint16).reshape(20, 40)
    image = normalise(encoded(Image.fromarray(ramp), "PNG"), MAX_PIXELS)
    assert decode_rgb(image.data)[10, 20, 0] == pytest.approx(ramp[10, 20] / 257, abs=4)


def test_a_dark_image_of_sixteen_bits_stays_dark():
    image = normalise(encoded(Image.fromarray(np.full((20, 40), 250, np.uint16)), "PNG"), MAX_PIXELS)
    assert image.pixels.max() == 0


def test_transparent_pixels_become_white():
    see_through = half_and_half("RGBA", (200, 30, 30, 255), (0, 0, 0, 0))
    palette = see_through.convert("P")
    palette.info["transparency"] = palette.getpixel((39, 0))
    for data in (encoded(see_through, "PNG"), encoded(palette, "PNG", transparency=palette.getpixel((39, 0)))):
        assert decode_rgb(normalise(data, MAX_PIXELS).data)[10, 35].min() > 240


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (30, 30), color) for color in ((200, 30, 30), (30, 30, 200))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(decode_rgb(normalise(data, MAX_PIXELS).data)[10, 5], (200, 30, 30), atol=12)


def test_a_larger_image_can_be_stored_smaller():
    image = normalise(jpeg(400, 200), MAX_PIXELS, max_side_px=100)
    assert decode_rgb(image.data).shape == (50, 100, 3)
    assert (image.original_width, image.original_height) == (400, 200)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.UNDECODABLE),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", Reason.UNSUPPORTED_FORMAT),
        (b"<!doctype html><title>404</title>", Reason.UNSUPPORTED_FORMAT),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", Reason.UNSUPPORTED_FORMAT),
        (jpeg()[: len(jpeg()) // 2], Reason.UNDECODABLE),
        (jpeg()[:30] + bytes(300), Reason.UNSUPPORTED_FORMAT),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), Reason.UNSUPPORTED_FORMAT),
    ],
    ids=["empty", "svg", "html", "eps", "truncated", "broken jpeg header", "broken png header"],
)
def test_what_is_no_image_is_refused_with_a_reason(data, reason):
    with pytest.raises(ImageRefusedError) as refused:
        normalise(data, MAX_PIXELS)
    assert refused.value.reason is reason
    assert "\n" not in refused.value.detail


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes: its header, and pixels that end at once."""
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(1000))),
        (b"IEND", b""),
    )
    body = (struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


@pytest.mark.parametrize("side", [20_000, 13_000, 10_001])
def test_a_decompression_bomb_is_refused_before_it_costs_memory(side, monkeypatch):
    # Pillow's pixels lie outside of what Python can count, so that decoding itself is what is watched.
    decoded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(self))
    with pytest.raises(ImageRefusedError) as refused:
        normalise(png_that_claims(side, side), MAX_PIXELS)
    assert refused.value.reason is Reason.TOO_MANY_PIXELS
    assert not decoded


def test_the_limit_on_pixels_is_the_settings_and_not_pillows():
    with pytest.raises(ImageRefusedError) as refused:
        normalise(png_that_claims(10_000, 9_500), MAX_PIXELS)
    assert refused.value.reason is Reason.UNDECODABLE


def test_an_image_longer_than_a_jpeg_can_be_is_refused():
    data = encoded(Image.new("RGB", (70_000, 2)), "PNG")
    with pytest.raises(ImageRefusedError) as refused:
        normalise(data, MAX_PIXELS)
    assert refused.value.reason is Reason.TOO_MANY_PIXELS
    assert normalise(data, MAX_PIXELS, max_side_px=1000).pixels.shape == (1, 1000, 3)


@pytest.mark.parametrize("length", [12, 70_000])
def test_a_comment_is_not_carried_over(length):
    image = normalise(encoded(half_and_half(), "GIF", comment=b"c" * length), MAX_PIXELS)
    assert b"c" * 12 not in image.data


@pytest.mark.parametrize("orientation", [0, 1, 9])
def test_an_orientation_that_turns_nothing_leaves_the_bytes_as_they_are(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(half_and_half(), "JPEG", exif=exif)
    assert normalise(data, MAX_PIXELS).data == data
