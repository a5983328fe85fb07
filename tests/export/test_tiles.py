import dataclasses
import itertools

import numpy as np
import pytest
from fake_predictor import INFO, FakePredictor, image_of

from deeplab2_like.errors import UserError
from deeplab2_like.export.prediction import make_prediction
from deeplab2_like.export.tiles import Span, TiledPredictor, fit_label_divisor, split_axis

ROAD, CAR, PERSON, SKY, VOID = 0, 1, 2, 3, 9


def _tiled(classes: np.ndarray, *, tile: int, overlap: int):
    return TiledPredictor(FakePredictor(), tile=tile, overlap=overlap)(image_of(classes))


def _assert_untiled(classes: np.ndarray, *, tile: int, overlap: int) -> None:
    """The map, the areas and the boxes are those of the whole image."""
    found, expected = _tiled(classes, tile=tile, overlap=overlap), FakePredictor()(image_of(classes))
    np.testing.assert_array_equal(found.panoptic, expected.panoptic)
    assert found.panoptic.dtype == np.int32
    assert found.segments == expected.segments


def test_positions_of_tiles():
    assert list(split_axis(6, 8, 2)) == [Span(0, 6, 0, 0, is_last=True)]
    # 3 tiles of 8 pixels from 0, 6 and 12: neighbors share 2 pixels, and the seam is in the middle.
    assert list(split_axis(20, 8, 2)) == [
        Span(0, 8, 0, 0, is_last=False),
        Span(6, 14, 7, 8, is_last=False),
        Span(12, 20, 13, 14, is_last=True),
    ]
    # One pixel more than a tile: two tiles that share almost all.
    assert list(split_axis(9, 8, 2)) == [Span(0, 8, 0, 0, is_last=False), Span(1, 9, 4, 8, is_last=True)]
    for length in range(9, 60):
        spans = list(split_axis(length, 8, 3))
        assert spans[-1].stop == length
        assert all(one.stop - two.start >= 3 for one, two in itertools.pairwise(spans))


def test_an_object_across_two_tiles():
    classes = np.full((8, 20), ROAD)
    classes[2:5, 5:16] = CAR  # Longer than the overlap of 4, so no tile has it whole.
    _assert_untiled(classes, tile=12, overlap=4)


def test_an_object_across_four_tiles():
    classes = np.full((20, 20), ROAD)
    classes[6:14, 7:13] = PERSON
    classes[0:2, 0:2] = CAR
    classes[18:, 18:] = CAR
    _assert_untiled(classes, tile=12, overlap=4)


def test_stuff_across_tiles_is_one_segment_and_void_stays():
    classes = np.full((20, 20), ROAD)
    classes[:9] = SKY
    classes[:, 12:] = VOID
    _assert_untiled(classes, tile=8, overlap=2)
    found = _tiled(classes, tile=8, overlap=2)
    assert [segment.category_name for segment in found.segments] == ["road", "sky"]


def test_neighbors_that_touch_at_a_seam_stay_apart():
    classes = np.full((8, 20), ROAD)
    classes[2:5, 6:10] = CAR
    classes[2:5, 10:14] = PERSON
    _assert_untiled(classes, tile=12, overlap=4)


def test_an_object_that_one_tile_cuts_into_pieces_is_one():
    # A horseshoe, open to the right: the tile that ends in its middle sees two bars.
    classes = np.full((12, 30), ROAD)
    for flip in (False, True):
        part = np.full((12, 30), ROAD)
        part[3:9, 14:19] = CAR
        part[5:7, 14:17] = ROAD
        classes = part[:, ::-1] if flip else part
        _assert_untiled(classes, tile=20, overlap=10)


@pytest.mark.parametrize("seed", range(12))
def test_objects_smaller_than_the_overlap_are_as_in_the_whole_image(seed):
    random = np.random.default_rng(seed)
    height, width = random.integers(30, 90, 2)
    classes = np.full((height, width), VOID)
    classes[: height // 2] = SKY
    classes[height // 2 :, : width // 2] = ROAD
    for _ in range(60):
        # In boxes of at most 7 x 7 pixels, with random pixels missing, so that shapes are odd; and a pixel apart from
        # all others, so that an object is in its box.
        y, x = random.integers(0, height - 9), random.integers(0, width - 9)
        if np.isin(classes[y : y + 9, x : x + 9], (CAR, PERSON)).any():
            continue
        box = np.where(random.random((7, 7)) < 0.7, random.choice([CAR, PERSON]), VOID)
        classes[y + 1 : y + 8, x + 1 : x + 8] = box
    _assert_untiled(classes, tile=int(random.integers(16, 25)), overlap=8)


def test_a_larger_image_keeps_tiles_of_one_size_and_a_smaller_one_is_not_tiled():
    predictor = FakePredictor()
    tiled = TiledPredictor(predictor, tile=16, overlap=4)
    tiled(image_of(np.full((40, 20), ROAD)))
    assert predictor.sizes == [(16, 16)] * 6
    predictor.sizes.clear()
    tiled(image_of(np.full((10, 16), ROAD)))
    assert predictor.sizes == [(10, 16)]
    predictor.sizes.clear()
    tiled(image_of(np.full((10, 17), ROAD)))
    assert predictor.sizes == [(10, 16)] * 2


def test_scores_are_means_weighted_by_area():
    class Scored(FakePredictor):
        def __call__(self, image):
            prediction = super().__call__(image)
            # Tiles start at 0 and 8 of 20 columns; the second one has the sky, and another score for the car.
            score = 0.9 if (image[..., 0] == SKY).any() else 0.6
            return make_prediction(prediction.panoptic, dict.fromkeys(prediction.scores, score), INFO)

    classes = np.full((4, 20), ROAD)
    classes[:2, 2:16] = CAR
    classes[3, 19] = SKY
    found = TiledPredictor(Scored(), tile=12, overlap=4)(image_of(classes))
    (car,) = (segment for segment in found.segments if segment.category_name == "car")
    # 2 x 10 pixels in the first tile, 2 x 8 in the second one.
    assert car.score == pytest.approx((20 * 0.6 + 16 * 0.9) / 36)
    assert car.area == 28


def test_pieces_that_hardly_share_pixels_are_not_joined():
    # The second tile sees the car one row lower, where the strip of 4 x 4 pixels has 2 rows: 4 of 12 pixels shared.
    class Moved(FakePredictor):
        def __call__(self, image):
            classes = image[..., 0].copy()
            if (classes == SKY).any():
                classes[classes == CAR] = ROAD
                classes[3:5, 1:6] = CAR
            return super().__call__(image_of(classes))

    classes = np.full((12, 20), ROAD)
    classes[2:4, 6:11] = CAR
    classes[11, 19] = SKY
    found = TiledPredictor(Moved(), tile=12, overlap=4)(image_of(classes))
    assert [segment.category_name for segment in found.segments].count("car") == 2


def test_more_objects_than_the_label_divisor_allows():
    info = dataclasses.replace(INFO, label_divisor=5)
    classes = np.full((4, 40), ROAD)
    classes[1, ::3] = CAR  # 14 cars, 3 or 4 of them in a tile of 10 columns.
    found = TiledPredictor(FakePredictor(info), tile=10, overlap=2)(image_of(classes))
    assert sum(segment.is_thing for segment in found.segments) == 14
    assert found.dataset_info.label_divisor == 65536  # The largest one beside ignore label 255.
    assert found.dataset_info.categories == info.categories
    np.testing.assert_array_equal(found.to_semantic(), classes)
    assert found.segments[0].id == 1
    assert found.segments[1].id == 65536 + 1 + 1


def test_more_objects_than_ids():
    # With ignore label 4, which is the smallest, 24 bits hold (2^24 / 5) values per class; with 255, 2^16.
    assert fit_label_divisor(INFO, {CAR: 2**16}).ignore_label == 4
    with pytest.raises(
        UserError, match="has 5000000 objects of class 'car', but panoptic ids of 24 bits allow 3355442"
    ):
        fit_label_divisor(INFO, {PERSON: 3, CAR: 5_000_000})


@pytest.mark.parametrize(("tile", "overlap"), [(100, 51), (100, 128), (1, 1)])
def test_refuses_overlaps_of_more_than_half_a_tile(tile, overlap):
    with pytest.raises(
        UserError, match=rf"An overlap of {overlap} pixels does not fit tiles of {tile}; give an --over"
    ):
        TiledPredictor(FakePredictor(), tile=tile, overlap=overlap)


def test_without_overlap_tiles_are_only_laid_side_by_side():
    classes = np.full((4, 8), ROAD)
    classes[1, 2:6] = CAR
    found = _tiled(classes, tile=4, overlap=0)
    np.testing.assert_array_equal(found.to_semantic(), classes)
    assert [segment.area for segment in found.segments] == [28, 2, 2]
