"""Post-processing of Panoptic-DeepLab: by hand, against the plain formulation, and against Detectron2's results."""

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from deeplab2_like.data.dataset_info import Category, DatasetInfo
from deeplab2_like.model.geometry import Geometry
from deeplab2_like.model.panoptic_deeplab.config import PostprocessConfig
from deeplab2_like.model.panoptic_deeplab.postprocess import find_centers, postprocess

ROOT = Path(__file__).parents[2]
DETECTRON2 = ROOT / "tests" / "data" / "detectron2_panoptic_deeplab" / "postprocess.npz"


def load_plain() -> ModuleType:
    """The plain formulation lives with the benchmark, which is no package."""
    path = ROOT / "benchmarks" / "plain_postprocess.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


plain = load_plain()


def run_postprocess(
    outputs: Mapping[str, Any],
    size: Any,
    *,
    thing_classes: tuple[int, ...],
    label_divisor: int,
    ignore_label: int,
    stride: int,
    center_is_logit: bool = False,
    num_classes: int | None = None,
    **thresholds: Any,
) -> dict[str, Any]:
    """`postprocess` with the same options as the plain formulation."""
    num_classes = num_classes or outputs["semantic_logits"].shape[-1]
    categories = [Category(i, str(i), i in thing_classes, (0, 0, 0)) for i in range(num_classes)]
    info = DatasetInfo("made up", tuple(categories), label_divisor, ignore_label)
    return postprocess(
        outputs, Geometry(size), PostprocessConfig(**thresholds), info, stride=stride, center_is_logit=center_is_logit
    )


# Two stuff classes (0, 1) and two thing classes (2, 3); void is 25500.
OPTIONS: dict[str, Any] = {
    "stride": 1,
    "thing_classes": (2, 3),
    "label_divisor": 100,
    "ignore_label": 255,
    "center_is_logit": False,
    "center_threshold": 0.1,
    "nms_kernel": 3,
    "top_k": 3,
    "stuff_area_limit": 0,
}
VOID = 25500


def certain_logits(classes: np.ndarray, num_classes: int) -> np.ndarray:
    """Logits [1, H, W, C] of a network that is sure of int [H, W] classes."""
    return 20.0 * np.eye(num_classes, dtype=np.float32)[classes][np.newaxis]


def run(
    classes: Any, peaks: Mapping[tuple[int, int], float], offset: Any = (0.0, 0.0), **changes: Any
) -> dict[str, np.ndarray]:
    """Post-processes one image, [H, W] classes with the heat of single pixels, without the batch axis."""
    class_map = np.array(classes)
    center = np.zeros((1, *class_map.shape, 1), np.float32)
    for (y, x), heat in peaks.items():
        center[0, y, x, 0] = heat
    outputs = {
        "semantic_logits": certain_logits(class_map, 4),
        "center": center,
        "offset": np.broadcast_to(np.float32(offset), (1, *class_map.shape, 2)),
    }
    tensors = {name: tf.constant(value) for name, value in outputs.items()}
    found = run_postprocess(tensors, class_map.shape, **{**OPTIONS, **changes})
    return {name: value.numpy()[0] for name, value in found.items()}


# Sky, two rows of class 2 with one pixel of class 3, road.
SCENE = [
    [0, 0, 0, 0, 0, 0],
    [2, 2, 3, 2, 2, 2],
    [2, 2, 2, 2, 2, 2],
    [1, 1, 1, 1, 1, 1],
]
# Columns 0 to 2 are nearer to the first, in squared distances: (1, 2) is 1 from (1, 1) and 5 from (2, 4), (2, 2) is 2
# and 4 away. Columns 3 to 5 are nearer to the second: (1, 3) is 4 and 2 away.
PEAKS = {(1, 1): 0.9, (2, 4): 0.8}


def test_void_class() -> None:
    # Classes 0 and 1 are stuff, 2 is a thing, and the fourth logit is void. Two images, so that a count that goes to
    # the wrong row is seen in the next image, too.
    classes = np.array([[[3, 3, 3], [2, 2, 3], [0, 0, 0]], [[1, 2, 2], [1, 3, 2], [1, 1, 1]]])
    center = np.zeros((2, 3, 3, 1), np.float32)
    center[0, 1, 0] = center[1, 0, 1] = 0.9
    outputs = {
        "semantic_logits": 20.0 * np.eye(4, dtype=np.float32)[classes],
        "center": center,
        "offset": np.zeros((2, 3, 3, 2), np.float32),
    }
    tensors = {name: tf.constant(value) for name, value in outputs.items()}
    found = run_postprocess(tensors, (3, 3), **{**OPTIONS, "thing_classes": (2,), "num_classes": 3})
    expected = [
        [[VOID, VOID, VOID], [201, 201, VOID], [0, 0, 0]],
        [[100, 201, 201], [100, VOID, 201], [100, 100, 100]],
    ]
    np.testing.assert_array_equal(found["panoptic"], expected)
    # Rows: three centers and three classes.
    np.testing.assert_array_equal(found["segment_class"], [[2, 0, 0, 0, 0, 0], [2, 0, 0, 0, 1, 0]])
    np.testing.assert_allclose(found["segment_score"][:, 0], 0.9, rtol=1e-5)


def test_two_instances_of_one_class() -> None:
    found = run(SCENE, PEAKS)
    # The first instance has five pixels of class 2 and one of class 3, so all six become class 2.
    expected = [
        [0, 0, 0, 0, 0, 0],
        [201, 201, 201, 202, 202, 202],
        [201, 201, 201, 202, 202, 202],
        [100, 100, 100, 100, 100, 100],
    ]
    np.testing.assert_array_equal(found["panoptic"], expected)
    # Rows: three instances, then the four classes as stuff. The mean probability of class 2 in the first instance is
    # 5/6 as its sixth pixel is sure of class 3: 0.9 * 5 / 6 = 0.75. Stuff has no center; its score is the probability.
    np.testing.assert_array_equal(found["segment_id"], [201, 202, 0, 0, 100, 0, 0])
    np.testing.assert_array_equal(found["segment_class"], [2, 2, 0, 0, 1, 0, 0])
    np.testing.assert_allclose(found["segment_score"], [0.75, 0.8, 0, 1, 1, 0, 0], atol=1e-6)


def test_types_of_results() -> None:
    found = run(SCENE, PEAKS)
    types = {name: value.dtype for name, value in found.items()}
    assert types == {
        "panoptic": np.int32,
        "segment_id": np.int32,
        "segment_class": np.int32,
        "segment_score": np.float32,
    }


def test_instances_are_numbered_by_heat_within_their_class() -> None:
    # Three instances, two columns each; in the order of heat: class 3, class 2 at the right, class 2 in the middle.
    classes = [[3, 3, 2, 2, 2, 2]]
    found = run(classes, {(0, 0): 0.9, (0, 3): 0.3, (0, 5): 0.6}, nms_kernel=1)
    # Pixel 2 is 2 away from 0 and 1 from 3; pixel 4 is halfway between 3 and 5 and leaves the answer open.
    np.testing.assert_array_equal(found["panoptic"][0, [0, 1, 2, 3, 5]], [301, 301, 202, 202, 201])
    np.testing.assert_array_equal(found["segment_id"][:3], [301, 201, 202])
    np.testing.assert_allclose(found["segment_score"][:3], [0.9, 0.6, 0.3], atol=1e-6)


def test_offsets_lead_to_the_center() -> None:
    # All pixels point five to the left: columns 0 to 7 arrive nearer to column 0 (2 and 6 away for column 7), columns
    # 10 and 11 nearer to column 8 (at 5 and 6). Column 9 is halfway.
    found = run([[2] * 12], {(0, 0): 0.9, (0, 8): 0.8}, offset=(0.0, -5.0))
    np.testing.assert_array_equal(found["panoptic"][0, :9], 201)
    np.testing.assert_array_equal(found["panoptic"][0, 10:], 202)


def test_instance_without_pixels_is_left_out() -> None:
    # The center on the sky is the hottest, but has no thing pixels nearest to it.
    found = run([[0, 0, 0, 0, 0], [2, 2, 2, 2, 2]], {(0, 0): 0.9, (1, 2): 0.5}, offset=(0.0, 3.0))
    np.testing.assert_array_equal(found["panoptic"][1], 201)
    np.testing.assert_array_equal(found["segment_id"][:3], [0, 201, 0])
    np.testing.assert_allclose(found["segment_score"][:3], [0, 0.5, 0], atol=1e-6)


def test_small_stuff_becomes_void() -> None:
    # Sky and road have six pixels each, the instances too: only stuff has a limit.
    np.testing.assert_array_equal(run(SCENE, PEAKS, stuff_area_limit=6)["panoptic"], run(SCENE, PEAKS)["panoptic"])
    found = run(SCENE, PEAKS, stuff_area_limit=7)
    np.testing.assert_array_equal(found["panoptic"][[0, 3]], VOID)
    np.testing.assert_array_equal(found["panoptic"][1:3, 0], 201)
    np.testing.assert_array_equal(found["segment_id"], [201, 202, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(found["segment_score"][3:], 0)


def test_things_without_any_center_become_void() -> None:
    found = run(SCENE, {})
    np.testing.assert_array_equal(found["panoptic"], [[0] * 6, [VOID] * 6, [VOID] * 6, [100] * 6])
    np.testing.assert_array_equal(found["segment_id"], [0, 0, 0, 0, 100, 0, 0])


def test_best_centers_are_kept() -> None:
    # With one center left, the better one, all twelve thing pixels are its instance.
    found = run(SCENE, {(1, 1): 0.8, (2, 4): 0.9}, top_k=1)
    np.testing.assert_array_equal(found["panoptic"][1:3], 201)
    np.testing.assert_allclose(found["segment_score"][0], 0.9 * 11 / 12, rtol=1e-6)
    assert found["segment_id"].shape == (1 + 4,)


def test_heat_must_exceed_the_threshold() -> None:
    assert run(SCENE, {(1, 1): 0.5}, center_threshold=0.5)["panoptic"][1, 1] == VOID
    assert run(SCENE, {(1, 1): 0.5}, center_threshold=0.499)["panoptic"][1, 1] == 201


@pytest.mark.parametrize(("nms_kernel", "instances"), [(5, 2), (7, 1)])
def test_a_center_is_the_maximum_of_its_window(nms_kernel: int, instances: int) -> None:
    # Three pixels apart: a window of 7 around one reaches the other, a window of 5 does not.
    found = run([[2] * 8] * 3, {(1, 2): 0.9, (1, 5): 0.8}, nms_kernel=nms_kernel)
    assert np.unique(found["panoptic"]).tolist() == [201, 202][:instances]


def test_heat_as_logits() -> None:
    # The sigmoid of ln 4 is 0.8; that of 0, everywhere else, is 0.5 and under the threshold.
    found = run(SCENE, {(1, 1): np.log(4)}, center_is_logit=True, center_threshold=0.6)
    np.testing.assert_allclose(found["segment_score"][0], 0.8 * 11 / 12, rtol=1e-6)


def compare_with_plain(outputs: Mapping[str, np.ndarray], size: tuple[int, int], **options: Any) -> tuple[Any, Any]:
    """Runs both formulations and compares their maps; returns the results of both."""
    tensors = {name: tf.constant(value) for name, value in outputs.items()}
    found = run_postprocess(tensors, size, **options)
    expected = plain.plain_postprocess(tensors, size, **options)
    # The inputs leave nothing to rounding, with one exception: a pixel that points right between two centers goes to
    # the one that is compared first.
    different = np.count_nonzero(found["panoptic"].numpy() != expected[0])
    assert different <= 3, f"{different} of {expected[0].size} pixels differ"
    return found, expected


CITYSCAPES: dict[str, Any] = {
    "thing_classes": tuple(range(11, 19)),
    "label_divisor": 1000,
    "ignore_label": 255,
    "center_threshold": 0.1,
    "nms_kernel": 7,
    "top_k": 200,
    "stuff_area_limit": 2048,
}


def random_batch(size: tuple[int, int], *, stride: int, **options: Any) -> dict[str, np.ndarray]:
    things = CITYSCAPES["thing_classes"]
    images = [
        plain.made_up_outputs(size, stride=stride, num_classes=19, thing_classes=things, seed=seed, **options)
        for seed in range(2)
    ]
    return {name: np.concatenate([image[name] for image in images]) for name in images[0]}


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no centers": ({"num_centers": 0}, {}),
    "one center": ({"num_centers": 1}, {}),
    "60 centers": ({"num_centers": 60}, {}),
    "200 centers": ({"num_centers": 200}, {}),
    "more than top_k": ({"num_centers": 60}, {"top_k": 20}),
    "wide window": ({"num_centers": 60}, {"nms_kernel": 41}),
    "crowded": ({"num_centers": 150, "within": 30.0, "offset_noise": 10.0}, {}),
    "crowded, window 1": ({"num_centers": 150, "within": 30.0}, {"nms_kernel": 1, "top_k": 150}),
    "far outside": ({"num_centers": 60, "offset_noise": 400.0}, {}),
    "crowded, far outside": ({"num_centers": 150, "within": 40.0, "offset_noise": 100.0}, {}),
}


@pytest.mark.parametrize("stride", [4, 2])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_formulation(case: str, stride: int) -> None:
    made_up, options = CASES[case]
    size = (203, 317)
    outputs = random_batch(size, stride=stride, **made_up)
    found, (maps, scores) = compare_with_plain(outputs, size, stride=stride, **{**CITYSCAPES, **options})
    for image in range(2):
        ids = found["segment_id"].numpy()[image]
        top_k = options.get("top_k", 200)
        assert np.all(np.diff(np.flatnonzero(ids[:top_k])) > 0)
        of_instances = dict(zip(ids[:top_k].tolist(), found["segment_score"].numpy()[image].tolist(), strict=False))
        of_instances.pop(0, None)
        assert set(of_instances) == set(scores[image])
        # Probabilities are read between the pixels of the logits in the one, and at them in the other, which evens out
        # over some pixels.
        for value, score in scores[image].items():
            if np.count_nonzero(maps[image] == value) >= 64:
                assert of_instances[value] == pytest.approx(score, abs=0.04), f"instance {value}"
        ids_in_map = set(np.unique(maps[image]).tolist()) - {255000}
        assert set(ids[found["segment_score"].numpy()[image] > 0].tolist()) == ids_in_map


def test_images_of_a_batch_do_not_mix() -> None:
    # No centers in the first image, some in the second.
    images = [random_batch((61, 93), stride=4, num_centers=count) for count in (0, 8)]
    outputs = {name: np.concatenate([image[name][:1] for image in images]) for name in images[0]}
    found, (maps, scores) = compare_with_plain(outputs, (61, 93), stride=4, **{**CITYSCAPES, "stuff_area_limit": 0})
    assert (len(scores[0]), len(scores[1]) > 3) == (0, True)
    assert 255000 in maps[0]
    assert not found["segment_id"].numpy()[0, :200].any()


def test_scores_are_equal_at_full_resolution() -> None:
    size = (70, 90)
    outputs = random_batch(size, stride=1, num_centers=10)
    options = {**CITYSCAPES, "stuff_area_limit": 0}
    found, (_, scores) = compare_with_plain(outputs, size, stride=1, **options)
    for image in range(2):
        rows = {value: row for row, value in enumerate(found["segment_id"].numpy()[image, :200]) if value}
        assert set(rows) == set(scores[image])
        assert len(rows) > 3
        for value, score in scores[image].items():
            assert found["segment_score"].numpy()[image, rows[value]] == pytest.approx(score, rel=1e-4)


def all_operations(graph: Any) -> Iterator[tf.Operation]:
    """The operations of a graph and of the functions that it calls, such as the bodies of loops."""
    yield from graph.get_operations()
    for function in graph._functions.values():
        yield from all_operations(function.graph)


def trace(size: tuple[int, int], num_centers: int) -> Any:
    def infer(outputs: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return run_postprocess(outputs, size, stride=4, **{**CITYSCAPES, "top_k": num_centers})

    rows, columns = (-(-side // 32) * 8 for side in size)
    channels = {"semantic_logits": 19, "center": 1, "offset": 2}
    specs = {name: tf.TensorSpec([1, rows, columns, count]) for name, count in channels.items()}
    return tf.function(infer, autograph=False).get_concrete_function(specs)


def test_nothing_holds_pixels_times_centers_or_classes() -> None:
    height, width, num_centers = 256, 512, 200
    concrete = trace((height, width), num_centers)
    # Loops have inputs that their conditions do not use, of which no shape is noted there.
    used = [op for op in all_operations(concrete.graph) if "redundant_placeholder" not in op.name]
    shapes = [output.shape for operation in used for output in operation.outputs]
    pixels = height * width
    # Loops are there, and what is in them is seen: the walk holds several maps of pixels.
    loops = [operation for operation in all_operations(concrete.graph) if operation.type.endswith("While")]
    assert len(loops) == 2
    # 19 classes and 200 centers: either of them times pixels would be larger.
    largest = max(shape.num_elements() or 0 for shape in shapes)
    assert pixels <= largest <= 4 * pixels
    assert [shape for shape in shapes if not shape.is_fully_defined()] == []


def test_graph_of_unknown_size_gives_the_same() -> None:
    specs = {
        name: tf.TensorSpec([None, None, None, channels])
        for name, channels in (("semantic_logits", 19), ("center", 1), ("offset", 2))
    }

    @tf.function(input_signature=[specs, tf.TensorSpec([2], tf.int32)], autograph=False)
    def infer(outputs: dict[str, tf.Tensor], size: tf.Tensor) -> dict[str, tf.Tensor]:
        return run_postprocess(outputs, (size[0], size[1]), stride=4, **CITYSCAPES)

    for size in ((61, 93), (33, 150)):
        outputs = random_batch(size, stride=4, num_centers=12)
        expected = run_postprocess(outputs, size, stride=4, **CITYSCAPES)
        found = infer({name: tf.constant(value) for name, value in outputs.items()}, tf.constant(size))
        assert len(np.unique(expected["panoptic"])) > 5
        np.testing.assert_array_equal(found["panoptic"], expected["panoptic"])
        np.testing.assert_array_equal(found["segment_id"], expected["segment_id"])
        np.testing.assert_allclose(found["segment_score"], expected["segment_score"], rtol=1e-5)


# Detectron2 keeps centers strictly better than the k-th, so that its "top 5" are four.
@pytest.mark.parametrize(("name", "nms_kernel", "top_k"), [
    ("nms7_top200", 7, 200),
    ("nms41_top200", 41, 200),
    ("nms7_top5", 7, 4),
])  # fmt: skip
def test_equals_detectron2(name: str, nms_kernel: int, top_k: int) -> None:
    with np.load(DETECTRON2) as file:
        classes, center, offset = file["semantic"], file["center"], file["offset"]
        expected, centers = file[f"panoptic_{name}"].astype(np.int32), file[f"centers_{name}"]
    size = classes.shape
    outputs = {
        "semantic_logits": tf.constant(certain_logits(classes, 19)),
        "center": tf.constant(center[np.newaxis, ..., np.newaxis]),
        "offset": tf.constant(offset[np.newaxis]),
    }
    options = {**CITYSCAPES, "stride": 1, "nms_kernel": nms_kernel, "top_k": top_k}
    found = run_postprocess(outputs, size, **options)

    positions, heat = find_centers(
        outputs["center"],
        height=size[0],
        width=size[1],
        stride=1,
        is_logit=False,
        threshold=0.1,
        nms_kernel=nms_kernel,
        top_k=top_k,
    )
    np.testing.assert_array_equal(sorted(positions.numpy()[heat.numpy() > 0].tolist()), sorted(centers.tolist()))

    # Instances are numbered differently, so ids must correspond one to one, within their class.
    pairs = np.unique(np.stack([found["panoptic"].numpy()[0], expected], axis=-1).reshape(-1, 2), axis=0)  # [P, 2]
    assert len(pairs) == len(np.unique(pairs[:, 0])) == len(np.unique(pairs[:, 1]))
    np.testing.assert_array_equal(pairs[:, 0] // 1000, pairs[:, 1] // 1000)
    is_stuff = pairs[:, 1] % 1000 == 0
    np.testing.assert_array_equal(pairs[is_stuff, 0], pairs[is_stuff, 1])
