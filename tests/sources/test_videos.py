"""Frames of videos become rows that know their clip and time."""

from __future__ import annotations

import dataclasses
import io
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from datapipe.growing import _facts_of_rows, _first_unlike
from datapipe.plan import Part
from datapipe.schema import Sample, Slice, current, from_json, from_table, to_json
from datapipe.shards import Provenance, Store, write_shard
from datapipe.sources import InputRows, SourceSettings, open_source
from datapipe.sources.row_index import FramePlace
from datapipe.sources.videos import _spaced
from subject_diffusion.errors import SourceError
from tests.conftest import kept_sample

FPS = 25


def write_video(path: Path, frames: int = 60, gop: int = 12, title: str = "", aspect: int = 1) -> Path:
    """The nth frame tells n by its six columns, which are white for a one. aspect: of its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        codec = {".webm": "libvpx-vp9", ".avi": "mpeg4"}.get(path.suffix, "libx264")
        stream = container.add_stream(codec, rate=FPS)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 96, 48, "yuv420p", gop
        stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        container.metadata["title"] = title
        for number in range(frames):
            bits = [255 * (number >> bit & 1) for bit in range(6)]
            pixels = np.broadcast_to(np.repeat(bits, 16)[None, :, None], (48, 96, 3)).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., InputRows]:
    def open_videos(folder: Path, **settings: object) -> InputRows:
        return open_source(
            SourceSettings.model_validate({"kind": "video", "path": str(folder), **settings}), str(tmp_path / "scratch")
        )

    return open_videos


def number_of(sample: Sample) -> int:
    assert sample.image is not None
    pixels = np.asarray(Image.open(io.BytesIO(sample.image)))
    assert pixels.shape == (48, 96, 3)
    return sum((pixels[20:28, 16 * bit + 4 : 16 * bit + 12].mean() > 127) << bit for bit in range(6))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".ts", ".webm"])
def test_frames_at_a_spacing_know_their_clip_and_time(opened, tmp_path, suffix):
    write_video(tmp_path / "videos" / "b" / f"walk{suffix}")
    write_video(tmp_path / "videos" / f"a{suffix}", frames=5)
    rows = opened(tmp_path / "videos", frame_spacing_s=0.5)
    assert rows.rows == 1 + 5
    first, *others = rows.read(0, rows.rows)
    assert (first.clip[:-16], first.time_s) == (f"a{suffix}#", 0)
    assert {s.clip[:-16] for s in others} == {f"b/walk{suffix}#"}
    # The first frame at or after each half second, of 40 ms each.
    assert [s.time_s for s in others] == pytest.approx([0, 0.52, 1, 1.52, 2], abs=2e-3)
    assert [number_of(s) for s in others] == [0, 13, 25, 38, 50]
    assert others[1].url == f"b/walk{suffix}#t={others[1].time_s:.3f}"


@pytest.mark.parametrize("suffix", [".mp4", ".ts"])
def test_a_frame_is_the_same_whichever_slice_it_is_read_in(opened, tmp_path, monkeypatch, suffix):
    monkeypatch.setattr("datapipe.sources.videos._SEEK_AFTER_S", 0.3)
    write_video(tmp_path / "videos" / f"walk{suffix}")
    rows = opened(tmp_path / "videos", frame_spacing_s=0.2)
    together = rows.read(0, rows.rows)
    assert together == [sample for n in range(rows.rows) for sample in rows.read(n, n + 1)]
    again = rows.only([3, 6, 9], str(tmp_path / "scratch")).read(0, 3)
    assert [s.image for s in again] == [together[n].image for n in (3, 6, 9)]


def test_a_spacing_below_the_frames_own_takes_each_frame_once(opened, tmp_path):
    write_video(tmp_path / "videos" / "walk.mp4", frames=10)
    rows = opened(tmp_path / "videos", frame_spacing_s=0.001)
    assert [number_of(s) for s in rows.read(0, rows.rows)] == list(range(10))


@pytest.mark.parametrize(("fps", "spacing_s", "every"), [(25, 0.2, 5), (30, 0.1, 3), (30, 0.3, 9)])
@pytest.mark.parametrize("base", [Fraction(1, 1000), Fraction(1, 15_360), Fraction(1, 90_000)])
def test_a_spacing_of_whole_frames_takes_every_so_many(fps, spacing_s, every, base):
    ticks = [round(number / (fps * base)) for number in range(60 * fps)]
    assert list(_spaced(ticks, base, spacing_s)) == ticks[::every]


def test_a_title_need_not_be_utf_8(opened, tmp_path):
    path = write_video(tmp_path / "videos" / "walk.mkv", frames=2, title="Jose")
    path.write_bytes(path.read_bytes().replace(b"Jose", "José".encode("latin-1")))
    assert number_of(opened(tmp_path / "videos").read(0, 1)[0]) == 0


def test_whatever_a_decoder_raises_costs_its_own_video(opened, tmp_path, monkeypatch):
    write_video(tmp_path / "videos" / "a.mp4", frames=2)
    write_video(tmp_path / "videos" / "b.mp4", frames=2)
    seen = []

    def once(width: int, height: int, stream: object) -> tuple[int, int]:
        seen.append(stream)
        if len(seen) == 1:
            raise ValueError("not a size")
        return width, height

    monkeypatch.setattr("datapipe.sources.videos._square", once)
    lost, read = opened(tmp_path / "videos").read(0, 2)
    assert lost.verdict.detail == "a.mp4: no video that can be read (ValueError: not a size)"
    assert number_of(read) == 0


def test_a_frame_that_is_too_large_in_square_pixels_costs_its_own_row(opened, tmp_path, monkeypatch):
    monkeypatch.setattr("datapipe.sources.videos.MAX_PIXELS", 96 * 48)
    write_video(tmp_path / "wide" / "walk.mkv", frames=2, aspect=2)
    with pytest.raises(SourceError, match=r"walk\.mkv: no video that can be read \(192 x 48 pixels are too many\)"):
        opened(tmp_path / "wide")
    write_video(tmp_path / "videos" / "walk.mkv", frames=2)
    rows = opened(tmp_path / "videos", frame_spacing_s=0.04)
    monkeypatch.setattr("datapipe.sources.videos._JPEG_SIDE", 95)
    assert [s.verdict.detail for s in rows.read(0, 2) if s.verdict] == ["96 x 48 pixels are too many"] * 2


def test_a_frame_is_upright_as_the_camera_was_held(opened, tmp_path):
    path = write_video(tmp_path / "videos" / "walk.mp4", frames=2)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # of the track's header: a quarter turn clockwise, in 16.16 and 2.30 bits
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    rows = opened(tmp_path / "videos", frame_spacing_s=0.04)
    image = rows.read(1, 2)[0].image
    assert image is not None
    pixels = np.asarray(Image.open(io.BytesIO(image)))
    assert pixels.shape == (96, 48, 3)
    assert pixels[4:12].mean() > 200 and pixels[20:].mean() < 20, "the first column is the top"


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n"


def test_what_is_no_video_costs_its_own_row(opened, tmp_path):
    videos = tmp_path / "videos"
    good = write_video(videos / "good.mp4", frames=5)
    (videos / "cut.mp4").write_bytes(good.read_bytes()[:600])
    (videos / "list.mp4").write_text(PLAYLIST.format(good))
    (videos / "text.mkv").write_text("no video")
    (videos / ".hidden.mp4").write_bytes(good.read_bytes())
    rows = opened(videos)
    assert rows.rows == 4
    by_url = rows.read(0, 4)
    assert [s.clip[:-16] for s in by_url if s.verdict is None] == ["good.mp4#"]
    details = [s.verdict.detail for s in by_url if s.verdict is not None]
    assert [detail.partition(":")[0] for detail in details] == ["cut.mp4", "list.mp4", "text.mkv"]
    assert str(tmp_path) not in "".join(details)


def test_videos_of_the_same_name_are_told_apart_by_their_content(opened, tmp_path, provenance: Provenance):
    first = opened(write_video(tmp_path / "monday" / "GX01.mp4", frames=30).parent)
    other = opened(write_video(tmp_path / "tuesday" / "GX01.mp4", frames=31).parent)
    before, after = first.read(0, 2), other.read(0, 2)
    assert [s.url for s in before] == [s.url for s in after]
    assert {s.clip for s in before}.isdisjoint(s.clip for s in after)
    store = Store(str(tmp_path / "out"))
    write_shard(store, "raw", Slice(0, tuple(s.replace(width=96, height=48) for s in before)), provenance)
    part = Part(2, "before")
    assert _first_unlike(first, part, 0, _facts_of_rows(store, range(1))) is None
    assert _first_unlike(other, part, 0, _facts_of_rows(store, range(1))) == 0


def test_a_video_that_is_gone_or_shorter_fails_the_rows_that_it_lacks(opened, tmp_path):
    path = write_video(tmp_path / "videos" / "walk.mp4")
    rows = opened(tmp_path / "videos")
    write_video(path, frames=30)
    samples = rows.read(0, rows.rows)
    assert [s.verdict is None for s in samples] == [True, True, False]
    assert "no such frame" in samples[2].verdict.detail
    path.unlink()
    assert all(s.verdict is not None for s in rows.read(0, rows.rows))


def test_what_holds_no_videos_is_refused_in_one_line(opened, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(SourceError, match="no videos in this folder"):
        opened(tmp_path / "none")
    with pytest.raises(SourceError, match=r"source\.kind is video, and this is no folder"):
        opened(write_video(tmp_path / "walk.mp4", frames=2))
    (tmp_path / "none" / "a.mp4").write_text("no video")
    with pytest.raises(SourceError, match=r"a\.mp4: no video that can be read"):
        opened(tmp_path / "none")


def test_clip_and_time_are_in_the_shard_and_absent_for_other_images(tmp_path, provenance: Provenance):
    frame = kept_sample(0).replace(clip="b/walk.mp4", time_s=2.5)
    write_shard(Store(str(tmp_path)), "shard", Slice(0, (frame, kept_sample(1))), provenance)
    table = pq.read_table(tmp_path / "shard-000000.parquet")
    assert table.select(["clip", "time_s"]).to_pylist() == [
        {"clip": "b/walk.mp4", "time_s": 2.5},
        {"clip": None, "time_s": None},
    ]
    text = to_json(frame)
    assert (from_json(text).clip, from_json(text).time_s) == ("b/walk.mp4", 2.5)
    assert b"clip" not in to_json(kept_sample(1))
    before = table.drop_columns(["clip", "time_s"])
    assert [dataclasses.replace(s, clip=None, time_s=None) for s in from_table(table)] == from_table(current(before))


def test_a_row_keeps_its_frame_in_the_index(opened, tmp_path):
    write_video(tmp_path / "videos" / "walk.mp4", frames=30)
    rows = opened(tmp_path / "videos")
    places = [row.image for row in rows._rows(0, rows.rows)]
    assert places == [FramePlace(b"walk.mp4", 0.0), FramePlace(b"walk.mp4", 1.0)]
