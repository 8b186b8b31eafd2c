"""Folders of videos: frames at a spacing are rows that know their clip and time."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datapipe.decoding import JPEG_QUALITY
from datapipe.schema import MAX_PIXELS
from datapipe.sources.input_files import InputFile, explained, input_file_of, input_file_system, opened_as_it_is
from datapipe.sources.listing import is_hidden
from datapipe.sources.path_table import path_table
from datapipe.sources.row_index import FramePlace, InputRow, RowFacts
from datapipe.sources.scanning import shown
from datapipe.sources.settings import SourceSettings
from datapipe.sources.store_listing import files_below
from subject_diffusion._extras import help_for
from subject_diffusion.errors import SourceError, one_line

if TYPE_CHECKING:
    from av import VideoFrame, VideoStream
    from av.container import InputContainer

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp")
_OPTIONS = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,asf,ogg"}
"""Containers that hold their pictures themselves: a playlist under the name of a video could name any file or URL."""
_SEEK_AFTER_S = 10
"""Gaps up to this are decoded through, since keyframes may be this far apart."""
_MIB = 1 << 20
_JPEG_SIDE = 65_500
"""Pixels: the most that libjpeg writes."""


def video_files(root: str) -> Iterator[InputFile]:
    """Every video under a folder, in the order of its path parts; hidden files and folders are left out."""
    fs, inner = input_file_system(root)
    with explained(root), path_table() as table:
        found = shown(files_below(fs, inner, is_hidden), "files looked through")
        table.add(i["name"] for i in found if os.path.splitext(i["name"])[1].lower() in VIDEO_SUFFIXES)
        for path in table:
            file = input_file_of(fs, inner, fs.info(path))
            if file is not None:
                yield file


def rows_of_videos(root: str, settings: SourceSettings) -> Iterator[InputRow]:
    """A row for the first frame at or after each multiple of the spacing, by the frames' own times, from the clip's
    start; one lost row for a video that cannot be read. Packets are read, and none is decoded; what is held is the
    times of one clip. Its url is the video's path with the time, as media fragments have it: `a/b.mp4#t=2.5`."""
    for file in video_files(root):
        name = os.fsencode(file.name)
        shown_name = name.decode("utf-8", "replace")
        try:
            clip = f"{shown_name}#{_content(file)}"
            with _opened(file.url) as (container, stream):
                _square(stream.width, stream.height, stream)
                times = sorted(p.pts for p in container.demux(stream) if p.pts is not None and not p.is_discard)
                ticks, base = [pts - _start(stream) for pts in times], _base(stream)
        except SourceError as error:
            yield InputRow.lost(f"{shown_name}: no video that can be read ({error})")
            continue
        if not ticks:
            yield InputRow.lost(f"{shown_name}: a video without frames")
        for tick in _spaced(ticks, base, settings.frame_spacing_s):
            time_s = float(tick * base)
            facts = RowFacts(f"{shown_name}#t={time_s:.3f}", clip=clip, time_s=time_s)
            yield InputRow(facts, FramePlace(name, time_s))


def read_frames(url: str, times_s: Sequence[float]) -> Iterator[bytes | str]:
    """The frame at each time, ascending, as a JPEG, upright; or why it cannot be read."""
    done, problem = 0, "no such frame in it"
    for may_seek in (True, False):
        try:
            with _opened(url) as (container, stream):
                wanted = [_start(stream) + round(Fraction(time_s) / _base(stream)) for time_s in times_s[done:]]
                for frame in _frames_at(container, stream, wanted, may_seek):
                    yield _picture(frame, stream)
                    done += 1
            break
        except _AstrayError:
            continue
        except SourceError as error:
            problem = one_line(error)
            break
    yield from [problem] * (len(times_s) - done)


def _content(file: InputFile) -> str:
    """16 hex digits that tell a video from another one of its name, as cameras number theirs from 1: of the SHA-256 of
    its size, its first MiB and its last."""
    digest = hashlib.sha256(str(file.size).encode())
    with opened_as_it_is(file.url) as video:
        digest.update(video.read(_MIB))
        video.seek(max(file.size - _MIB, 0))
        digest.update(video.read(_MIB))
    return digest.hexdigest()[:16]


class _AstrayError(Exception):
    """Seeking landed after the frame that was wanted: in some containers it is a guess."""


@contextmanager
def _opened(url: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A video and its first stream of pictures. Raises SourceError for whatever its decoder objects to."""
    try:
        import av
    except ImportError as error:
        raise SourceError(help_for(error) or one_line(error)) from None
    with opened_as_it_is(url) as file:
        try:
            with av.open(file, "r", options=_OPTIONS, metadata_errors="replace") as container:
                if not container.streams.video or container.streams.video[0].codec_context is None:
                    raise SourceError("no stream of pictures that can be decoded")
                yield container, container.streams.video[0]
        except av.FFmpegError as error:
            raise SourceError(one_line(error.strerror or error)) from None
        except (SourceError, _AstrayError, OSError, MemoryError):
            raise
        except Exception as error:  # whatever it is, the file made the decoder raise it
            raise SourceError(f"{type(error).__name__}: {one_line(error)}") from None


def _frames_at(
    container: InputContainer, stream: VideoStream, wanted: Sequence[int], may_seek: bool
) -> Iterator[VideoFrame]:
    """The first frame at or after each presentation time, ascending; fewer where there are no more. Raises
    _AstrayError."""
    frames = container.decode(stream)
    frame, at = None, _start(stream)
    gap = _SEEK_AFTER_S / _base(stream)
    for pts in wanted:
        if may_seek and pts - at > gap:
            container.seek(pts, stream=stream)
            frames = container.decode(stream)
            frame = next(frames, None)
            if frame is None or frame.pts is None or frame.pts > pts:
                raise _AstrayError
        while frame is None or frame.pts is None or frame.pts < pts:
            frame = next(frames, None)
            if frame is None:
                return
        at = frame.pts
        yield frame


def _spaced(ticks: Sequence[int], base: Fraction, spacing_s: float) -> Iterator[int]:
    """The first of the ascending times, in units of `base` seconds, at or after each multiple of the spacing.
    Fractions, because a float is often just below the multiple that it stands for."""
    spacing, due = Fraction(str(spacing_s)) / base, 0
    for tick in ticks:
        if tick // spacing >= due:
            yield tick
            due = tick // spacing + 1


def _picture(frame: VideoFrame, stream: VideoStream) -> bytes | str:
    """As a JPEG, upright; or why it is none."""
    try:
        return _jpeg(_upright(frame, stream))
    except SourceError as error:
        return one_line(error)


def _upright(frame: VideoFrame, stream: VideoStream) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB, in square pixels, turned as the camera was held. Raises SourceError for a frame that is too
    large; frames may be of other sizes than the stream says."""
    width, height = _square(frame.width, frame.height, stream)
    pixels = frame.to_ndarray(format="rgb24", width=width, height=height)
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)), np.uint8)


def _square(width: int, height: int, stream: VideoStream) -> tuple[int, int]:
    """Width and height in square pixels. Raises SourceError for more than a picture may have."""
    width = max(1, round(width * (stream.sample_aspect_ratio or 1)))
    if width * height > MAX_PIXELS or max(width, height) > _JPEG_SIDE:
        raise SourceError(f"{width} x {height} pixels are too many")
    return width, height


def _jpeg(pixels: NDArray[np.uint8]) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "JPEG", quality=JPEG_QUALITY)
    return sink.getvalue()


def _base(stream: VideoStream) -> Fraction:
    return stream.time_base or Fraction(1, 1_000_000)


def _start(stream: VideoStream) -> int:
    return stream.start_time or 0
