"""Rendering: paints the polygons of a scene, from far to near, into an image and a label map."""

from collections.abc import Sequence

import cv2
import numpy as np

from deeplab2_like.data.scenes.classes import INFO, SKY, VEGETATION
from deeplab2_like.data.scenes.layout import Scene, make_scene
from deeplab2_like.data.scenes.objects import Item
from deeplab2_like.data.scenes.texture import add_texture
from deeplab2_like.data.scenes.view import Patch, Point
from deeplab2_like.errors import UserError

# Segment numbers while a scene is painted (uint8): stuff and crowds have those of their class, instances count up.
_CROWD_OFFSET = 16
_FIRST_INSTANCE = 32
_VOID_SEGMENT = 255

# A scene is painted at twice the size and then reduced, which smooths the edges of the image.
_OVERSAMPLING = 2
# OpenCV takes corners as fixed-point numbers with this many bits after the point.
_FRACTION_BITS = 3

# An object is left out of the scene when less of it is visible than these shares of its own area and of the image,
# or fewer pixels than `_MIN_PIXELS`: an annotator would not label it.
_MIN_VISIBLE_SHARE = 0.4
_MIN_IMAGE_SHARE = 0.0018
_MIN_PIXELS = 4


def render_scene(index: int, *, height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Renders one scene and its label.

    The result depends on the arguments only. Splits are made by the caller: training takes the indices from 0 on,
    validation those from 1_000_000 on.

    Args:
        index: Number of the scene, not negative.
        height: Image height in pixels, at least 16.
        width: Image width in pixels, at least 16.
        seed: Not negative; another seed gives another data set.

    Returns:
        image: uint8 [height, width, 3], RGB.
        panoptic: int32 [height, width], see `DatasetInfo`. Instances count from 1 in every class without a gap; a crowd
            region is a thing class with instance 0.

    Raises:
        UserError: If an argument is out of its range.
    """
    for name, value, smallest in (("index", index, 0), ("seed", seed, 0), ("height", height, 16), ("width", width, 16)):
        if value < smallest:
            raise UserError(f"render_scene: {name} must be {smallest} or more, got {value}.")
    scene_sequence, noise_sequence = np.random.SeedSequence([seed, index]).spawn(2)
    scene = make_scene(np.random.Generator(np.random.PCG64(scene_sequence)))
    canvas = _Canvas(height, width)
    items = _select_visible(scene, canvas)
    _paint(scene, items, canvas)
    segments = canvas.sample_segments()
    if scene.has_unlabeled_leaves:
        _unlabel_leaf_borders(segments)
    noise_rng = np.random.Generator(np.random.PCG64(noise_sequence))
    image = add_texture(scene.lighting, canvas.reduce_colors(), segments, noise_rng)
    return image, _segments_to_panoptic(segments, [item.class_id for item in items if item.kind == "instance"])


class _Canvas:
    """Colors and segment numbers, painted together so that they agree to the pixel."""

    def __init__(self, height: int, width: int) -> None:
        self._size = (height, width)
        self._line_width = max(1, round(height * _OVERSAMPLING / 256))
        self.colors = np.zeros((height * _OVERSAMPLING, width * _OVERSAMPLING, 3), np.uint8)
        self.segments = np.zeros((height * _OVERSAMPLING, width * _OVERSAMPLING), np.uint8)
        self._scale = np.array([width / 2, height]) * _OVERSAMPLING

    def corners(self, points: Sequence[Point]) -> np.ndarray:
        """Converts corners from the picture plane, [N, 2], to OpenCV's fixed-point pixels, int32 [N, 2]."""
        pixels = np.asarray(points) * self._scale - 0.5  # Pixel centers lie at integers in OpenCV.
        return np.rint(pixels.clip(-20000, 20000) * (1 << _FRACTION_BITS)).astype(np.int32)

    def paint(self, patch: Patch, segment: int) -> None:
        """Paints a patch into the colors and, if it is labeled, into the segments."""
        corners = [self.corners(patch.points)]
        cv2.fillPoly(self.colors, corners, patch.color, shift=_FRACTION_BITS)
        if patch.edge:
            dark = tuple(0.45 * channel for channel in patch.color)
            cv2.polylines(self.colors, corners, True, dark, self._line_width, shift=_FRACTION_BITS)
        if patch.labeled:
            self.fill(self.segments, patch.points, segment)

    def fill(self, target: np.ndarray, points: Sequence[Point], value: int) -> None:
        """Fills a polygon of a map, uint8 of the canvas's size, with a value."""
        cv2.fillPoly(target, [self.corners(points)], value, shift=_FRACTION_BITS)

    def sample_segments(self) -> np.ndarray:
        """Returns the segment numbers, uint8 [height, width]."""
        # Numbers cannot be averaged as colors are.
        return np.ascontiguousarray(self.segments[::_OVERSAMPLING, ::_OVERSAMPLING])

    def reduce_colors(self) -> np.ndarray:
        """Returns the colors, float32 [height, width, 3]."""
        height, width = self._size
        return cv2.resize(self.colors, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32)


def _select_visible(scene: Scene, canvas: _Canvas) -> list[Item]:
    """Returns the scene's items from far to near without the instances and crowds that are hardly visible."""
    items = sorted(scene.items, key=_painting_order)
    # A trial painting of the labels alone, with the position of each item as its number, shows how much is visible.
    canvas.segments[:] = 0
    own_area = np.zeros(len(items) + 2)
    for number, item in enumerate(items, start=1):
        outline = np.concatenate([canvas.corners(patch.points) for patch in item.patches if patch.labeled])
        # Estimated from the convex hull, of which an object fills about three quarters.
        own_area[number] = 0.75 * cv2.contourArea(cv2.convexHull(outline)) / (1 << _FRACTION_BITS) ** 2
        for patch in item.patches:
            if patch.labeled:
                canvas.fill(canvas.segments, patch.points, number)
    for patch in scene.hood:
        canvas.fill(canvas.segments, patch.points, 0)
    visible = np.bincount(canvas.sample_segments().ravel(), minlength=len(items) + 2)
    own_area /= _OVERSAMPLING**2
    min_area = max(_MIN_PIXELS, _MIN_IMAGE_SHARE * canvas.segments.size / _OVERSAMPLING**2)

    kept: list[Item] = []
    kept_ids: set[int] = set()
    # From bottom to top, so that the supports of an item are decided before it: no item may hang in the air.
    for number, item in sorted(enumerate(items, start=1), key=lambda numbered: numbered[1].elevation):
        must_be_visible = item.kind in ("instance", "crowd")
        if must_be_visible and visible[number] < max(min_area, _MIN_VISIBLE_SHARE * own_area[number]):
            continue
        if all(id(support) in kept_ids for support in item.supports):
            kept.append(item)
            kept_ids.add(id(item))
    return sorted(kept, key=_painting_order)


def _painting_order(item: Item) -> tuple[float, float]:
    """Sorts far before near and, among stacked items, lower before higher."""
    return -item.depth, item.elevation


def _paint(scene: Scene, items: Sequence[Item], canvas: _Canvas) -> None:
    """Paints backdrop, shadows, items from far to near, and the hood of the camera's own car."""
    for patch, class_id in scene.backdrop:
        canvas.paint(patch, class_id)
    # One mask for all shadows, so that the ground is not darkened twice where they overlap.
    shadow = np.zeros_like(canvas.segments)
    for item in items:
        if len(item.shadow):
            canvas.fill(shadow, item.shadow, 255)
    cv2.copyTo(cv2.convertScaleAbs(canvas.colors, alpha=0.6), shadow, canvas.colors)
    next_instance = _FIRST_INSTANCE
    for item in items:
        if item.kind == "instance":
            segment = next_instance
            next_instance += 1
        else:
            segment = {
                "stuff": item.class_id,
                "crowd": item.class_id + _CROWD_OFFSET,
                "void": _VOID_SEGMENT,
            }[item.kind]
        for patch in item.patches:
            canvas.paint(patch, segment)
    for patch in scene.hood:
        canvas.paint(patch, _VOID_SEGMENT)


def _unlabel_leaf_borders(segments: np.ndarray) -> None:
    """Sets the border between leaves and sky void, as an annotator would; `segments`, uint8 [H, W], is changed."""
    kernel = np.ones((2 * max(1, segments.shape[0] // 160) + 1,) * 2, np.uint8)
    near_leaves = cv2.dilate((segments == VEGETATION).astype(np.uint8), kernel)
    near_sky = cv2.dilate((segments == SKY).astype(np.uint8), kernel)
    border = (near_leaves & near_sky).astype(bool) & np.isin(segments, (VEGETATION, SKY))
    segments[border] = _VOID_SEGMENT


def _segments_to_panoptic(segments: np.ndarray, instance_classes: Sequence[int]) -> np.ndarray:
    """Converts segment numbers, uint8 [H, W], to a panoptic map, int32 [H, W].

    Args:
        segments: Segment numbers.
        instance_classes: Class of every instance; the first belongs to segment `_FIRST_INSTANCE`.
    """
    panoptic_of_segment = np.full(256, INFO.void, np.int32)
    for class_id in range(INFO.num_classes):
        panoptic_of_segment[class_id] = class_id * INFO.label_divisor
        panoptic_of_segment[class_id + _CROWD_OFFSET] = class_id * INFO.label_divisor
    visible = np.bincount(segments.ravel(), minlength=256)
    num_instances = dict.fromkeys(INFO.thing_classes, 0)
    for segment, class_id in enumerate(instance_classes, start=_FIRST_INSTANCE):
        if visible[segment]:  # An instance without a pixel would leave a gap in the numbers of its class.
            num_instances[class_id] += 1
            panoptic_of_segment[segment] = class_id * INFO.label_divisor + num_instances[class_id]
    return panoptic_of_segment[segments]
