"""The backdrop of a scene: sky, ground and roadside, painted before any object."""

import dataclasses

import numpy as np

from deeplab2_like.data.scenes.classes import BUILDING, ROAD, SIDEWALK, SKY, VEGETATION
from deeplab2_like.data.scenes.colors import (
    ASPHALT_COLORS,
    CLOUD_COLORS,
    DISTANT_BUILDING_COLORS,
    DISTANT_TREE_COLORS,
    FACADE_COLORS,
    GRASS_COLORS,
    HEDGE_COLORS,
    SIDEWALK_COLORS,
    WINDOW_COLORS,
    chance,
    pick_color,
    scale_color,
)
from deeplab2_like.data.scenes.objects import Item, make_tree
from deeplab2_like.data.scenes.view import CIRCLE, Patch, View

# Patches with their classes, from far to near.
Backdrop = list[tuple[Patch, int]]

# Nearest and farthest z of the ground, in meters.
_NEAR, _FAR = 1.6, 150.0
# Windows that are farther away would be too small to see.
_FARTHEST_WINDOW = 32


@dataclasses.dataclass(frozen=True)
class Street:
    """The plan of the street, in meters; pairs are of the left and the right side.

    Attributes:
        curbs: x of the curbs, between which the road is.
        sidewalk_widths: Widths of the sidewalks.
    """

    curbs: tuple[float, float]
    sidewalk_widths: tuple[float, float]

    @classmethod
    def random(cls, rng: np.random.Generator) -> "Street":
        """Draws a street."""
        half_road = rng.uniform(2.7, 4.0)
        center = rng.uniform(-1.2, 1.2)
        left, right = rng.uniform(2.0, 3.6, 2).tolist()
        return cls((center - half_road, center + half_road), (left, right))


def make_backdrop(rng: np.random.Generator, view: View, street: Street) -> tuple[Backdrop, list[Item]]:
    """Makes sky, ground and roadside.

    Returns:
        The backdrop, and trees that are not part of it, as they stand between the objects.
    """
    backdrop = [*_make_sky(rng, view), *_make_lawn(rng, view), *_make_road(rng, view, street)]
    trees = []
    for is_right in (False, True):
        side, tree = _make_roadside(rng, view, street, is_right=is_right)
        backdrop += side
        trees += tree
    return backdrop, trees


def _make_sky(rng: np.random.Generator, view: View) -> Backdrop:
    """Makes the sky in bands, paler towards the horizon, and a few clouds."""
    sky: Backdrop = []
    num_bands = 6
    for band in range(num_bands):
        top = view.horizon * band / num_bands
        whiter = 0.45 * band / num_bands
        red, green, blue = (c * (1 - whiter) + 235 * whiter for c in view.sky_color)
        # Each band reaches down to the ground, where the next one covers it: no gap can open between two bands.
        sky.append((Patch([(-1, top), (3, top), (3, 1), (-1, 1)], (red, green, blue)), SKY))
    for _ in range(int(rng.integers(0, 5))):
        x, y = rng.uniform(0, 2), rng.uniform(0, 0.8 * view.horizon)
        for _ in range(3):
            x += rng.uniform(0.03, 0.12)
            radius = rng.uniform(0.04, 0.1)
            points = [(x + 1.6 * radius * c, y + 0.4 * radius * s) for c, s in CIRCLE]
            sky.append((Patch(points, pick_color(rng, CLOUD_COLORS, 8)), SKY))
    return sky


def _make_lawn(rng: np.random.Generator, view: View) -> Backdrop:
    """Makes a lawn up to the horizon, and a skyline of buildings or trees on the horizon."""
    grass = pick_color(rng, GRASS_COLORS, 8)
    lawn = [(-1.0, view.horizon), (3.0, view.horizon), (3.0, 1.1), (-1.0, 1.1)]
    patches: Backdrop = [(Patch(lawn, grass), VEGETATION)]

    skyline_class = BUILDING if chance(rng, 0.5) else VEGETATION
    palette = DISTANT_BUILDING_COLORS if skyline_class == BUILDING else DISTANT_TREE_COLORS
    x = -0.2  # From beyond the left edge of the picture to beyond the right one.
    while x < 2.2:
        step = rng.uniform(0.08, 0.25)
        height = rng.uniform(0.02, 0.09)
        top, bottom = view.horizon - height, view.horizon + 0.01
        color = view.shade(pick_color(rng, palette, 14), 1, 30)
        if skyline_class == BUILDING:
            points = [(x, top), (x + step, top), (x + step, bottom), (x, bottom)]
        else:
            points = [(x + step / 2 + 0.75 * step * c, bottom + 1.4 * height * min(s, 0)) for c, s in CIRCLE]
        patches.append((Patch(points, color), skyline_class))
        x += step
    return patches


def _make_road(rng: np.random.Generator, view: View, street: Street) -> Backdrop:
    """Makes the sidewalks with their joints, the road and its markings."""
    sidewalk = pick_color(rng, SIDEWALK_COLORS, 8)
    asphalt = pick_color(rng, ASPHALT_COLORS, 6)
    left, right = street.curbs
    outer = (left - street.sidewalk_widths[0], right + street.sidewalk_widths[1])
    patches: Backdrop = []

    def add(patch: Patch, class_id: int) -> None:
        patches.append((patch, class_id))

    # Large areas keep their color at any distance, as they are not shaded in parts.
    add(view.ground(*outer, _NEAR, _FAR, sidewalk)._replace(labeled=True, color=sidewalk), SIDEWALK)
    joint = scale_color(sidewalk, 0.8, 0.8, 0.8)
    for z in np.arange(3.0, 22.0, rng.uniform(1.0, 1.8)).tolist():
        add(view.ground(*outer, z, z + 0.012 * z, joint), SIDEWALK)
    for x in (left - street.sidewalk_widths[0] / 2, right + street.sidewalk_widths[1] / 2):
        add(view.ground(x - 0.03, x + 0.03, _NEAR, 40, joint), SIDEWALK)
    # The curb stone belongs to the sidewalk.
    add(view.ground(left - 0.22, right + 0.22, _NEAR, _FAR, (214, 210, 204)), SIDEWALK)
    add(view.ground(left, right, _NEAR, _FAR, asphalt)._replace(labeled=True, color=asphalt), ROAD)

    white = (222.0, 222.0, 216.0)
    center = (left + right) / 2
    dash = rng.uniform(1.5, 3.0)
    for z in np.arange(rng.uniform(1.6, 4.0), 60.0, 2 * dash).tolist():
        add(view.ground(center - 0.09, center + 0.09, z, z + dash, white), ROAD)
    if chance(rng, 0.35):  # A crosswalk.
        z = rng.uniform(6, 13)
        for x in np.arange(left + 0.3, right - 0.5, 1.0).tolist():
            add(view.ground(x, x + 0.5, z, z + 2.2, white), ROAD)
    return patches


def _make_roadside(
    rng: np.random.Generator, view: View, street: Street, *, is_right: bool
) -> tuple[Backdrop, list[Item]]:
    """Makes the houses and parks along one side, from far to near, and at most one tree at the curb."""
    sign = 1 if is_right else -1
    lawn_width = rng.uniform(0.6, 3.5) if chance(rng, 0.55) else 0.0
    front = street.curbs[is_right] + sign * (street.sidewalk_widths[is_right] + lawn_width)
    blocks = []
    z = rng.uniform(2.5, 5.0)
    while z < 70:
        length = rng.uniform(6, 15)
        blocks.append((z, z + length))
        z += length + (rng.uniform(0.5, 3) if chance(rng, 0.4) else 0.0)
    patches: Backdrop = []
    for z0, z1 in reversed(blocks):  # From far to near, as near ones hide far ones.
        make = _make_house if chance(rng, 0.6) else _make_park
        patches += make(rng, view, front, sign, z0, z1)
    if not chance(rng, 0.4):
        return patches, []
    # A tree between the parked cars and the walkers hides parts of both.
    x = street.curbs[is_right] + sign * rng.uniform(0.3, 0.7)
    return patches, [make_tree(rng, view, x, rng.uniform(8, 22), rng.uniform(2.4, 3.4))]


def _make_house(rng: np.random.Generator, view: View, front: float, sign: int, z0: float, z1: float) -> Backdrop:
    """Makes a house with windows and eaves; its facade is in the plane x = `front`."""
    height = rng.uniform(4, 10.5)
    color = pick_color(rng, FACADE_COLORS, 14)
    x0, x1 = sorted((front, front + sign * rng.uniform(7, 12)))
    patches = view.cuboid((x0, x1), (0, height), (z0, z1), color)
    glass = pick_color(rng, WINDOW_COLORS, 10)
    bright = view.shade(glass, view.side_light(left=sign > 0), z0)
    dim = view.shade(glass, 0.9, z0)
    for floor in range(int(height / 2.9)):
        y = 0.9 + 2.9 * floor
        if (front > 0) == (sign > 0):  # The camera, at x = 0, sees the facade.
            for z in np.arange(z0 + 0.8, z1 - 1.2, 2.3).tolist():
                if z < _FARTHEST_WINDOW:
                    patches.append(view.side(front, y, y + 1.4, z, z + 1.1, bright, labeled=False))
        for x in np.arange(x0 + 0.8, x1 - 1.2, 2.2).tolist():
            if z0 < _FARTHEST_WINDOW:
                patches.append(view.facing(x, x + 1.1, y, y + 1.4, z0, dim, labeled=False))
    eaves = scale_color(color, 0.55, 0.5, 0.5)
    patches.append(view.side(front, height - 0.35, height, z0, z1, view.shade(eaves, 1, z0), labeled=False))
    patches.append(view.facing(x0, x1, height - 0.35, height, z0, view.shade(eaves, 0.9, z0), labeled=False))
    return [(patch, BUILDING) for patch in patches]


def _make_park(rng: np.random.Generator, view: View, front: float, sign: int, z0: float, z1: float) -> Backdrop:
    """Makes a hedge and a few trees."""
    green = pick_color(rng, HEDGE_COLORS, 10)
    x0, x1 = sorted((front + sign * 1.0, front + sign * 12.0))
    hedge = view.cuboid((x0, x1), (0, rng.uniform(0.7, 1.5)), (z0 + 0.5, z1), green)
    patches = [patch._replace(edge=False) for patch in hedge]
    for z in sorted(rng.uniform(max(z0, 5.0), z1, int(rng.integers(1, 4))).tolist(), reverse=True):
        tree = make_tree(rng, view, front + sign * rng.uniform(1.5, 5.0), z, rng.uniform(3, 6.5))
        patches += tree.patches
    return [(patch, VEGETATION) for patch in patches]
