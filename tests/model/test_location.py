"""The location mask and its channel."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from model.location import LocationConv, cells_of_grid, cells_reached, location_mask

_SIDES = st.integers(1, 12)
_BOXES = st.lists(st.tuples(*[st.floats(0, 1, width=32)] * 4), min_size=1, max_size=3)


@given(_BOXES, _SIDES, _SIDES)
def test_a_latent_pixel_is_zero_exactly_where_its_centre_is_in_a_box(
    boxes: list[tuple[float, float, float, float]], height: int, width: int
) -> None:
    mask = location_mask(torch.tensor([boxes]), torch.ones(1, len(boxes), dtype=torch.bool), height, width)
    assert mask.shape == (1, 1, height, width)
    ys, xs = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
    for i, y in enumerate(ys):
        for j, x in enumerate(xs):
            inside = any(x1 <= x < x2 and y1 <= y < y2 for x1, y1, x2, y2 in torch.tensor(boxes))
            assert mask[0, 0, i, j] == (0 if inside else 1)


@given(_BOXES, _SIDES, _SIDES, st.sampled_from([1, 2, 4, 8]))
def test_a_subject_is_reached_from_what_its_box_touches_in_every_grid(
    boxes: list[tuple[float, float, float, float]], height: int, width: int, downsampling: int
) -> None:
    ordered = torch.tensor([[(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in boxes]])
    reached = cells_reached(ordered, torch.ones(1, len(boxes), dtype=torch.bool), height, width)
    for k, (x1, y1, x2, y2) in enumerate(ordered[0]):
        for i, j in itertools.product(range(height), range(width)):
            touched = bool(j < x2 * width and j + 1 > x1 * width and i < y2 * height and i + 1 > y1 * height)
            assert reached[0, k, i, j] == touched
    high, wide = math.ceil(height / downsampling), math.ceil(width / downsampling)
    grid = cells_of_grid(reached, downsampling).view(1, high, wide, len(boxes))
    for i, j in itertools.product(range(high), range(wide)):
        rows, columns = (slice(n * downsampling, (n + 1) * downsampling) for n in (i, j))
        assert torch.equal(grid[0, i, j], reached[0, :, rows, columns].flatten(1).any(dim=1))


def test_an_empty_slot_is_reached_from_everywhere() -> None:
    reached = cells_reached(torch.zeros(1, 2, 4), torch.tensor([[True, False]]), 4, 6)
    assert not reached[:, 0].any() and reached[:, 1].all()


def test_empty_slots_take_no_room() -> None:
    boxes, present = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]]), torch.zeros(1, 1, dtype=torch.bool)
    assert location_mask(boxes, present, 4, 6).min() == 1


def test_the_widened_convolution_is_one_over_five_channels() -> None:
    torch.manual_seed(0)
    conv = LocationConv.like(torch.nn.Conv2d(4, 8, 3, padding=1))
    torch.nn.init.normal_(conv.weight)
    latents, location = torch.randn(2, 4, 6, 5), torch.rand(2, 1, 6, 5)
    whole = torch.nn.functional.conv2d(torch.cat([latents, location], 1), conv.weight, conv.bias, padding=1)
    torch.testing.assert_close(conv(latents, location), whole)
