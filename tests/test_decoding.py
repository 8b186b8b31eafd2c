"""Whatever the web sends becomes an upright RGB or gray JPEG, or a reason why not."""

from __future__ import annotations

import io
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from datapipe.decoding import decode_image, decode_rgb, normalize
from datapipe.image_file import ImageRefusedError
from datapipe.optional_formats import _jxl_codestream, _jxl_size
from datapipe.schema import Reason
from tests.color_profiles import DISPLAY_P3
from tests.conftest import jpeg

MAX_PIXELS = 100_000_000


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, format, **options)
    return sink.getvalue()


Color = float | tuple[float, ...]


def half_and_half(mode: str = "RGB", left: Color = (200, 30, 30), right: Color = (30, 30, 200)) -> Image.Image:
    """40 x 20 pixels, of two colors."""
    image = Image.new(mode, (40, 20), left)
    image.paste(right, (20, 0, 40, 20))
    return image


def test_an_upright_jpeg_keeps_its_own_bytes():
    for data in (jpeg(), encoded(half_and_half("L", 20, 200), "JPEG")):
        assert normalize(data, MAX_PIXELS).data == data


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_other_formats_are_stored_as_jpeg(format):
    image = normalize(encoded(half_and_half(), format), MAX_PIXELS)
    assert image.data.startswith(b"\xff\xd8")
    np.testing.assert_allclose(decode_rgb(image.data)[10, 5], (200, 30, 30), atol=12)
    assert decode_rgb(image.data).shape == (20, 40, 3)


def test_an_image_that_exif_turns_is_stored_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = normalize(encoded(half_and_half(), "JPEG", exif=exif), MAX_PIXELS)
    assert (image.original_width, image.original_height) == (20, 40)
    pixels = decode_rgb(image.data)
    assert pixels.shape == (40, 20, 3)
    np.testing.assert_allclose(pixels[5, 10], (200, 30, 30), atol=12)
    assert not Image.open(io.BytesIO(image.data)).getexif()


def test_cmyk_is_converted():
    data = encoded(half_and_half().convert("CMYK"), "JPEG")
    image = normalize(data, MAX_PIXELS)
    assert image.data != data
    np.testing.assert_allclose(decode_rgb(image.data)[10, 5], (200, 30, 30), atol=40)


def test_sixteen_bits_are_scaled_and_not_clipped():
    ramp = np.linspace(0, 65535, 800, dtype=np.uint16).reshape(20, 40)
    image = normalize(encoded(Image.fromarray(ramp), "PNG"), MAX_PIXELS)
    assert decode_rgb(image.data)[10, 20, 0] == pytest.approx(ramp[10, 20] / 257, abs=4)


def test_a_dark_image_of_sixteen_bits_stays_dark():
    image = normalize(encoded(Image.fromarray(np.full((20, 40), 250, np.uint16)), "PNG"), MAX_PIXELS)
    assert image.pixels.max() == 0


def test_transparent_pixels_become_white():
    see_through = half_and_half("RGBA", (200, 30, 30, 255), (0, 0, 0, 0))
    palette = see_through.convert("P")
    palette.info["transparency"] = palette.getpixel((39, 0))
    for data in (encoded(see_through, "PNG"), encoded(palette, "PNG", transparency=palette.getpixel((39, 0)))):
        assert decode_rgb(normalize(data, MAX_PIXELS).data)[10, 35].min() > 240


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (30, 30), color) for color in ((200, 30, 30), (30, 30, 200))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(decode_rgb(normalize(data, MAX_PIXELS).data)[10, 5], (200, 30, 30), atol=12)


@pytest.mark.parametrize(
    ("size", "longest", "stored"),
    [
        ((640, 480), None, (1066, 800)),
        ((480, 640), 3000, (800, 1066)),
        ((1200, 800), 3000, (1200, 800)),
        ((1600, 1600), 3000, (800, 800)),
        ((4000, 500), 3000, (3000, 375)),
    ],
)
def test_images_can_be_stored_at_one_shorter_side(size, longest, stored):
    data = encoded(Image.new("RGB", size, (90, 120, 60)), "JPEG")
    image = normalize(data, MAX_PIXELS, longest, short_side_px=800)
    assert Image.open(io.BytesIO(image.data)).size == stored == image.pixels.shape[1::-1]
    assert (image.original_width, image.original_height) == size
    assert (image.data == data) == (size == stored)


def test_a_larger_image_can_be_stored_smaller():
    image = normalize(jpeg(400, 200), MAX_PIXELS, max_side_px=100)
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
        normalize(data, MAX_PIXELS)
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
        normalize(png_that_claims(side, side), MAX_PIXELS)
    assert refused.value.reason is Reason.TOO_MANY_PIXELS
    assert not decoded


def test_the_limit_on_pixels_is_the_settings_and_not_pillows():
    with pytest.raises(ImageRefusedError) as refused:
        normalize(png_that_claims(10_000, 9_500), MAX_PIXELS)
    assert refused.value.reason is Reason.UNDECODABLE


def test_an_image_longer_than_a_jpeg_can_be_is_refused():
    data = encoded(Image.new("RGB", (70_000, 2)), "PNG")
    with pytest.raises(ImageRefusedError) as refused:
        normalize(data, MAX_PIXELS)
    assert refused.value.reason is Reason.TOO_MANY_PIXELS
    assert normalize(data, MAX_PIXELS, max_side_px=1000).pixels.shape == (1, 1000, 3)


@pytest.mark.parametrize("length", [12, 70_000])
def test_a_comment_is_not_carried_over(length):
    image = normalize(encoded(half_and_half(), "GIF", comment=b"c" * length), MAX_PIXELS)
    assert b"c" * 12 not in image.data


@pytest.mark.parametrize("orientation", [0, 1, 9])
def test_an_orientation_that_turns_nothing_leaves_the_bytes_as_they_are(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(half_and_half(), "JPEG", exif=exif)
    assert normalize(data, MAX_PIXELS).data == data


def turned_exif(entries: bytes = b"", count: int = 1) -> bytes:
    """EXIF that asks for a quarter turn, and further raw entries of 12 bytes."""
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHIHH", count, 0x0112, 3, 1, 6, 0) + entries + bytes(12)


def with_segment(data: bytes, content: bytes, marker: int = 0xE1) -> bytes:
    return data[:2] + struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content + data[2:]


def png_with(data: bytes, name: bytes, content: bytes, crc: int | None = None) -> bytes:
    """A PNG with one chunk more, after its header."""
    chunk = name + content
    return data[:33] + struct.pack(">I", len(content)) + chunk + struct.pack(">I", crc or zlib.crc32(chunk)) + data[33:]


RATIONAL_TOO_FAR = struct.pack("<HHII", 0x011A, 10, 1, 38)
TEXT_WHERE_A_NUMBER_BELONGS = struct.pack("<HHI4s", 0x0100, 2, 4, b"abc\0")
BROKEN_EXIF = {
    "a rational that lies outside": turned_exif(RATIONAL_TOO_FAR, 2),
    "text in place of a number": turned_exif(TEXT_WHERE_A_NUMBER_BELONGS, 2),
    "more entries announced than there are": turned_exif(count=900),
    "the prefix twice": b"Exif\0\0" + turned_exif(),
    "orientation as a long": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x04\0\0\0\x01\0\0\0\x06" + bytes(4),
}


@pytest.mark.parametrize("exif", BROKEN_EXIF.values(), ids=BROKEN_EXIF)
def test_exif_that_is_broken_elsewhere_still_turns_the_image(exif):
    data = with_segment(encoded(half_and_half(), "JPEG"), exif)
    image = normalize(data, MAX_PIXELS)
    assert image.pixels.shape == (40, 20, 3)
    np.testing.assert_array_equal(decode_image(data).shape, (40, 20, 3))
    np.testing.assert_allclose(image.pixels[5, 10], (200, 30, 30), atol=12)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0II", b"Exif\0\0XX*\0" + bytes(20), b"Exif\0\0II*\0\xff\xff\xff\xff", bytes(60)]
)
def test_exif_that_says_nothing_changes_nothing(exif):
    data = with_segment(encoded(half_and_half(), "JPEG"), exif)
    assert normalize(data, MAX_PIXELS).data == data
    assert decode_image(data).shape == (20, 40, 3)


def test_xmp_turns_an_image_that_has_no_exif():
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = with_segment(encoded(half_and_half(), "JPEG"), xmp)
    assert normalize(data, MAX_PIXELS).pixels.shape == decode_image(data).shape == (40, 20, 3)


PNG = encoded(half_and_half(), "PNG")
BROKEN_PNGS = {
    "exif that is none": png_with(PNG, b"eXIf", bytes(8)),
    "exif with a wrong checksum": png_with(PNG, b"eXIf", bytes(8), crc=1),
    "a profile that cannot be unpacked": png_with(PNG, b"iCCP", b"name\0\0not deflated"),
    "text that unpacks to gigabytes": png_with(PNG, b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8))),
    "no end": PNG[:-12],
}


@pytest.mark.parametrize("data", BROKEN_PNGS.values(), ids=BROKEN_PNGS)
def test_metadata_of_a_png_costs_no_image(data):
    np.testing.assert_array_equal(decode_image(data), np.asarray(half_and_half()))
    np.testing.assert_array_equal(normalize(data, MAX_PIXELS).pixels, np.asarray(half_and_half()))


@pytest.mark.parametrize("name", [b"eXIf", b"zTXt"])
def test_a_png_is_turned_by_its_exif(name):
    if name == b"eXIf":
        data = png_with(PNG, name, turned_exif()[6:])
    else:  # ImageMagick's way
        data = png_with(
            PNG, name, b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n46\n" + turned_exif().hex().encode())
        )
    assert decode_image(data).shape == normalize(data, MAX_PIXELS).pixels.shape == (40, 20, 3)


@pytest.mark.parametrize("format", ["TIFF", "WEBP", "AVIF"])
def test_every_format_is_turned_once(format):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(half_and_half(), format, exif=exif)
    image = normalize(data, MAX_PIXELS)
    assert image.pixels.shape == decode_image(data).shape == (40, 20, 3)
    np.testing.assert_allclose(image.pixels[5, 10], (200, 30, 30), atol=30)


@pytest.mark.parametrize("junk", [b"\r\n", b"\xef\xbb\xbf", bytes(64)])
def test_a_few_bytes_before_the_image_are_passed_over(junk):
    for data in (jpeg(), PNG):
        np.testing.assert_array_equal(decode_image(junk + data), decode_image(data))
    assert normalize(junk + jpeg(), MAX_PIXELS).data == jpeg(), "other readers are spared them, too"


def test_an_image_deep_in_something_else_is_not_taken_for_it():
    with pytest.raises(ImageRefusedError) as refused:
        normalize(b"8BPS" + bytes(100) + jpeg(), MAX_PIXELS)
    assert refused.value.reason is Reason.UNSUPPORTED_FORMAT


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("missing", [1, 2])
def test_a_jpeg_without_its_end_mark_is_whole(progressive, missing):
    whole = encoded(Image.open(io.BytesIO(jpeg(200, 150))), "JPEG", progressive=progressive)
    image = normalize(whole[:-missing], MAX_PIXELS)
    np.testing.assert_array_equal(image.pixels, normalize(whole, MAX_PIXELS).pixels)
    np.testing.assert_array_equal(decode_rgb(image.data), decode_rgb(whole))
    np.testing.assert_array_equal(decode_image(whole[:-missing]), image.pixels)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_of_a_truncated_image_the_rows_that_are_there_are_taken_when_asked_for(format, mode):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 90, 3), np.uint8)).convert(mode)
    whole = encoded(picture, format)
    data = whole[: int(len(whole) * 0.7)]
    with pytest.raises(ImageRefusedError, match=r"truncated: the last .*% of its rows") as refused:
        normalize(data, MAX_PIXELS)
    assert refused.value.reason is Reason.UNDECODABLE
    with pytest.raises(ImageRefusedError):
        normalize(data, MAX_PIXELS, max_missing=0.2)
    image = normalize(data, MAX_PIXELS, max_missing=0.4)
    assert 0.6 * 200 <= image.original_height < 0.75 * 200
    np.testing.assert_array_equal(image.pixels, normalize(whole, MAX_PIXELS).pixels[: image.original_height])
    assert decode_rgb(image.data).shape == image.pixels.shape


def test_a_truncated_progressive_jpeg_lacks_some_of_every_row():
    data = encoded(Image.open(io.BytesIO(jpeg(200, 150))), "JPEG", progressive=True)
    with pytest.raises(ImageRefusedError, match="truncated: all of its rows"):
        normalize(data[:-300], MAX_PIXELS, max_missing=0.9)


@pytest.mark.parametrize("format", ["WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_truncated_images_of_other_formats_are_refused(format):
    data = encoded(Image.open(io.BytesIO(jpeg(200, 150))), format)
    with pytest.raises(ImageRefusedError):
        normalize(data[: len(data) // 2], MAX_PIXELS, max_missing=0.1)


def test_cmyk_is_the_same_in_pipeline_and_stream():
    data = encoded(half_and_half().convert("CMYK"), "JPEG")
    np.testing.assert_array_equal(decode_image(data), normalize(data, MAX_PIXELS).pixels)


HEIC_BOX = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
JXL_START = b"\xff\x0a"


@pytest.mark.parametrize(("data", "extra"), [(HEIC_BOX, "heic"), (JXL_START, "jxl")])
def test_without_its_extra_a_format_is_refused_with_the_command_that_helps(data, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)
    with pytest.raises(ImageRefusedError, match=rf"pip install '\.\[{extra}\]'") as refused:
        normalize(data + bytes(100), MAX_PIXELS)
    assert refused.value.reason is Reason.UNSUPPORTED_FORMAT


@pytest.mark.parametrize(("format", "module"), [("HEIF", "pillow_heif"), ("JXL", "pillow_jxl")])
@pytest.mark.parametrize("orientation", [1, 6])
def test_heic_and_jpeg_xl_are_read_through_their_extras(format, module, orientation):
    plugin = pytest.importorskip(module)
    if format == "HEIF":
        plugin.register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = orientation
    large = half_and_half().resize((80, 40))
    data = encoded(large, format, quality=95, exif=exif.tobytes())
    image = normalize(data, MAX_PIXELS)
    np.testing.assert_array_equal(decode_image(data), image.pixels)
    # Both formats say by themselves how they are turned; what EXIF says beside it is not to be heeded.
    upright = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert image.pixels.shape == upright.shape
    np.testing.assert_allclose(image.pixels[5, 5], (200, 30, 30), atol=12)


def test_heic_of_a_phone_comes_out_in_srgb():
    plugin = pytest.importorskip("pillow_heif")
    plugin.register_heif_opener()
    data = encoded(half_and_half().resize((80, 40)), "HEIF", quality=95, icc_profile=DISPLAY_P3.icc())
    expected = DISPLAY_P3.in_srgb(np.array([[200, 30, 30]], np.uint8))[0]
    np.testing.assert_allclose(decode_image(data)[5, 5], expected, atol=12)


def test_a_jpeg_packed_as_jpeg_xl_is_read_like_the_jpeg(tmp_path):
    pytest.importorskip("pillow_jxl")
    exif = Image.Exif()
    exif[0x0112] = 6
    half_and_half().resize((80, 40)).save(tmp_path / "a.jpg", exif=exif, icc_profile=DISPLAY_P3.icc())
    Image.open(tmp_path / "a.jpg").save(tmp_path / "a.jxl", lossless_jpeg=True)
    packed, plain = (decode_image((tmp_path / name).read_bytes()) for name in ("a.jxl", "a.jpg"))
    assert packed.shape == plain.shape == (80, 40, 3)
    assert np.abs(packed.astype(int) - plain).mean() < 2


def test_a_decompression_bomb_in_jpeg_xl_is_refused_before_it_costs_memory(monkeypatch):
    plugin = pytest.importorskip("pillow_jxl")
    monkeypatch.setattr(plugin, "Decoder", None)
    monkeypatch.setattr("pillow_jxl.JpegXLImagePlugin.Decoder", None)
    size = 1 << 18
    # Not small; height in 30 bits; ratio 1:1.
    bits = 0 | 3 << 1 | (size - 1) << 3 | 1 << 33
    with pytest.raises(ImageRefusedError) as refused:
        normalize(JXL_START + bits.to_bytes(8, "little") + bytes(50), MAX_PIXELS)
    assert refused.value.reason is Reason.TOO_MANY_PIXELS


@pytest.mark.parametrize("size", [(8, 8), (64, 48), (256, 256), (300, 200), (1000, 3), (3, 1000), (640, 360)])
def test_the_size_of_a_jpeg_xl_is_read_from_its_header(size):
    pytest.importorskip("pillow_jxl")
    for container in (False, True):
        data = encoded(Image.new("RGB", size), "JXL", use_container=container)
        assert _jxl_size(_jxl_codestream(data)) == size


def test_what_only_looks_like_heic_or_jpeg_xl_is_refused():
    for data, module in ((HEIC_BOX, "pillow_heif"), (JXL_START, "pillow_jxl")):
        pytest.importorskip(module)
        with pytest.raises(ImageRefusedError):
            normalize(data + bytes(100), MAX_PIXELS)
