"""Color profiles as phones, cameras and editors embed them, and what their colors are in sRGB by plain arithmetic."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_SRGB = np.array(
    [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
)


def _srgb_to_linear(v: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


@dataclass(frozen=True)
class Profile:
    """A matrix and a curve. `matrix`: linear RGB to XYZ under D50; `gamma`: None for the curve of sRGB."""

    matrix: tuple[tuple[float, float, float], ...]
    gamma: float | None

    def icc(self) -> bytes:
        """An ICC profile of version 2.4."""
        columns = np.array(self.matrix).T
        curve = self._curve()
        tags = {
            b"desc": b"desc" + struct.pack(">4xI", 5) + b"test\0" + bytes(78),
            b"cprt": b"text" + bytes(4) + b"none\0",
            b"wtpt": _xyz((0.9642, 1.0, 0.8249)),
            **{name: _xyz(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True)},
            **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
        }
        return _profile(b"RGB ", tags)

    def _curve(self) -> bytes:
        if self.gamma is not None:
            return b"curv" + struct.pack(">4xIH", 1, round(self.gamma * 256))
        table = np.round(_srgb_to_linear(np.linspace(0, 1, 1024)) * 65535).astype(">u2")
        return b"curv" + struct.pack(">4xI", 1024) + table.tobytes()

    def in_srgb(self, rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
        """(…, 3) levels 0 to 255 of this profile -> levels of sRGB, those that it cannot show clipped."""
        share = rgb / 255
        linear = _srgb_to_linear(share) if self.gamma is None else share**self.gamma
        srgb = np.clip(linear @ np.array(self.matrix).T @ np.linalg.inv(_SRGB).T, 0, 1)
        return np.asarray(255 * np.where(srgb <= 0.0031308, 12.92 * srgb, 1.055 * srgb ** (1 / 2.4) - 0.055))


SRGB = Profile(tuple(map(tuple, _SRGB.tolist())), None)
DISPLAY_P3 = Profile(
    ((0.515102, 0.291965, 0.157153), (0.241182, 0.692236, 0.066582), (-0.001049, 0.041882, 0.784378)), None
)
ADOBE_RGB = Profile(
    ((0.609756, 0.205240, 0.149224), (0.311124, 0.625656, 0.063220), (0.019481, 0.060890, 0.744839)), 2.2
)
PROPHOTO = Profile(((0.797675, 0.135192, 0.031353), (0.288040, 0.711874, 0.000086), (0.0, 0.0, 0.825210)), 1.8)
WIDE = {"Display P3": DISPLAY_P3, "Adobe RGB": ADOBE_RGB, "ProPhoto": PROPHOTO}


def gray_icc(gamma: float) -> bytes:
    """A profile for images of one channel."""
    curve = b"curv" + struct.pack(">4xIH", 1, round(gamma * 256))
    tags = {b"desc": b"desc" + struct.pack(">4xI", 5) + b"gray\0" + bytes(78), b"wtpt": _xyz((0.9642, 1.0, 0.8249))}
    return _profile(b"GRAY", tags | {b"cprt": b"text" + bytes(4) + b"none\0", b"kTRC": curve})


def _xyz(value: object) -> bytes:
    return b"XYZ " + bytes(4) + np.round(np.array(value) * 65536).astype(">i4").tobytes()


def _profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    offset = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", offset + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    white = _xyz((0.9642, 1.0, 0.8249))[8:]
    header = struct.pack(">4xI4s4s4s", 0x02400000, b"mntr", space, b"XYZ ") + struct.pack(">6H", 2026, 1, 1, 0, 0, 0)
    header += b"acsp" + bytes(28) + white
    header += bytes(124 - len(header))
    return struct.pack(">I", offset + len(body)) + header + table + body
