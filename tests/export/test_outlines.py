import itertools

import cv2
import numpy as np
import pytest

from deeplab2_like.export.outlines import find_outlines


def _mask(*rows: str) -> np.ndarray:
    return np.array([[letter == "#" for letter in row] for row in rows])


def _area(ring: list[tuple[int, int]]) -> float:
    """Twice the signed area: positive clockwise, as y points down."""
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in itertools.pairwise(ring)) / 2


def test_a_pixel():
    assert find_outlines(_mask("...", ".#.")) == [[[(1, 1), (2, 1), (2, 2), (1, 2), (1, 1)]]]


def test_an_l_has_six_corners():
    assert find_outlines(_mask("#.", "##")) == [[[(0, 0), (1, 0), (1, 1), (2, 1), (2, 2), (0, 2), (0, 0)]]]


def test_a_hole():
    outer, hole = find_outlines(_mask("###", "#.#", "###"))[0]
    assert outer == [(0, 0), (3, 0), (3, 3), (0, 3), (0, 0)]
    assert sorted(set(hole)) == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert (_area(outer), _area(hole)) == (9, -1)  # They run in opposite directions.


def test_pixels_that_touch_at_a_corner_are_two_polygons():
    for rows in (("#.", ".#"), (".#", "#.")):
        polygons = find_outlines(_mask(*rows))
        assert [len(polygon) for polygon in polygons] == [1, 1]
        assert [_area(polygon[0]) for polygon in polygons] == [1, 1]


def test_nothing_and_everything():
    assert find_outlines(np.zeros((3, 4), bool)) == []
    assert find_outlines(np.ones((3, 4), bool)) == [[[(0, 0), (4, 0), (4, 3), (0, 3), (0, 0)]]]


@pytest.mark.parametrize("seed", range(20))
def test_polygons_of_random_masks_hold_exactly_their_pixels(seed):
    random = np.random.default_rng(seed)
    mask = random.random(random.integers(1, 14, 2)) < random.choice([0.3, 0.5, 0.7, 0.9])
    polygons = find_outlines(mask)
    count, regions = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    assert len(polygons) == count - 1
    for polygon in polygons:
        assert all(ring[0] == ring[-1] for ring in polygon)
        assert all(_area(ring) > 0 for ring in polygon[:1])
        assert all(_area(ring) < 0 for ring in polygon[1:])
        # A pixel is inside if a ray from its center to the right crosses the rings an odd number of times.
        inside = np.zeros(mask.shape, bool)
        for ring in polygon:
            for (x0, y0), (x1, y1) in itertools.pairwise(ring):
                if x0 == x1:
                    inside[min(y0, y1) : max(y0, y1), :x0] ^= True
        assert len(np.unique(regions[inside])) == 1
        np.testing.assert_array_equal(inside, regions == regions[inside][0])
