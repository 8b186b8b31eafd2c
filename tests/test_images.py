"""Whatever the web sends becomes an upright RGB or grey JPEG, or a reason why not."""

from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image

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
        (jpeg()[:30] + bytes(300), Reason.UNDECODABLE),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), Reason.UNDECODABLE),
    ],
    ids=["empty", "svg", "html", "eps", "truncated", "garbage", "broken png"],
)
def test_what_is_no_image_is_refused_with_a_reason(data, reason):
    with pytest.raises(ImageRefusedError) as refused:
        normalise(data, MAX_PIXELS)
    assert refused.value.reason in (reason, Reason.UNSUPPORTED_FORMAT)
    assert "\n" not in refused.value.detail


def test_a_decompression_bomb_is_refused_before_it_costs_memory():
    data = encoded(Image.new("L", (20_000, 20_000)), "PNG")
    assert len(data) < 1_000_000
    tracemalloc.start()
    with pytest.raises(ImageRefusedError) as refused:
        normalise(data, MAX_PIXELS)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()
    assert refused.value.reason is Reason.TOO_MANY_PIXELS
