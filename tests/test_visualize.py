"""Pictures: sizes, colors and unpainted areas."""

import colorsys

import numpy as np
import pytest

from deeplab2_like.data.dataset_info import Category, DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.visualize import (
    colorize_panoptic,
    contact_sheet,
    draw_legend,
    draw_overlay,
    side_by_side,
    stretch_contrast,
)

INFO = DatasetInfo(
    "toy",
    (
        Category(1, "cat", True, (200, 40, 40)),
        Category(2, "sky", False, (60, 120, 220)),
        Category(3, "sea", False, (0, 60, 90)),
    ),
    label_divisor=1000,
)
VOID = 255000


def test_colors_of_classes_instances_and_void():
    picture = colorize_panoptic(np.array([[1000, 1000, VOID], [0, 1, 2]]), INFO)
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture[0], [[60, 120, 220], [60, 120, 220], [0, 0, 0]])
    assert picture[1, 0].tolist() == [200, 40, 40]  # A crowd has the plain color of its class.
    with pytest.raises(UserError, match="panoptic map holds value 3000, which is class 3"):
        colorize_panoptic(np.array([[3000]]), INFO)
    assert colorize_panoptic(np.zeros((0, 4), np.int32), INFO).shape == (0, 4, 3)


def test_instances_differ_but_keep_the_hue_of_their_class():
    colors = colorize_panoptic(np.arange(1, 41)[None], INFO)[0].astype(int)
    # Neighbouring instances are well apart, all forty are distinct, none is as dark as void.
    assert (np.abs(np.diff(colors, axis=0)).max(axis=1) >= 20).all()
    assert len({tuple(color) for color in colors.tolist()}) == 40
    assert colors.max(axis=1).min() > 60
    for color in colors:
        hue = colorsys.rgb_to_hsv(*(color / 255))[0]
        assert min(hue, 1 - hue) < 0.09  # Red is hue 0 on a circle of length 1.


def test_overlay_marks_borders():
    panoptic = np.full((40, 40), 1000, np.int32)
    panoptic[:, 20:] = 2000
    panoptic[10:20, 5:15] = 1
    image = np.full((40, 40, 3), 128, np.uint8)
    original = image.copy()
    picture = draw_overlay(image, panoptic, INFO, labels=False)
    np.testing.assert_array_equal(image, original)
    assert picture[15, 4].tolist() == [255, 255, 255]  # Left of the cat.
    assert picture[19, 10].tolist() == [255, 255, 255]  # The cat's last row.
    assert picture[35, 19].max() < 40  # Between sky and sea.
    # 0.45 * 128 + 0.55 * (60, 120, 220) inside the sky.
    np.testing.assert_allclose(picture[35, 5], [90.6, 123.6, 178.6], atol=1)


def test_overlay_of_a_uniform_map_has_no_border():
    image = np.full((8, 8, 3), 100, np.uint8)
    picture = draw_overlay(image, np.full((8, 8), VOID), INFO)
    np.testing.assert_array_equal(picture, np.full((8, 8, 3), 45))


def test_names_are_written_on_large_segments_only():
    image = np.full((200, 300, 3), 100, np.uint8)
    panoptic = np.full((200, 300), 1000, np.int32)
    panoptic[5:10, 5:10] = 1
    plain, named = draw_overlay(image, panoptic, INFO, labels=False), draw_overlay(image, panoptic, INFO)
    changed = (plain != named).any(axis=-1)
    assert not changed[:20, :20].any()
    # One name, near the middle of the map: white letters on a darkened ground.
    rows, columns = np.nonzero(changed)
    assert 60 < rows.min() < rows.max() < 140
    assert columns.max() - columns.min() < 60
    assert named[changed].max() > 200


def test_tiny_maps_carry_no_name():
    image = np.full((6, 9, 3), 100, np.uint8)
    panoptic = np.full((6, 9), 1000, np.int32)
    np.testing.assert_array_equal(
        draw_overlay(image, panoptic, INFO), draw_overlay(image, panoptic, INFO, labels=False)
    )


def test_sizes_must_agree():
    with pytest.raises(UserError, match=r"image has shape \(4, 4, 3\) and type uint8, the panoptic map shape \(4, 5\)"):
        draw_overlay(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5), np.int32), INFO)
    with pytest.raises(UserError, match="type float32"):
        draw_overlay(np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.int32), INFO)


def test_side_by_side():
    image = np.full((250, 100, 3), 77, np.uint8)
    panoptic = np.full((250, 100), 1000, np.int32)
    # Three panels and four gaps of 6 pixels.
    picture = side_by_side(image, panoptic, panoptic, INFO, captions=False)
    assert picture.shape == (250 + 12, 300 + 24, 3)
    np.testing.assert_array_equal(picture[6:-6, 6:106], image)
    assert picture[-20, 130].tolist() != [77, 77, 77]
    captioned = side_by_side(image, panoptic, panoptic, INFO)
    assert captioned.shape[0] > picture.shape[0]
    np.testing.assert_array_equal(captioned[-256:-6, 6:106], image)
    # Without ground truth two panels are left; a small image is upsampled to 240 pixels or more, 50 by 5.
    assert side_by_side(image[:50], None, panoptic[:50], INFO, captions=False).shape == (250 + 12, 1000 + 18, 3)


def test_contact_sheet():
    images = [np.full((4, 6, 3), 10, np.uint8), np.full((2, 2, 3), 20, np.uint8), np.full((4, 4, 3), 30, np.uint8)]
    sheet = contact_sheet(images, columns=2, gap=1)
    # Rows of height 4 and 4, columns of width 6 and 2; the small picture is centered in its cell.
    assert sheet.shape == (11, 11, 3)
    assert (sheet[1:5, 1:7] == 10).all()
    assert (sheet[2:4, 8:10] == 20).all()
    assert (sheet[6:10, 2:6] == 30).all()
    assert sum((sheet == value).all(axis=-1).sum() for value in (10, 20, 30)) == 24 + 4 + 16
    assert contact_sheet(images[:1], columns=3, gap=0).shape == (4, 6, 3)
    with pytest.raises(UserError, match="at least one image"):
        contact_sheet([])


def test_dark_images_are_brightened_and_others_kept() -> None:
    dark = np.linspace(10, 60, 3000).astype(np.uint8).reshape(20, 50, 3)
    bright = stretch_contrast(dark)
    assert (bright.min(), bright.max()) == (0, 255)
    with_cells = np.full((20, 50, 3), 5, np.uint8)
    with_cells[:2, :10] = 120  # 2% of the values.
    assert stretch_contrast(with_cells).max() == 255
    for image in (np.full((4, 4, 3), 7, np.uint8), np.full((4, 4, 3), 200, np.uint8), dark * 4):
        assert stretch_contrast(image) is image


def test_legend_has_the_color_of_each_class() -> None:
    for width, rows in ((600, 1), (40, 3)):
        legend = draw_legend(INFO.categories, width)
        assert legend.shape == (22 * rows + 12, width, 3)
        for category in INFO.categories:
            # A square of 16 pixels.
            assert (legend == category.color).all(axis=-1).sum() == 16 * 16
