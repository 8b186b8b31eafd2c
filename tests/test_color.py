"""Colors come out as sRGB, whatever profile an image was saved with."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms

from datapipe.color import to_srgb
from datapipe.decoding import decode_image, decode_rgb, normalize
from datapipe.metadata import profile_of_exif
from subject_diffusion.labeling import _encoded
from tests.color_profiles import ADOBE_RGB, DISPLAY_P3, PROPHOTO, SRGB, WIDE, Profile, gray_icc
from tests.test_decoding import MAX_PIXELS, encoded

COLORS = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)


def picture(size: tuple[int, int] = (6, 4)) -> Image.Image:
    return Image.fromarray(COLORS).resize(size, Image.Resampling.NEAREST)


@pytest.mark.parametrize("profile", WIDE.values(), ids=WIDE)
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_wide_gamut_pixels_become_srgb(profile: Profile, format: str):
    data = encoded(picture(), format, icc_profile=profile.icc(), **({"lossless": True} if format == "WEBP" else {}))
    expected = profile.in_srgb(COLORS)
    assert np.abs(expected - COLORS).mean() > 5, "else this proves nothing"
    np.testing.assert_allclose(decode_image(data), expected, atol=1)
    np.testing.assert_allclose(normalize(data, MAX_PIXELS).pixels, expected, atol=1)


@pytest.mark.parametrize("profile", WIDE.values(), ids=WIDE)
def test_a_stored_jpeg_keeps_bytes_and_profile_and_is_srgb_wherever_its_pixels_are_used(profile: Profile):
    data = encoded(picture((96, 64)), "JPEG", quality=100, subsampling=0, icc_profile=profile.icc())
    expected = profile.in_srgb(np.asarray(picture((96, 64))))
    image = normalize(data, MAX_PIXELS)
    assert image.data == data
    for pixels in (image.pixels, decode_rgb(data), decode_image(data), decode_image(memoryview(data))):
        assert np.abs(pixels - expected).mean() < 3
    half = decode_image(encoded(picture((960, 640)), "JPEG", quality=100, icc_profile=profile.icc()), 320)
    assert half.shape == (320, 480, 3)
    assert np.abs(half.mean((0, 1)) - expected.mean((0, 1))).max() < 3


def exif_of_camera(color_space: int | None, index: str | None) -> bytes:
    exif = Image.Exif()
    if color_space is not None:
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ColorSpace] = color_space
    if index is not None:
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.IFD.Interop] = {1: index}
    return exif.tobytes()


@pytest.mark.parametrize(
    ("color_space", "index", "is_adobe"),
    [
        (0xFFFF, "R03", True),
        (None, "R03", True),
        (2, None, True),
        (0xFFFF, None, False),
        (0xFFFF, "R98", False),
        (1, "R98", False),
        (1, "R03", False),
        (None, None, False),
    ],
)
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_adobe_rgb_that_exif_alone_tells_of_becomes_srgb(
    color_space: int | None, index: str | None, is_adobe: bool, format: str
):
    exif = exif_of_camera(color_space, index)
    options = {"quality": 100, "subsampling": 0} if format == "JPEG" else {}
    data = encoded(picture((96, 64)), format, exif=exif, **options)
    read_as = ADOBE_RGB if is_adobe else SRGB
    expected = read_as.in_srgb(np.asarray(picture((96, 64))))
    image = normalize(data, MAX_PIXELS)
    for pixels in (image.pixels, decode_image(data), decode_rgb(image.data)):
        assert np.abs(pixels - expected).mean() < 5
    profiled = encoded(picture((96, 64)), format, exif=exif, icc_profile=DISPLAY_P3.icc(), **options)
    expected = DISPLAY_P3.in_srgb(np.asarray(picture((96, 64))))
    assert np.abs(decode_image(profiled) - expected).mean() < 4, "a profile goes before EXIF"


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 200), st.binary(max_size=40))
def test_broken_exif_says_nothing_about_colors(at: int, noise: bytes):
    whole = exif_of_camera(0xFFFF, "R03")
    assert profile_of_exif(whole[:at] + noise + whole[at + len(noise) :]) in (b"", profile_of_exif(whole))


def test_a_tiff_in_lab_becomes_srgb():
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    plain = np.array([[[200, 60, 40], [30, 120, 220], [128, 128, 128], [255, 255, 255]]], np.uint8)
    lab = ImageCms.applyTransform(Image.fromarray(plain), to_lab)
    assert lab is not None
    np.testing.assert_allclose(decode_image(encoded(lab, "TIFF")), plain, atol=4)


def test_an_image_that_is_encoded_again_is_in_srgb():
    turned = Image.Exif()
    turned[0x0112] = 3
    data = encoded(picture((96, 64)), "JPEG", quality=100, icc_profile=DISPLAY_P3.icc(), exif=turned)
    image = normalize(data, MAX_PIXELS)
    assert "icc_profile" not in Image.open(io.BytesIO(image.data)).info
    expected = DISPLAY_P3.in_srgb(np.asarray(picture((96, 64)).rotate(180)))
    assert np.abs(decode_rgb(image.data) - expected).mean() < 8


def test_profiles_that_are_srgb_change_no_pixel():
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for icc in (SRGB.icc(), own, b""):
        assert to_srgb(picture(), icc).tobytes() == COLORS.tobytes()
        data = encoded(picture((96, 64)), "JPEG", icc_profile=icc)
        np.testing.assert_array_equal(decode_image(data), decode_image(encoded(picture((96, 64)), "JPEG")))


@pytest.mark.parametrize(
    "icc", [b"no profile", ADOBE_RGB.icc()[:200], bytes(4000), ADOBE_RGB.icc()[:132] + bytes(500)], ids=range(4)
)
def test_a_broken_profile_is_passed_over(icc: bytes):
    data = encoded(picture(), "PNG", icc_profile=icc)
    np.testing.assert_array_equal(decode_image(data), COLORS)
    np.testing.assert_array_equal(normalize(data, MAX_PIXELS).pixels, COLORS)
    assert decode_image(encoded(picture((96, 64)), "JPEG", icc_profile=icc)).shape == (64, 96, 3)


def test_gray_has_profiles_of_its_own_and_passes_over_those_of_color():
    gray = Image.fromarray(np.full((16, 16), 55, np.uint8))
    linear = 255 * (1.055 * (55 / 255) ** (1 / 2.4) - 0.055)
    for format in ("PNG", "JPEG"):
        found = decode_image(encoded(gray, format, icc_profile=gray_icc(1.0)))
        np.testing.assert_allclose(found, linear, atol=2)
        np.testing.assert_array_equal(decode_image(encoded(gray, format, icc_profile=PROPHOTO.icc())), 55)


def test_transparency_is_kept_apart_from_color():
    see_through = np.dstack([COLORS, np.where(np.arange(6) < 3, 255, 0)[None].repeat(4, 0)]).astype(np.uint8)
    found = decode_image(encoded(Image.fromarray(see_through), "PNG", icc_profile=DISPLAY_P3.icc()))
    np.testing.assert_allclose(found[:, :3], DISPLAY_P3.in_srgb(COLORS[:, :3]), atol=1)
    assert found[:, 3:].min() == 255


def test_a_profile_in_several_segments_of_a_jpeg_is_put_together():
    # As long as the tables of a scanner's profile: more than a segment holds.
    icc = DISPLAY_P3.icc()
    long = (len(icc) + 100_000).to_bytes(4, "big") + icc[4:] + bytes(100_000)
    data = encoded(picture((96, 64)), "JPEG", quality=100, subsampling=0, icc_profile=long)
    assert data.count(b"ICC_PROFILE\0") == 2
    expected = DISPLAY_P3.in_srgb(np.asarray(picture((96, 64))))
    assert np.abs(decode_image(data) - expected).mean() < 3


@pytest.mark.parametrize("mode", ["RGB", "HSV"])
def test_an_image_from_pillow_keeps_its_colors(mode: str):
    image = Image.open(io.BytesIO(encoded(picture(), "PNG", icc_profile=DISPLAY_P3.icc())))
    data, _ = _encoded(image if mode == "RGB" else image.convert(mode))
    expected = DISPLAY_P3.in_srgb(COLORS) if mode == "RGB" else COLORS
    np.testing.assert_allclose(decode_image(data), expected, atol=5)
