"""Tests of the procedural data set: its labels must be valid, its scenes hard in the way they are meant to be."""

import importlib.util
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest

from deeplab2_like.data.scenes import render_scene, scenes_info
from deeplab2_like.errors import UserError

INFO = scenes_info()
HEIGHT, WIDTH = 96, 192
NUM_SCENES = 60


@pytest.fixture(scope="module")
def scenes() -> list[tuple[np.ndarray, np.ndarray]]:
    return [render_scene(index, height=HEIGHT, width=WIDTH) for index in range(NUM_SCENES)]


def instances_by_class(panoptic: np.ndarray) -> dict[int, list[int]]:
    """Class id -> ascending instance ids, without crowds, stuff and void."""
    found: dict[int, list[int]] = {}
    for value in np.unique(panoptic[panoptic != INFO.void]).tolist():
        if value % INFO.label_divisor:
            found.setdefault(value // INFO.label_divisor, []).append(value % INFO.label_divisor)
    return found


def has_crowd(panoptic: np.ndarray) -> bool:
    return bool(np.isin(panoptic, [class_id * INFO.label_divisor for class_id in INFO.thing_classes]).any())


def has_touching_instances(panoptic: np.ndarray) -> bool:
    """Whether two neighboring pixels belong to different instances of one thing class."""
    for a, b in ((panoptic[:, 1:], panoptic[:, :-1]), (panoptic[1:], panoptic[:-1])):
        same_class = a // INFO.label_divisor == b // INFO.label_divisor
        both_instances = (a % INFO.label_divisor > 0) & (b % INFO.label_divisor > 0)
        if (same_class & both_instances & (a != b)).any():
            return True
    return False


def test_info_has_enough_classes_and_ids_that_are_not_class_ids() -> None:
    assert len(INFO.stuff_classes) >= 4
    assert len(INFO.thing_classes) >= 4
    ids = [category.id for category in INFO.categories]
    assert all(category_id != class_id for class_id, category_id in enumerate(ids))
    assert ids != list(range(ids[0], ids[0] + len(ids)))
    assert len({category.color for category in INFO.categories}) == INFO.num_classes


def test_same_arguments_give_the_same_scene() -> None:
    for first, second in zip(
        render_scene(7, height=80, width=160, seed=3), render_scene(7, height=80, width=160, seed=3), strict=True
    ):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(("index", "seed"), [(8, 3), (7, 4), (3, 7), (1_000_007, 3)])
def test_another_index_or_seed_gives_another_scene(index: int, seed: int) -> None:
    image, panoptic = render_scene(7, height=80, width=160, seed=3)
    other_image, other_panoptic = render_scene(index, height=80, width=160, seed=seed)
    assert (image != other_image).mean() > 0.5
    assert (panoptic != other_panoptic).mean() > 0.1


@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 32), (37, 53), (53, 37), (128, 256), (240, 200)])
def test_any_size_gives_valid_labels(height: int, width: int) -> None:
    for index in range(5):
        image, panoptic = render_scene(index, height=height, width=width)
        assert image.shape == (height, width, 3)
        assert image.dtype == np.uint8
        assert panoptic.shape == (height, width)
        assert panoptic.dtype == np.int32
        class_map = panoptic // INFO.label_divisor
        assert np.isin(class_map, [*range(INFO.num_classes), INFO.ignore_label]).all()
        assert (panoptic[class_map == INFO.ignore_label] == INFO.void).all()
        for class_id, instances in instances_by_class(panoptic).items():
            assert INFO.categories[class_id].is_thing
            assert instances == list(range(1, len(instances) + 1))
            for instance in instances:
                assert (panoptic == class_id * INFO.label_divisor + instance).sum() >= 4


def test_an_index_shows_the_same_scene_at_every_size() -> None:
    for index in range(4):
        _, small = render_scene(index, height=64, width=128)
        _, large = render_scene(index, height=256, width=512)
        large_classes = (large // INFO.label_divisor)[2::4, 2::4]  # [64, 128]
        # Only pixels at borders, and the few objects too small for the small size, may differ.
        assert (small // INFO.label_divisor == large_classes).mean() > 0.93


def test_every_class_appears_and_every_stuff_class_often(scenes: list[tuple[np.ndarray, np.ndarray]]) -> None:
    shows = np.array(
        [[(panoptic // INFO.label_divisor == c).any() for c in range(INFO.num_classes)] for _, panoptic in scenes]
    )
    assert (shows.mean(axis=0)[list(INFO.stuff_classes)] > 0.9).all()
    assert (shows.mean(axis=0)[list(INFO.thing_classes)] > 0.4).all()


def test_scenes_hold_a_handful_of_things_small_and_large(scenes: list[tuple[np.ndarray, np.ndarray]]) -> None:
    counts = [sum(map(len, instances_by_class(panoptic).values())) for _, panoptic in scenes]
    assert min(counts) >= 3
    assert max(counts) <= 20
    assert 7 <= np.mean(counts) <= 14
    shares = np.concatenate(
        [
            np.unique(panoptic[panoptic % INFO.label_divisor > 0], return_counts=True)[1] / panoptic.size
            for _, panoptic in scenes
        ]
    )
    assert shares.min() < 0.003
    assert shares.max() > 0.05


def test_crowds_and_void_appear_now_and_then(scenes: list[tuple[np.ndarray, np.ndarray]]) -> None:
    crowds = np.mean([has_crowd(panoptic) for _, panoptic in scenes])
    voids = np.mean([(panoptic == INFO.void).any() for _, panoptic in scenes])
    assert 0.05 <= crowds <= 0.25
    assert 0.12 <= voids <= 0.4


def test_most_scenes_have_touching_objects_of_one_class(scenes: list[tuple[np.ndarray, np.ndarray]]) -> None:
    assert np.mean([has_touching_instances(panoptic) for _, panoptic in scenes]) > 0.8


def test_some_objects_are_cut_into_parts_by_others(scenes: list[tuple[np.ndarray, np.ndarray]]) -> None:
    parted = 0
    for _, panoptic in scenes:
        for value in np.unique(panoptic[panoptic % INFO.label_divisor > 0]):
            parted += cv2.connectedComponents((panoptic == value).astype(np.uint8))[0] > 2
    assert parted >= 10


def test_labels_agree_with_the_picture(scenes: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """The borders between segments must show: across them gray levels change more than elsewhere."""
    across, inside = [], []
    for image, panoptic in scenes:
        change = np.abs(np.diff(image.astype(np.float32).mean(axis=-1), axis=1))  # [H, W - 1]
        border = panoptic[:, 1:] != panoptic[:, :-1]
        across.append(change[border].mean())
        inside.append(change[~border].mean())
    assert np.mean(across) > 3 * np.mean(inside)


def test_neither_light_nor_noise_is_the_same_everywhere() -> None:
    brightness = [render_scene(index, height=32, width=64)[0].mean() for index in range(20)]
    assert np.std(brightness) > 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"index": -1, "height": 32, "width": 32}, "index must be 0 or more, got -1"),
        ({"index": 0, "height": 8, "width": 32}, "height must be 16 or more, got 8"),
        ({"index": 0, "height": 32, "width": 0}, "width must be 16 or more, got 0"),
        ({"index": 0, "height": 32, "width": 32, "seed": -2}, "seed must be 0 or more, got -2"),
    ],
)
def test_arguments_out_of_range_are_named(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        render_scene(**arguments)


@pytest.fixture(scope="module")
def difficulty() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "scenes_difficulty.py"
    specification = importlib.util.spec_from_file_location("scenes_difficulty", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_components_merge_what_touches_and_leave_crowds_and_void_out(difficulty: ModuleType) -> None:
    thing = INFO.thing_classes[0] * INFO.label_divisor
    stuff, void = INFO.stuff_classes[0] * INFO.label_divisor, INFO.void
    panoptic = np.array(
        [
            [thing + 1, thing + 2, stuff, thing + 3],  # 1 and 2 touch and become one component; 3 stays alone
            [thing + 1, thing + 2, stuff, stuff],
            [void, thing + 0, stuff, stuff],  # a crowd below 2
        ],
        np.int32,
    )
    expected = np.array(
        [
            [thing + 1, thing + 1, stuff, thing + 2],
            [thing + 1, thing + 1, stuff, stuff],
            [void, void, stuff, stuff],
        ],
        np.int32,
    )
    np.testing.assert_array_equal(difficulty.components_of_semantic_map(panoptic, INFO), expected)


def test_true_classes_alone_score_badly_on_things(difficulty: ModuleType) -> None:
    result = difficulty.measure(30, HEIGHT, WIDTH)
    assert 100 * result.things.pq < difficulty.LIMIT
    assert result.stuff.pq == pytest.approx(1.0)
