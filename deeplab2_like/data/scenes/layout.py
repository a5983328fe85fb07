"""The layout of a scene: camera, light, backdrop, and where the objects stand; no pixels."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from deeplab2_like.data.scenes.backdrop import Backdrop, Street, make_backdrop
from deeplab2_like.data.scenes.classes import BALL, BOX, PERSON, VEGETATION
from deeplab2_like.data.scenes.colors import (
    BALL_COLORS,
    BOX_COLORS,
    CAR_COLORS,
    HOOD_COLORS,
    SHIRT_COLORS,
    SKY_COLORS,
    UNKNOWN_OBJECT_COLORS,
    Color,
    chance,
    pick_color,
    pick_distinct_colors,
    scale_color,
)
from deeplab2_like.data.scenes.objects import Item, make_ball, make_box, make_car, make_person
from deeplab2_like.data.scenes.texture import Lighting
from deeplab2_like.data.scenes.view import CIRCLE, Patch, View

_CROWD_PROBABILITY = 0.16
_VOID_PROBABILITY = 0.27


@dataclasses.dataclass
class Scene:
    """A scene, ready to be painted.

    Attributes:
        lighting: Light and noise of the image.
        backdrop: Sky, ground and roadside, from far to near.
        items: The objects that stand on the ground, in any order.
        hood: The hood of the camera's own car, without a label; mostly empty.
        has_unlabeled_leaves: Whether the border between leaves and sky has no label.
    """

    lighting: Lighting
    backdrop: Backdrop
    items: list[Item]
    hood: list[Patch] = dataclasses.field(default_factory=list)
    has_unlabeled_leaves: bool = False


def make_scene(rng: np.random.Generator) -> Scene:
    """Draws a scene at random."""
    focal, horizon = rng.uniform(1.0, 1.25), rng.uniform(0.34, 0.46)
    vanishing_x, camera_height = rng.uniform(0.7, 1.3), rng.uniform(2.0, 2.8)
    light_from_left = bool(rng.random() < 0.5)
    lighting = Lighting.random(rng)
    view = View(focal, horizon, vanishing_x, camera_height, light_from_left, pick_color(rng, SKY_COLORS, 12))
    street = Street.random(rng)
    scene = Scene(lighting, *make_backdrop(rng, view, street))
    layout = _Layout(rng, view, street)
    layout.add_unlabeled_part(scene)
    layout.add_crowd(scene)
    layout.add_things(scene)
    return scene


class _Layout:
    """Places objects so that no two groups stand on the same ground."""

    def __init__(self, rng: np.random.Generator, view: View, street: Street) -> None:
        self._rng = rng
        self._view = view
        self._street = street
        self._occupied: list[tuple[float, float, float, float]] = []

    def add_unlabeled_part(self, scene: Scene) -> None:
        """Adds, in some scenes, a part without a label: the own hood, an unknown object, or the border of leaves."""
        rng, view = self._rng, self._view
        if not chance(rng, _VOID_PROBABILITY):
            return
        kind = int(rng.integers(3))
        if kind == 0:
            top, color = rng.uniform(0.9, 0.95), pick_color(rng, HOOD_COLORS, 10)
            for shift, factor in ((0.0, 0.8), (0.025, 1.0)):
                points = [(1 + 1.15 * c, 1.06 + (1.06 - top - shift) * s) for c, s in CIRCLE]
                scene.hood.append(Patch(points, scale_color(color, factor, factor, factor)))
        elif kind == 1:
            x, z = self._find_spot(half_width=0.8, length=1.0, on_road=False) or (0.0, 9.0)
            gray = pick_color(rng, UNKNOWN_OBJECT_COLORS, 15)
            patches = []
            for brightness in (0.8, 0.95, 1.1):
                center = (x + rng.uniform(-0.4, 0.4), 0.45, z)
                patches.append(view.ellipse(center, 0.7, 0.42, view.shade(gray, brightness, z)))
            shadow = view.shadow(x - 0.8, x + 0.8, z, z + 0.8)
            scene.items.append(Item(VEGETATION, "void", z, 0.0, patches, shadow))
        else:
            scene.has_unlabeled_leaves = True

    def add_crowd(self, scene: Scene) -> None:
        """Adds, in some scenes, objects so dense that an annotator would not label them one by one."""
        rng, view = self._rng, self._view
        if not chance(rng, _CROWD_PROBABILITY):
            return
        width, length = rng.uniform(3.0, 4.5), 3.0
        spot = self._find_spot(half_width=width / 2, length=length, on_road=chance(rng, 0.7), z_range=(8.5, 12))
        if spot is None:
            return
        x, z = spot
        kinds: tuple[tuple[Callable[..., Item], int, float, Sequence[Color]], ...] = (
            (make_person, PERSON, 0.5, SHIRT_COLORS),
            (make_person, PERSON, 0.5, SHIRT_COLORS),  # Twice as likely as the others.
            (make_ball, BALL, 0.55, BALL_COLORS),
            (make_box, BOX, 0.6, BOX_COLORS),
        )
        make, class_id, spacing, palette = kinds[int(rng.integers(4))]
        members: list[Item] = []
        for row in range(3):
            for step in np.arange(0, width, spacing).tolist():
                jitter = rng.uniform(-0.15, 0.15, 2).tolist()
                place = (x - width / 2 + step + jitter[0], 0.0, z + 0.8 * row + jitter[1])
                members.append(make(rng, view, *place, color=pick_color(rng, palette, 14)))
        # A crowd is one item, painted at once, so its members are sorted from far to near here.
        members.sort(key=lambda item: -item.depth)
        patches = [patch for item in members for patch in item.patches]
        shadow = view.shadow(x - width / 2, x + width / 2, z, z + length)
        scene.items.append(Item(class_id, "crowd", z, 0.0, patches, shadow))

    def add_things(self, scene: Scene) -> None:
        """Adds rows, groups and piles until the scene is full enough."""
        min_things = int(self._rng.integers(6, 12))
        arrangements: tuple[tuple[float, Callable[[], list[Item]]], ...] = (
            (0.20, self._parked_row),
            (0.14, self._crossing_row),
            (0.08, self._single_car),
            (0.26, self._people),
            (0.16, self._box_pile),
            (0.16, self._ball_pile),
        )
        weights = np.array([weight for weight, _ in arrangements])
        num_things = 0
        for choice in self._rng.choice(len(arrangements), size=12, p=weights / weights.sum()).tolist():
            group = arrangements[choice][1]()
            scene.items.extend(group)
            num_things += len(group)
            if num_things >= min_things:
                break

    def _find_spot(
        self, *, half_width: float, length: float, on_road: bool, z_range: tuple[float, float] = (4.6, 10.0)
    ) -> tuple[float, float] | None:
        """Finds a free spot in view and occupies it.

        Returns:
            x of its center and z of its near edge; None if a few tries find none.
        """
        rng = self._rng
        left, right = self._street.curbs
        for _ in range(6):
            # Near places are more likely than far ones, as more of the picture shows them.
            z = z_range[0] + (z_range[1] - z_range[0]) * rng.random() ** 1.3
            if on_road:
                low, high = left + half_width, right - half_width
            elif chance(rng, 0.5):
                low, high = left - self._street.sidewalk_widths[0], left
            else:
                low, high = right, right + self._street.sidewalk_widths[1]
            x = rng.uniform(low, high) if low < high else (low + high) / 2
            first, last = (self._view.project(edge, 0, z)[0] for edge in (x - half_width, x + half_width))
            is_in_view = first > -0.05 and last < 2.05
            if is_in_view and self._occupy(x - half_width, x + half_width, z, z + length):
                return x, z
        return None

    def _occupy(self, x0: float, x1: float, z0: float, z1: float) -> bool:
        """Marks a rectangle of the ground as occupied; returns False, and marks nothing, if a part of it already is."""
        for left, right, near, far in self._occupied:
            if x0 < right and left < x1 and z0 < far and near < z1:
                return False
        self._occupied.append((x0, x1, z0, z1))
        return True

    def _parked_row(self) -> list[Item]:
        """Places cars behind each other along a curb."""
        rng = self._rng
        is_right = chance(rng, 0.5)
        num_cars = int(rng.integers(2, 4))
        z = rng.uniform(5.0, 7.5)
        x = self._street.curbs[is_right] + (-1.15 if is_right else 1.15)
        if not self._occupy(x - 0.9, x + 0.9, z - 0.5, z + 4.6 * num_cars):
            return []  # No second try: `add_things` draws another group.
        cars = []
        for color in pick_distinct_colors(rng, CAR_COLORS, num_cars, 14):
            cars.append(make_car(rng, self._view, x + rng.uniform(-0.12, 0.12), z, along=True, color=color))
            z += rng.uniform(4.2, 4.8)
        return cars

    def _crossing_row(self) -> list[Item]:
        """Places cars bumper to bumper across the street, or side by side, as before a traffic light."""
        rng = self._rng
        along = chance(rng, 0.5)
        spacing = rng.uniform(1.78, 1.95) if along else rng.uniform(3.2, 3.9)
        num_cars = int(rng.integers(2, 5 if along else 4))
        z = rng.uniform(7.0, 11.5)
        width = spacing * num_cars
        x = rng.uniform(-0.3, 0.3) * z
        if not self._occupy(x - width / 2, x + width / 2, z, z + 3):
            return []
        cars = []
        for position, color in enumerate(pick_distinct_colors(rng, CAR_COLORS, num_cars, 14)):
            center = x - width / 2 + spacing * (position + 0.5)
            cars.append(make_car(rng, self._view, center, z + rng.uniform(0, 0.9), along=along, color=color))
        return cars

    def _single_car(self) -> list[Item]:
        spot = self._find_spot(half_width=0.95, length=4.5, on_road=True, z_range=(5.5, 14.0))
        if spot is None:
            return []
        color = pick_color(self._rng, CAR_COLORS, 14)
        return [make_car(self._rng, self._view, *spot, along=True, color=color)]

    def _people(self) -> list[Item]:
        """Places one walker, or a group whose members hide each other."""
        rng = self._rng
        num_people = int(rng.choice([1, 2, 3, 4, 5], p=[0.28, 0.24, 0.26, 0.16, 0.06]))
        spacing = rng.uniform(0.66, 0.88)
        half_width, on_road = spacing * num_people / 2, chance(rng, 0.4)
        spot = self._find_spot(half_width=half_width, length=1.2, on_road=on_road, z_range=(4.4, 8.5))
        if spot is None:
            return []
        x, z = spot
        people = []
        for position, shirt in enumerate(pick_distinct_colors(rng, SHIRT_COLORS, num_people, 14)):
            offset = spacing * (position - (num_people - 1) / 2) + rng.uniform(-0.08, 0.08)
            people.append(make_person(rng, self._view, x + offset, 0.0, z + rng.uniform(0, 0.9), color=shirt))
        return people

    def _box_pile(self) -> list[Item]:
        return self._pile(make_box, BOX_COLORS, self._rng.uniform(0.8, 1.1))

    def _ball_pile(self) -> list[Item]:
        return self._pile(make_ball, BALL_COLORS, self._rng.uniform(0.85, 1.15))

    def _pile(self, make: Callable[..., Item], palette: Sequence[Color], size: float) -> list[Item]:
        """Places boxes or balls of about one size: one alone, a row, or a row with a second layer on top."""
        rng = self._rng
        num_base = int(rng.choice([1, 2, 3], p=[0.36, 0.36, 0.28]))
        num_upper = num_base - 1 if num_base > 1 and chance(rng, 0.5) else 0
        half_width, on_road = size * num_base / 2, chance(rng, 0.45)
        spot = self._find_spot(half_width=half_width, length=size, on_road=on_road, z_range=(4.6, 9.5))
        if spot is None:
            return []
        x, z = spot
        pile: list[Item] = []
        colors = iter(pick_distinct_colors(rng, palette, num_base + num_upper, 12))
        for layer, num_members in enumerate((num_base, num_upper)):
            for position in range(num_members):
                offset = size * (0.98 * (position - (num_members - 1) / 2)) + rng.uniform(-0.04, 0.04)
                near = z + rng.uniform(0, 0.25) * (layer == 0)
                # A layer of boxes is 0.88 high; balls sink a little between those below.
                item = make(rng, self._view, x + offset, 0.88 * size * layer, near, size=size, color=next(colors))
                if layer:
                    item.supports = pile[position : position + 2]  # It lies on the gap between two of the lower layer.
                pile.append(item)
        return pile
