"""`scenes`: a procedural data set of toy streets, the default data set and the test data of all systems.

Every scene is a small 3-D street: a ground plane with road and pavements, facades and trees along it, and cars, people,
boxes and balls standing on it, mostly in rows, groups and piles, so that objects of one class touch and hide each
other. A pin-hole camera projects it, the painter's algorithm (far to near) decides what is visible. A model that knows
only the class of every pixel therefore cannot tell the objects apart; `benchmarks/scenes_difficulty.py` measures that.

Units: metres in the world (x to the right, y up from the ground, z away from the camera). On the picture plane the
height is 1 and the width 2 whatever the size in pixels, so the same index shows the same scene at any size; sizes of
another shape than 1:2 stretch it. All random choices about the scene are made before the size matters.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from deeplab2_like.data.dataset_info import Category, DatasetInfo
from deeplab2_like.errors import UserError

Color = tuple[float, float, float]
Point = tuple[float, float]

_INFO = DatasetInfo(
    name="scenes",
    # The ids have gaps and do not start at 0, as in most real data sets, so that nothing may take them for class ids.
    categories=(
        Category(id=2, name="sky", is_thing=False, color=(70, 130, 180)),
        Category(id=3, name="building", is_thing=False, color=(110, 90, 85)),
        Category(id=5, name="vegetation", is_thing=False, color=(107, 142, 35)),
        Category(id=8, name="road", is_thing=False, color=(128, 64, 128)),
        Category(id=9, name="sidewalk", is_thing=False, color=(244, 35, 232)),
        Category(id=21, name="car", is_thing=True, color=(20, 40, 200)),
        Category(id=22, name="person", is_thing=True, color=(220, 20, 60)),
        Category(id=30, name="box", is_thing=True, color=(230, 150, 20)),
        Category(id=31, name="ball", is_thing=True, color=(60, 220, 190)),
    ),
)
_SKY, _BUILDING, _VEGETATION, _ROAD, _SIDEWALK, _CAR, _PERSON, _BOX, _BALL = range(_INFO.num_classes)

# Numbers of segments while a scene is painted (uint8): stuff and crowds use their class, instances what follows.
_CROWD_OFFSET = 16
_FIRST_INSTANCE = 32
_VOID_SEGMENT = 255

# Everything is painted at twice the size and then reduced, which smooths the edges of the image.
_OVERSAMPLING = 2
_FRACTION_BITS = 3

# An object is left out of the scene when less of it is visible than these shares of its own area and of the image,
# or fewer pixels than _MIN_PIXELS: nobody would label it.
_MIN_VISIBLE_SHARE = 0.4
_MIN_IMAGE_SHARE = 0.0018
_MIN_PIXELS = 4

_CROWD_PROBABILITY = 0.16
_VOID_PROBABILITY = 0.27

# Strength of the coarse and of the fine texture by class, in grey levels.
_COARSE_TEXTURE = (3.0, 4.0, 20.0, 6.0, 5.0, 4.0, 5.0, 7.0, 4.0)
_FINE_TEXTURE = (0.5, 3.0, 11.0, 5.0, 3.0, 1.5, 3.0, 3.0, 1.5)

_CAR_COLORS: tuple[Color, ...] = (
    (190, 30, 35),
    (35, 60, 165),
    (225, 225, 228),
    (150, 155, 162),
    (45, 48, 56),
    (30, 110, 120),
    (215, 175, 40),
    (120, 25, 70),
)
_BALL_COLORS: tuple[Color, ...] = (
    (250, 60, 200),
    (255, 110, 20),
    (40, 220, 230),
    (250, 235, 60),
    (150, 70, 240),
    (90, 240, 90),
)
_BOX_COLORS: tuple[Color, ...] = (
    (206, 146, 62),
    (164, 108, 40),
    (232, 186, 104),
    (184, 130, 56),
    (216, 132, 48),
    (196, 160, 92),
)
_SHIRT_COLORS: tuple[Color, ...] = (
    (210, 50, 50),
    (60, 100, 210),
    (240, 240, 235),
    (245, 200, 60),
    (60, 160, 90),
    (160, 80, 170),
    (235, 130, 60),
    (40, 45, 60),
)
_SKIN_COLORS: tuple[Color, ...] = ((240, 200, 170), (205, 150, 115), (140, 95, 65), (225, 175, 145))
_FACADE_COLORS: tuple[Color, ...] = (
    (176, 96, 74),
    (205, 178, 140),
    (186, 120, 100),
    (214, 200, 178),
    (150, 110, 92),
    (196, 142, 110),
)


def scenes_info() -> DatasetInfo:
    """Returns the facts of the data set: five stuff and four thing classes."""
    return _INFO


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
    scene = _Scene(np.random.Generator(np.random.PCG64(scene_sequence)))
    canvas = _Canvas(height, width)
    items = _visible_items(scene, canvas)
    _paint(scene, items, canvas)
    segments = canvas.sampled_segments()
    if scene.uncertain_leaves:
        _blank_uncertain_leaves(segments)
    image = _finish_image(
        scene, canvas.reduced_colors(), segments, np.random.Generator(np.random.PCG64(noise_sequence))
    )
    return image, _panoptic_of_segments(segments, [item.class_id for item in items if item.kind == "instance"])


# ----------------------------------------------------------------------------------------------------------------------
# Painting


class _Patch(NamedTuple):
    """One filled polygon on the picture plane.

    Attributes:
        points: Corners (x, y), x in 0..2 and y in 0..1 inside the picture.
        color: Red, green, blue, 0..255.
        labelled: Whether the polygon belongs to the outline of its object; decoration inside it need not.
        edge: Whether to draw a dark line along the border.
    """

    points: Sequence[Point]
    color: Color
    labelled: bool = True
    edge: bool = False


@dataclasses.dataclass
class _Item:
    """Something that stands in the street.

    Attributes:
        class_id: Its class.
        kind: "instance", "crowd", "stuff" or "void".
        depth: z of its nearest point, in metres.
        elevation: y of its lowest point, in metres.
        patches: What to paint, in this order.
        shadow: Polygon on the ground, on the picture plane.
        supports: Items it lies on.
    """

    class_id: int
    kind: str
    depth: float
    elevation: float
    patches: list[_Patch]
    shadow: Sequence[Point] = ()
    supports: Sequence["_Item"] = ()


class _Canvas:
    """Colours and segment numbers, painted together so that they agree to the pixel."""

    def __init__(self, height: int, width: int) -> None:
        self._size = (height, width)
        self._line_width = max(1, round(height * _OVERSAMPLING / 256))
        self.colors = np.zeros((height * _OVERSAMPLING, width * _OVERSAMPLING, 3), np.uint8)
        self.segments = np.zeros((height * _OVERSAMPLING, width * _OVERSAMPLING), np.uint8)
        # Pixel centres lie at integers in OpenCV, hence the half.
        self._scale = np.array([width / 2, height]) * _OVERSAMPLING

    def corners(self, points: Sequence[Point]) -> np.ndarray:
        """Converts corners from the picture plane, [N, 2], to OpenCV's fixed-point pixels, int32 [N, 2]."""
        pixels = np.asarray(points) * self._scale - 0.5
        return np.rint(pixels.clip(-20000, 20000) * (1 << _FRACTION_BITS)).astype(np.int32)

    def paint(self, patch: _Patch, segment: int | None) -> None:
        """Paints a patch; with a segment number also into the label if the patch is labelled."""
        corners = [self.corners(patch.points)]
        cv2.fillPoly(self.colors, corners, patch.color, shift=_FRACTION_BITS)
        if patch.edge:
            dark = tuple(0.45 * channel for channel in patch.color)
            cv2.polylines(self.colors, corners, True, dark, self._line_width, shift=_FRACTION_BITS)
        if segment is not None and patch.labelled:
            cv2.fillPoly(self.segments, corners, segment, shift=_FRACTION_BITS)

    def sampled_segments(self) -> np.ndarray:
        """Returns the segment numbers, uint8 [height, width]."""
        return np.ascontiguousarray(self.segments[::_OVERSAMPLING, ::_OVERSAMPLING])

    def reduced_colors(self) -> np.ndarray:
        """Returns the colours, float32 [height, width, 3]."""
        height, width = self._size
        return cv2.resize(self.colors, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32)


def _visible_items(scene: "_Scene", canvas: _Canvas) -> list[_Item]:
    """Returns the scene's items from far to near without the instances and crowds that are hardly visible."""
    items = sorted(scene.items, key=_painting_order)
    canvas.segments[:] = 0
    own_area = np.zeros(len(items) + 2)
    for number, item in enumerate(items, start=1):
        alone = np.concatenate([canvas.corners(patch.points) for patch in item.patches if patch.labelled])
        own_area[number] = 0.75 * cv2.contourArea(cv2.convexHull(alone)) / (1 << _FRACTION_BITS) ** 2
        for patch in item.patches:
            if patch.labelled:
                cv2.fillPoly(canvas.segments, [canvas.corners(patch.points)], number, shift=_FRACTION_BITS)
    for patch in scene.bonnet:
        cv2.fillPoly(canvas.segments, [canvas.corners(patch.points)], 0, shift=_FRACTION_BITS)
    visible = np.bincount(canvas.sampled_segments().ravel(), minlength=len(items) + 2)
    own_area /= _OVERSAMPLING**2
    smallest = max(_MIN_PIXELS, _MIN_IMAGE_SHARE * canvas.segments.size / _OVERSAMPLING**2)
    kept: list[_Item] = []
    kept_ids: set[int] = set()
    # By elevation, so that whatever a thing lies on is decided before: nothing may hang in the air.
    for number, item in sorted(enumerate(items, start=1), key=lambda numbered: numbered[1].elevation):
        must_be_visible = item.kind in ("instance", "crowd")
        if must_be_visible and visible[number] < max(smallest, _MIN_VISIBLE_SHARE * own_area[number]):
            continue
        if all(id(support) in kept_ids for support in item.supports):
            kept.append(item)
            kept_ids.add(id(item))
    return sorted(kept, key=_painting_order)


def _painting_order(item: _Item) -> tuple[float, float]:
    """Far before near; of what lies on each other, the lower first."""
    return -item.depth, item.elevation


def _paint(scene: "_Scene", items: Sequence[_Item], canvas: _Canvas) -> None:
    """Paints backdrop, shadows, items from far to near, and the bonnet of the camera's own car."""
    for patch, class_id in scene.backdrop:
        canvas.paint(patch, class_id)
    shadow = np.zeros_like(canvas.segments)
    for item in items:
        if len(item.shadow):
            cv2.fillPoly(shadow, [canvas.corners(item.shadow)], 255, shift=_FRACTION_BITS)
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
    for patch in scene.bonnet:
        canvas.paint(patch, _VOID_SEGMENT)


def _blank_uncertain_leaves(segments: np.ndarray) -> None:
    """Sets the border between leaves and sky void, in place, as an annotator would; segments is uint8 [H, W]."""
    kernel = np.ones((2 * max(1, segments.shape[0] // 160) + 1,) * 2, np.uint8)
    near_leaves = cv2.dilate((segments == _VEGETATION).astype(np.uint8), kernel)
    near_sky = cv2.dilate((segments == _SKY).astype(np.uint8), kernel)
    border = (near_leaves & near_sky).astype(bool) & np.isin(segments, (_VEGETATION, _SKY))
    segments[border] = _VOID_SEGMENT


def _panoptic_of_segments(segments: np.ndarray, instance_classes: Sequence[int]) -> np.ndarray:
    """Converts segment numbers, uint8 [H, W], to a panoptic map, int32 [H, W].

    Args:
        segments: Segment numbers.
        instance_classes: Class of every instance, the first belongs to segment _FIRST_INSTANCE.
    """
    panoptic_of_segment = np.full(256, _INFO.void, np.int32)
    for class_id in range(_INFO.num_classes):
        panoptic_of_segment[class_id] = class_id * _INFO.label_divisor
        panoptic_of_segment[class_id + _CROWD_OFFSET] = class_id * _INFO.label_divisor
    visible = np.bincount(segments.ravel(), minlength=256)
    instances = dict.fromkeys(_INFO.thing_classes, 0)
    for segment, class_id in enumerate(instance_classes, start=_FIRST_INSTANCE):
        if visible[segment]:
            instances[class_id] += 1
            panoptic_of_segment[segment] = class_id * _INFO.label_divisor + instances[class_id]
    return panoptic_of_segment[segments]


def _finish_image(scene: "_Scene", colors: np.ndarray, segments: np.ndarray, noise: np.random.Generator) -> np.ndarray:
    """Adds texture, uneven light and sensor noise.

    Args:
        scene: Gives the light.
        colors: float32 [H, W, 3], 0..255; changed in place.
        segments: uint8 [H, W], the segment numbers, which choose the texture.
        noise: Source of the fine texture and of the sensor noise.

    Returns:
        uint8 [H, W, 3].
    """
    height, width = segments.shape
    strength = np.zeros((256, 2), np.float32)
    strength[:] = (4.0, 3.0)
    strength[: _INFO.num_classes] = np.stack([_COARSE_TEXTURE, _FINE_TEXTURE], axis=1)
    texture = cv2.resize(scene.coarse_texture, (width, height), interpolation=cv2.INTER_CUBIC)
    texture *= strength[:, 0][segments]
    texture += strength[:, 1][segments] * noise.standard_normal((height, width), np.float32)
    light = cv2.resize(scene.uneven_light, (width, height), interpolation=cv2.INTER_CUBIC)
    colors += texture[..., None]
    colors *= light[..., None] * scene.tint
    if scene.sensor_noise > 0:
        colors += np.float32(scene.sensor_noise) * noise.standard_normal((height, width, 3), np.float32)
    return np.rint(colors.clip(0, 255)).astype(np.uint8)


# ----------------------------------------------------------------------------------------------------------------------
# The street


class _Scene:
    """One street: camera, light, backdrop and items; holds no pixels.

    Attributes:
        backdrop: Patches with their class, from far to near: sky, ground, facades.
        items: What stands on the ground, in any order.
        bonnet: The camera car's own bonnet, without a label; mostly empty.
        uncertain_leaves: Whether the border between leaves and sky has no label.
        coarse_texture: float32 [40, 80], about standard normal.
        uneven_light: float32 [4, 6], factors about 1.
        tint: float32 [3], factor of red, green, blue.
        sensor_noise: Standard deviation in grey levels.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.backdrop: list[tuple[_Patch, int]] = []
        self.items: list[_Item] = []
        self.bonnet: list[_Patch] = []
        self.uncertain_leaves = False
        self._taken: list[tuple[float, float, float, float]] = []

        self.focal = rng.uniform(1.0, 1.25)
        self.horizon = rng.uniform(0.34, 0.46)
        self.vanishing_x = rng.uniform(0.7, 1.3)
        self.camera_height = rng.uniform(2.0, 2.8)
        self.light_from_left = rng.random() < 0.5
        gain = rng.uniform(0.75, 1.1)
        self.tint = (gain * rng.uniform(0.95, 1.05, 3)).astype(np.float32)
        self.coarse_texture = rng.standard_normal((40, 80), np.float32)
        self.uneven_light = rng.uniform(0.82, 1.12, (4, 6)).astype(np.float32)
        self.sensor_noise = rng.uniform(1.0, 5.0)
        self.sky_color = self.pick(((120, 170, 225), (165, 195, 225), (195, 205, 218), (215, 208, 212)), 12)

        half_road = rng.uniform(2.7, 4.0)
        road_center = rng.uniform(-1.2, 1.2)
        self.curbs = (road_center - half_road, road_center + half_road)
        self.walk_width = rng.uniform(2.0, 3.6, 2)

        self._add_sky()
        self._add_ground()
        self._add_roadside()
        self._add_void()
        self._add_crowd()
        self._add_things()

    # Small tools

    def pick(self, colors: Sequence[Color], jitter: float) -> Color:
        """Chooses a colour and varies it by up to `jitter` grey levels."""
        red, green, blue = colors[int(self.rng.integers(len(colors)))]
        shift = self.rng.uniform(-jitter, jitter, 4).tolist()
        return (red + shift[0] + shift[3], green + shift[1] + shift[3], blue + shift[2] + shift[3])

    def pick_distinct(self, colors: Sequence[Color], count: int, jitter: float) -> list[Color]:
        """Chooses colours for the members of a group, all different while there are enough of them."""
        order = self.rng.permutation(len(colors)).tolist()
        return [self.pick((colors[order[i % len(colors)]],), jitter) for i in range(count)]

    def chance(self, probability: float) -> bool:
        """Returns True with this probability."""
        return bool(self.rng.random() < probability)

    def project(self, x: float, y: float, z: float) -> Point:
        """Projects a point of the world, metres, to (x, y) on the picture plane."""
        return (
            self.vanishing_x + self.focal * x / z,
            self.horizon + self.focal * (self.camera_height - y) / z,
        )

    def shade(self, color: Color, factor: float, z: float) -> Color:
        """Brightens a colour by a factor and lets it fade into the sky with the distance z."""
        haze = min(0.45, z / 130)
        red, green, blue = (
            min(255.0, max(0.0, c * factor * (1 - haze) + s * haze)) for c, s in zip(color, self.sky_color, strict=True)
        )
        return (red, green, blue)

    def ground(self, x0: float, x1: float, z0: float, z1: float, color: Color) -> _Patch:
        """A rectangle on the ground."""
        corners = ((x0, z0), (x1, z0), (x1, z1), (x0, z1))
        return _Patch([self.project(x, 0, z) for x, z in corners], self.shade(color, 1, (z0 + z1) / 3), labelled=False)

    def upright(
        self, x0: float, x1: float, y0: float, y1: float, z: float, color: Color, *, labelled: bool = True
    ) -> _Patch:
        """A rectangle that faces the camera."""
        left, top = self.project(x0, y1, z)
        right, bottom = self.project(x1, y0, z)
        return _Patch([(left, top), (right, top), (right, bottom), (left, bottom)], color, labelled, labelled)

    def side(
        self, x: float, y0: float, y1: float, z0: float, z1: float, color: Color, *, labelled: bool = True
    ) -> _Patch:
        """A rectangle along the street, in the plane x."""
        corners = ((y0, z0), (y1, z0), (y1, z1), (y0, z1))
        return _Patch([self.project(x, y, z) for y, z in corners], color, labelled, labelled)

    def ellipse(
        self,
        center: tuple[float, float, float],
        radius_x: float,
        radius_y: float,
        color: Color,
        *,
        labelled: bool = True,
        edge: bool = False,
    ) -> _Patch:
        """An ellipse that faces the camera; center is (x, y, z) and the radii are in metres."""
        x, y = self.project(*center)
        scale = self.focal / center[2]
        points = [(x + scale * radius_x * c, y + scale * radius_y * s) for c, s in _CIRCLE]
        return _Patch(points, color, labelled, edge)

    def cuboid(
        self, x: tuple[float, float], y: tuple[float, float], z: tuple[float, float], color: Color
    ) -> list[_Patch]:
        """The faces of a cuboid that the camera sees: top, one side, front."""
        (x0, x1), (y0, y1), (z0, z1) = x, y, z
        patches = []
        if y1 < self.camera_height:
            corners = ((x0, z0), (x1, z0), (x1, z1), (x0, z1))
            top = [self.project(x, y1, z) for x, z in corners]
            patches.append(_Patch(top, self.shade(color, 1.22, z0), True, True))
        if x0 > 0:
            patches.append(self.side(x0, y0, y1, z0, z1, self.shade(color, self._side_light(left=True), z0)))
        elif x1 < 0:
            patches.append(self.side(x1, y0, y1, z0, z1, self.shade(color, self._side_light(left=False), z0)))
        patches.append(self.upright(x0, x1, y0, y1, z0, self.shade(color, 0.88, z0)))
        return patches

    def shadow(self, x0: float, x1: float, z0: float, z1: float) -> list[Point]:
        """The shadow of an object with this footprint; longer on the side away from the light."""
        reach = 0.35 * (x1 - x0)
        x0, x1 = (x0, x1 + reach) if self.light_from_left else (x0 - reach, x1)
        return [self.project(x, 0, z) for x, z in ((x0, z0 - 0.15), (x1, z0 - 0.15), (x1, z1), (x0, z1))]

    def _side_light(self, *, left: bool) -> float:
        return 1.05 if left == self.light_from_left else 0.66

    # What the street is made of

    def _add_sky(self) -> None:
        """Sky in four bands, paler towards the horizon, and a few clouds."""
        bands = 6
        for band in range(bands):
            top = self.horizon * band / bands
            whiter = 0.45 * band / bands
            red, green, blue = (c * (1 - whiter) + 235 * whiter for c in self.sky_color)
            patch = _Patch([(-1, top), (3, top), (3, 1), (-1, 1)], (red, green, blue))
            self.backdrop.append((patch, _SKY))
        for _ in range(int(self.rng.integers(0, 5))):
            x, y = self.rng.uniform(0, 2), self.rng.uniform(0, 0.8 * self.horizon)
            for _ in range(3):
                x += self.rng.uniform(0.03, 0.12)
                radius = self.rng.uniform(0.04, 0.1)
                points = [(x + 1.6 * radius * c, y + 0.4 * radius * s) for c, s in _CIRCLE]
                self.backdrop.append((_Patch(points, self.pick(((228, 230, 234),), 8)), _SKY))

    def _add_ground(self) -> None:
        """Lawn up to the horizon, the distant skyline, pavements, road and its markings."""
        far, near = 150.0, 1.6
        grass = self.pick(((96, 132, 58), (116, 140, 70), (84, 120, 62)), 8)
        lawn = [(-1.0, self.horizon), (3.0, self.horizon), (3.0, 1.1), (-1.0, 1.1)]
        self.backdrop.append((_Patch(lawn, grass), _VEGETATION))

        skyline_class = _BUILDING if self.chance(0.5) else _VEGETATION
        base = ((168, 132, 116),) if skyline_class == _BUILDING else ((92, 122, 80),)
        x = -0.2
        while x < 2.2:
            step = self.rng.uniform(0.08, 0.25)
            height = self.rng.uniform(0.02, 0.09)
            top, bottom = self.horizon - height, self.horizon + 0.01
            color = self.shade(self.pick(base, 14), 1, 30)
            if skyline_class == _BUILDING:
                points = [(x, top), (x + step, top), (x + step, bottom), (x, bottom)]
            else:
                points = [(x + step / 2 + 0.75 * step * c, bottom + 1.4 * height * min(s, 0)) for c, s in _CIRCLE]
            self.backdrop.append((_Patch(points, color), skyline_class))
            x += step

        pavement = self.pick(((176, 176, 190), (164, 166, 178), (188, 184, 188)), 8)
        asphalt = self.pick(((88, 88, 94), (104, 102, 102), (74, 76, 84)), 6)
        left, right = self.curbs
        outer = (left - self.walk_width[0], right + self.walk_width[1])
        add = self.backdrop.append
        add((self.ground(outer[0], outer[1], near, far, pavement)._replace(labelled=True, color=pavement), _SIDEWALK))
        joint: Color = (pavement[0] * 0.8, pavement[1] * 0.8, pavement[2] * 0.8)
        for z in np.arange(3.0, 22.0, self.rng.uniform(1.0, 1.8)).tolist():
            add((self.ground(outer[0], outer[1], z, z + 0.012 * z, joint), _SIDEWALK))
        for x in (left - self.walk_width[0] / 2, right + self.walk_width[1] / 2):
            add((self.ground(x - 0.03, x + 0.03, near, 40, joint), _SIDEWALK))
        # The curb stone belongs to the pavement.
        add((self.ground(left - 0.22, right + 0.22, near, far, (214, 210, 204)), _SIDEWALK))
        add((self.ground(left, right, near, far, asphalt)._replace(labelled=True, color=asphalt), _ROAD))
        white = (222.0, 222.0, 216.0)
        center = (left + right) / 2
        dash = self.rng.uniform(1.5, 3.0)
        for z in np.arange(self.rng.uniform(1.6, 4.0), 60.0, 2 * dash).tolist():
            add((self.ground(center - 0.09, center + 0.09, z, z + dash, white), _ROAD))
        if self.chance(0.35):
            z = self.rng.uniform(6, 13)
            for x in np.arange(left + 0.3, right - 0.5, 1.0).tolist():
                add((self.ground(x, x + 0.5, z, z + 2.2, white), _ROAD))

    def _add_roadside(self) -> None:
        """Houses, and parks with trees and hedges, along both sides, painted from far to near."""
        for is_right in (False, True):
            sign = 1 if is_right else -1
            lawn_width = self.rng.uniform(0.6, 3.5) if self.chance(0.55) else 0.0
            front = self.curbs[is_right] + sign * (self.walk_width[int(is_right)] + lawn_width)
            blocks = []
            z = self.rng.uniform(2.5, 5.0)
            while z < 70:
                length = self.rng.uniform(6, 15)
                blocks.append((z, z + length))
                z += length + (self.rng.uniform(0.5, 3) if self.chance(0.4) else 0.0)
            for z0, z1 in reversed(blocks):
                if self.chance(0.6):
                    self._add_house(front, sign, z0, z1)
                else:
                    self._add_park(front, sign, z0, z1)
            if self.chance(0.4):
                # A tree between the parked cars and the walkers hides parts of both.
                x = self.curbs[is_right] + sign * self.rng.uniform(0.3, 0.7)
                self.items.append(self._tree(x, self.rng.uniform(8, 22), self.rng.uniform(2.4, 3.4)))

    def _add_house(self, front: float, sign: int, z0: float, z1: float) -> None:
        height = self.rng.uniform(4, 10.5)
        color = self.pick(_FACADE_COLORS, 14)
        x0, x1 = sorted((front, front + sign * self.rng.uniform(7, 12)))
        for patch in self.cuboid((x0, x1), (0, height), (z0, z1), color):
            self.backdrop.append((patch, _BUILDING))
        roof: Color = (color[0] * 0.55, color[1] * 0.5, color[2] * 0.5)
        glass = self.pick(((70, 84, 104), (96, 108, 122), (190, 176, 130)), 10)
        bright = self.shade(glass, self._side_light(left=sign > 0), z0)
        add = self.backdrop.append
        floors = range(int(height / 2.9))
        for floor in floors:
            y = 0.9 + 2.9 * floor
            if (front > 0) == (sign > 0):
                for z in np.arange(z0 + 0.8, z1 - 1.2, 2.3).tolist():
                    if z < 32:
                        add((self.side(front, y, y + 1.4, z, z + 1.1, bright, labelled=False), _BUILDING))
            for x in np.arange(x0 + 0.8, x1 - 1.2, 2.2).tolist():
                if z0 < 32:
                    window = self.upright(x, x + 1.1, y, y + 1.4, z0, self.shade(glass, 0.9, z0), labelled=False)
                    add((window, _BUILDING))
        add((self.side(front, height - 0.35, height, z0, z1, self.shade(roof, 1, z0), labelled=False), _BUILDING))
        edge = self.upright(x0, x1, height - 0.35, height, z0, self.shade(roof, 0.9, z0), labelled=False)
        add((edge, _BUILDING))

    def _add_park(self, front: float, sign: int, z0: float, z1: float) -> None:
        green = self.pick(((62, 104, 48), (84, 116, 52)), 10)
        x0, x1 = sorted((front + sign * 1.0, front + sign * 12.0))
        for patch in self.cuboid((x0, x1), (0, self.rng.uniform(0.7, 1.5)), (z0 + 0.5, z1), green):
            self.backdrop.append((patch._replace(edge=False), _VEGETATION))
        for z in sorted(self.rng.uniform(max(z0, 5.0), z1, int(self.rng.integers(1, 4))).tolist(), reverse=True):
            tree = self._tree(front + sign * self.rng.uniform(1.5, 5.0), z, self.rng.uniform(3, 6.5))
            self.backdrop.extend((patch, _VEGETATION) for patch in tree.patches)

    def _tree(self, x: float, z: float, height: float) -> _Item:
        """A trunk and a crown of overlapping balls."""
        bark = self.shade((94, 72, 52), 1, z)
        green = self.pick(((58, 112, 44), (86, 126, 46), (50, 96, 62), (128, 122, 44)), 10)
        trunk = self.upright(x - 0.16, x + 0.16, 0, 0.6 * height, z, bark)
        radius = self.rng.uniform(0.24, 0.34) * height
        crown = []
        for brightness in (0.72, 0.8, 0.92, 1.0, 1.1):
            dx, dy = self.rng.uniform(-0.7, 0.7), self.rng.uniform(-0.5, 0.5)
            center = (x + dx * radius, 0.72 * height + dy * radius, z)
            crown.append(self.ellipse(center, 0.75 * radius, 0.7 * radius, self.shade(green, brightness, z)))
        shadow = self.ellipse((x, 0, z), radius, 0.3 * radius, bark).points
        return _Item(_VEGETATION, "stuff", z, 0.0, [trunk._replace(edge=False), *crown], shadow)

    def _add_void(self) -> None:
        """Now and then a part without a label: the own bonnet, an unknown object, or the border of leaves."""
        if not self.chance(_VOID_PROBABILITY):
            return
        kind = int(self.rng.integers(3))
        if kind == 0:
            top, paint = self.rng.uniform(0.9, 0.95), self.pick(((58, 60, 66), (120, 30, 34), (160, 164, 170)), 10)
            for shift, factor in ((0.0, 0.8), (0.025, 1.0)):
                points = [(1 + 1.15 * c, 1.06 + (1.06 - top - shift) * s) for c, s in _CIRCLE]
                self.bonnet.append(_Patch(points, (paint[0] * factor, paint[1] * factor, paint[2] * factor)))
        elif kind == 1:
            x, z = self._free_spot(half_width=0.8, length=1.0, on_road=False) or (0.0, 9.0)
            grey = self.pick(((120, 124, 132), (150, 140, 150)), 15)
            patches = []
            for brightness in (0.8, 0.95, 1.1):
                dx = self.rng.uniform(-0.4, 0.4)
                center = (x + dx, 0.45, z)
                patches.append(self.ellipse(center, 0.7, 0.42, self.shade(grey, brightness, z)))
            self.items.append(_Item(_VEGETATION, "void", z, 0.0, patches, self.shadow(x - 0.8, x + 0.8, z, z + 0.8)))
        else:
            self.uncertain_leaves = True

    # What stands in the street

    def _free_spot(
        self, *, half_width: float, length: float, on_road: bool, z_range: tuple[float, float] = (4.6, 10.0)
    ) -> tuple[float, float] | None:
        """Finds a place (x, z) of its centre and near edge that is in view and not taken, and takes it."""
        left, right = self.curbs
        for _ in range(6):
            # Near places are more likely than far ones, as more of the picture shows them.
            z = z_range[0] + (z_range[1] - z_range[0]) * self.rng.random() ** 1.3
            if on_road:
                low, high = left + half_width, right - half_width
            elif self.chance(0.5):
                low, high = left - self.walk_width[0], left
            else:
                low, high = right, right + self.walk_width[1]
            x = self.rng.uniform(low, high) if low < high else (low + high) / 2
            outer = self.project(x - half_width, 0, z)[0], self.project(x + half_width, 0, z)[0]
            if outer[0] > -0.05 and outer[1] < 2.05 and self._take(x - half_width, x + half_width, z, z + length):
                return x, z
        return None

    def _take(self, x0: float, x1: float, z0: float, z1: float) -> bool:
        """Marks a rectangle of the ground as taken; returns False if a part of it already is."""
        for left, right, near, far in self._taken:
            if x0 < right and left < x1 and z0 < far and near < z1:
                return False
        self._taken.append((x0, x1, z0, z1))
        return True

    def _add_crowd(self) -> None:
        """Now and then a dense mass that nobody would label one by one."""
        if not self.chance(_CROWD_PROBABILITY):
            return
        width, length = self.rng.uniform(3.0, 4.5), 3.0
        spot = self._free_spot(half_width=width / 2, length=length, on_road=self.chance(0.7), z_range=(8.5, 12))
        if spot is None:
            return
        x, z = spot
        kind = int(self.rng.integers(4))
        make, class_id, spacing, palette = (
            (self._person, _PERSON, 0.5, _SHIRT_COLORS),
            (self._person, _PERSON, 0.5, _SHIRT_COLORS),
            (self._ball, _BALL, 0.55, _BALL_COLORS),
            (self._box, _BOX, 0.6, _BOX_COLORS),
        )[kind]
        members: list[_Item] = []
        for row in range(3):
            for step in np.arange(0, width, spacing).tolist():
                jitter = self.rng.uniform(-0.15, 0.15, 2).tolist()
                place = (x - width / 2 + step + jitter[0], 0.0, z + 0.8 * row + jitter[1])
                members.append(make(*place, color=self.pick(palette, 14)))
        members.sort(key=lambda item: -item.depth)
        patches = [patch for item in members for patch in item.patches]
        shadow = self.shadow(x - width / 2, x + width / 2, z, z + length)
        self.items.append(_Item(class_id, "crowd", z, 0.0, patches, shadow))

    def _add_things(self) -> None:
        """Adds rows, groups and piles until the scene is as full as it should be."""
        wanted = int(self.rng.integers(6, 12))
        arrangements: tuple[tuple[float, Callable[[], list[_Item]]], ...] = (
            (0.20, self._parked_row),
            (0.14, self._crossing_row),
            (0.08, self._single_car),
            (0.26, self._people),
            (0.16, self._box_pile),
            (0.16, self._ball_pile),
        )
        weights = np.array([weight for weight, _ in arrangements])
        added = 0
        for choice in self.rng.choice(len(arrangements), size=12, p=weights / weights.sum()).tolist():
            group = arrangements[choice][1]()
            self.items.extend(group)
            added += len(group)
            if added >= wanted:
                break

    def _parked_row(self) -> list[_Item]:
        """Cars behind each other along a curb."""
        is_right = self.chance(0.5)
        count = int(self.rng.integers(2, 4))
        z = self.rng.uniform(5.0, 7.5)
        x = self.curbs[is_right] + (-1.15 if is_right else 1.15)
        if not self._take(x - 0.9, x + 0.9, z - 0.5, z + 4.6 * count):
            return []
        cars = []
        for paint in self.pick_distinct(_CAR_COLORS, count, 14):
            cars.append(self._car(x + self.rng.uniform(-0.12, 0.12), z, along=True, paint=paint))
            z += self.rng.uniform(4.2, 4.8)
        return cars

    def _crossing_row(self) -> list[_Item]:
        """Cars bumper to bumper across the street, or side by side, as before a traffic light."""
        along = self.chance(0.5)
        spacing = self.rng.uniform(1.78, 1.95) if along else self.rng.uniform(3.2, 3.9)
        count = int(self.rng.integers(2, 5 if along else 4))
        z = self.rng.uniform(7.0, 11.5)
        width = spacing * count
        x = self.rng.uniform(-0.3, 0.3) * z
        if not self._take(x - width / 2, x + width / 2, z, z + 3):
            return []
        cars = []
        for position, paint in enumerate(self.pick_distinct(_CAR_COLORS, count, 14)):
            center = x - width / 2 + spacing * (position + 0.5)
            cars.append(self._car(center, z + self.rng.uniform(0, 0.9), along=along, paint=paint))
        return cars

    def _single_car(self) -> list[_Item]:
        spot = self._free_spot(half_width=0.95, length=4.5, on_road=True, z_range=(5.5, 14.0))
        return [self._car(*spot, along=True, paint=self.pick(_CAR_COLORS, 14))] if spot else []

    def _people(self) -> list[_Item]:
        """One walker, or a group whose members hide each other."""
        count = int(self.rng.choice([1, 2, 3, 4, 5], p=[0.28, 0.24, 0.26, 0.16, 0.06]))
        spacing = self.rng.uniform(0.66, 0.88)
        spot = self._free_spot(half_width=spacing * count / 2, length=1.2, on_road=self.chance(0.4), z_range=(4.4, 8.5))
        if spot is None:
            return []
        x, z = spot
        people = []
        for position, shirt in enumerate(self.pick_distinct(_SHIRT_COLORS, count, 14)):
            offset = spacing * (position - (count - 1) / 2) + self.rng.uniform(-0.08, 0.08)
            people.append(self._person(x + offset, 0.0, z + self.rng.uniform(0, 0.9), color=shirt))
        return people

    def _box_pile(self) -> list[_Item]:
        return self._pile(self._box, _BOX_COLORS, self.rng.uniform(0.8, 1.1))

    def _ball_pile(self) -> list[_Item]:
        return self._pile(self._ball, _BALL_COLORS, self.rng.uniform(0.85, 1.15))

    def _pile(self, make: Callable[..., _Item], palette: Sequence[Color], size: float) -> list[_Item]:
        """Boxes or balls of about one size: one alone, a row, or a row with a second layer on top."""
        base = int(self.rng.choice([1, 2, 3], p=[0.36, 0.36, 0.28]))
        upper = base - 1 if base > 1 and self.chance(0.5) else 0
        spot = self._free_spot(half_width=size * base / 2, length=size, on_road=self.chance(0.45), z_range=(4.6, 9.5))
        if spot is None:
            return []
        x, z = spot
        pile: list[_Item] = []
        colors = iter(self.pick_distinct(palette, base + upper, 12))
        for layer, count in enumerate((base, upper)):
            for position in range(count):
                offset = size * (0.98 * (position - (count - 1) / 2)) + self.rng.uniform(-0.04, 0.04)
                near = z + self.rng.uniform(0, 0.25) * (layer == 0)
                item = make(x + offset, 0.88 * size * layer, near, size=size, color=next(colors))
                if layer:
                    item.supports = pile[position : position + 2]
                pile.append(item)
        return pile

    # Objects

    def _car(self, x: float, z: float, *, along: bool, paint: Color) -> _Item:
        """A car seen from behind (or front) or, if not `along`, from the side; x is its centre, z its near end."""
        width, length, height = self.rng.uniform(1.65, 1.9), self.rng.uniform(3.6, 4.4), self.rng.uniform(1.4, 1.75)
        glass = (52.0, 62.0, 76.0)
        dark = (26.0, 26.0, 29.0)
        hip = 0.56 * height
        half, depth = (width / 2, length) if along else (length / 2, width)
        x0, x1, z1 = x - half, x + half, z + depth
        patches = self.cuboid((x0 + 0.06, x1 - 0.06), (0.0, 0.34), (z + 0.06, z1 - 0.06), dark)
        patches += self.cuboid((x0, x1), (0.26, hip), (z, z1), paint)
        inset_x, inset_z = (0.16, 0.2 * length) if along else (0.2 * length, 0.14)
        cabin_x, cabin_z = (x0 + inset_x, x1 - inset_x), (z + inset_z, z1 - inset_z * 0.9)
        patches += self.cuboid(cabin_x, (hip, height), cabin_z, paint)
        pane = self.shade(glass, 1, z)
        bottom, top = hip + 0.06, height - 0.1
        patches.append(self.upright(cabin_x[0] + 0.1, cabin_x[1] - 0.1, bottom, top, cabin_z[0], pane, labelled=False))
        side_x = cabin_x[0] if x0 > 0 else cabin_x[1]
        if x0 > 0 or x1 < 0:
            patches.append(self.side(side_x, bottom, top, cabin_z[0] + 0.15, cabin_z[1] - 0.15, pane, labelled=False))
        black = self.shade((18, 18, 20), 1, z)
        if along:
            lamp = self.shade(((225, 40, 30), (250, 245, 215))[int(self.rng.integers(2))], 1, z)
            for lamp_x in (x0 + 0.1, x1 - 0.42):
                patches.append(self.upright(lamp_x, lamp_x + 0.32, 0.55, 0.72, z, lamp, labelled=False))
                patches.append(self.upright(lamp_x - 0.04, lamp_x + 0.24, 0.0, 0.26, z, black, labelled=False))
            plate = self.shade((235, 235, 225), 1, z)
            patches.append(self.upright(x - 0.25, x + 0.25, 0.36, 0.5, z, plate, labelled=False))
        else:
            middle = self.upright(
                x - 0.05, x + 0.05, bottom, top, cabin_z[0], self.shade(paint, 0.88, z), labelled=False
            )
            patches.append(middle)
            for wheel_x in (x0 + 0.2 * length, x1 - 0.2 * length):
                patches.append(self.ellipse((wheel_x, 0.33, z), 0.34, 0.34, black))
                patches.append(self.ellipse((wheel_x, 0.33, z), 0.17, 0.17, self.shade((150, 150, 155), 1, z)))
        return _Item(_CAR, "instance", z, 0.0, patches, self.shadow(x0, x1, z, z1))

    def _person(self, x: float, y: float, z: float, *, color: Color) -> _Item:
        """A walker who faces the camera: legs, arms, trunk, head, hair."""
        height = self.rng.uniform(1.25, 1.5) if self.chance(0.2) else self.rng.uniform(1.65, 2.0)
        wide = height * self.rng.uniform(0.21, 0.25)
        hip, shoulder = 0.47 * height, 0.82 * height
        trousers = self.pick(((45, 50, 75), (60, 58, 56), (95, 80, 60), (30, 30, 34)), 10)
        skin = self.shade(self.pick(_SKIN_COLORS, 8), 1, z)
        hair = self.shade(self.pick(((45, 32, 24), (120, 84, 48), (24, 22, 22), (170, 150, 120)), 8), 1, z)
        step = self.rng.uniform(0.15, 0.5) * wide

        def flat(corners: Sequence[Point], color: Color, factor: float) -> _Patch:
            points = [self.project(x + wide * px, y + py, z) for px, py in corners]
            return _Patch(points, self.shade(color, factor, z), True, True)

        patches = [
            flat(((-0.62, hip), (0.1, hip), (-0.1 - step, 0.0), (-0.62 - step, 0.0)), trousers, 0.9),
            flat(((-0.1, hip), (0.62, hip), (0.62 + step, 0.0), (0.1 + step, 0.0)), trousers, 1.1),
            flat(((-0.7, shoulder), (-1.0, 0.78 * height), (-1.1, hip), (-0.8, hip)), color, 0.75),
            flat(((0.7, shoulder), (1.0, 0.78 * height), (1.1, hip), (0.8, hip)), color, 0.75),
            flat(((-0.85, shoulder), (0.85, shoulder), (0.68, 0.95 * hip), (-0.68, 0.95 * hip)), color, 1.0),
            self.ellipse((x, y + 0.91 * height, z), 0.075 * height, 0.095 * height, hair, edge=True),
            self.ellipse((x, y + 0.89 * height, z), 0.06 * height, 0.07 * height, skin, labelled=False),
        ]
        return _Item(_PERSON, "instance", z, y, patches, self.shadow(x - wide, x + wide, z, z + 0.5))

    def _box(self, x: float, y: float, z: float, *, color: Color, size: float = 0.6) -> _Item:
        """A cardboard box with a strip of tape."""
        half = 0.49 * size * self.rng.uniform(0.9, 1.0)
        height = 0.88 * size if size > 0.6 else size
        patches = self.cuboid((x - half, x + half), (y, y + height), (z, z + 2 * half), color)
        tape = self.shade((226, 208, 168), 0.95, z)
        patches.append(self.upright(x - 0.09 * size, x + 0.09 * size, y, y + height, z, tape, labelled=False))
        label_y = y + 0.2 * height
        sticker = self.shade((235, 235, 235), 0.95, z)
        left = x + 0.2 * size
        patches.append(
            self.upright(left, left + 0.18 * size, label_y, label_y + 0.16 * size, z, sticker, labelled=False)
        )
        return _Item(_BOX, "instance", z, y, patches, self.shadow(x - half, x + half, z, z + 2 * half))

    def _ball(self, x: float, y: float, z: float, *, color: Color, size: float = 0.6) -> _Item:
        """A bright ball with a stripe, darker at the bottom."""
        radius = 0.5 * size * self.rng.uniform(0.9, 1.02)
        center_y = y + radius
        lean = -0.18 if self.light_from_left else 0.18
        patches = [
            self.ellipse((x, center_y, z), radius, radius, self.shade(color, 0.68, z), edge=True),
            self.ellipse(
                (x + lean * radius, center_y + 0.15 * radius, z), 0.8 * radius, 0.78 * radius, self.shade(color, 1, z)
            )._replace(labelled=False),
        ]
        stripe = self.shade((245, 245, 245), 1, z)
        patches.append(self.ellipse((x, center_y, z), 0.9 * radius, 0.16 * radius, stripe, labelled=False))
        shine = (x + 2 * lean * radius, center_y + 0.5 * radius, z)
        patches.append(self.ellipse(shine, 0.16 * radius, 0.14 * radius, (255, 255, 255), labelled=False))
        return _Item(_BALL, "instance", z, y, patches, self.shadow(x - radius, x + radius, z, z + radius))


_CIRCLE = tuple((math.cos(2 * math.pi * step / 20), math.sin(2 * math.pi * step / 20)) for step in range(20))
