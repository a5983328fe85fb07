"""The objects that stand in the street, each a list of polygons."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from deeplab2_like.data.scenes.classes import BALL, BOX, CAR, PERSON, VEGETATION
from deeplab2_like.data.scenes.colors import (
    CROWN_COLORS,
    HAIR_COLORS,
    SKIN_COLORS,
    TROUSER_COLORS,
    Color,
    chance,
    pick_color,
)
from deeplab2_like.data.scenes.view import Patch, Point, View


@dataclasses.dataclass
class Item:
    """An object, or a crowd of objects, that stands in the street.

    Attributes:
        class_id: Its class.
        kind: How it is labeled.
        depth: z of its nearest point, in meters.
        elevation: y of its lowest point, in meters.
        patches: Its polygons, in painting order.
        shadow: Polygon on the ground, on the picture plane.
        supports: Items it lies on.
    """

    class_id: int
    kind: Literal["instance", "crowd", "stuff", "void"]
    depth: float
    elevation: float
    patches: list[Patch]
    shadow: Sequence[Point] = ()
    supports: Sequence["Item"] = ()


def make_tree(rng: np.random.Generator, view: View, x: float, z: float, height: float) -> Item:
    """Makes a trunk and a crown of overlapping ellipses."""
    bark = view.shade((94, 72, 52), 1, z)
    green = pick_color(rng, CROWN_COLORS, 10)
    trunk = view.facing(x - 0.16, x + 0.16, 0, 0.6 * height, z, bark)
    radius = rng.uniform(0.24, 0.34) * height
    crown = []
    for brightness in (0.72, 0.8, 0.92, 1.0, 1.1):
        dx, dy = rng.uniform(-0.7, 0.7), rng.uniform(-0.5, 0.5)
        center = (x + dx * radius, 0.72 * height + dy * radius, z)
        crown.append(view.ellipse(center, 0.75 * radius, 0.7 * radius, view.shade(green, brightness, z)))
    shadow = view.ellipse((x, 0, z), radius, 0.3 * radius, bark).points
    return Item(VEGETATION, "stuff", z, 0.0, [trunk._replace(edge=False), *crown], shadow)


def make_car(rng: np.random.Generator, view: View, x: float, z: float, *, along: bool, color: Color) -> Item:
    """Makes a car.

    Args:
        rng: Source of its sizes.
        view: Camera and light.
        x: Its center.
        z: Its near end.
        along: Whether it stands along the street, seen from behind or in front; else it is seen from the side.
        color: The color of its body.
    """
    width, length, height = rng.uniform(1.65, 1.9), rng.uniform(3.6, 4.4), rng.uniform(1.4, 1.75)
    dark = (26.0, 26.0, 29.0)
    hip = 0.56 * height
    half, depth = (width / 2, length) if along else (length / 2, width)
    x0, x1, z1 = x - half, x + half, z + depth
    # Underbody, body, cabin, then the parts on them.
    patches = view.cuboid((x0 + 0.06, x1 - 0.06), (0.0, 0.34), (z + 0.06, z1 - 0.06), dark)
    patches += view.cuboid((x0, x1), (0.26, hip), (z, z1), color)
    inset_x, inset_z = (0.16, 0.2 * length) if along else (0.2 * length, 0.14)
    cabin_x, cabin_z = (x0 + inset_x, x1 - inset_x), (z + inset_z, z1 - inset_z * 0.9)
    patches += view.cuboid(cabin_x, (hip, height), cabin_z, color)
    glass = view.shade((52.0, 62.0, 76.0), 1, z)
    bottom, top = hip + 0.06, height - 0.1
    patches.append(view.facing(cabin_x[0] + 0.1, cabin_x[1] - 0.1, bottom, top, cabin_z[0], glass, labeled=False))
    side_x = cabin_x[0] if x0 > 0 else cabin_x[1]
    if x0 > 0 or x1 < 0:
        patches.append(view.side(side_x, bottom, top, cabin_z[0] + 0.15, cabin_z[1] - 0.15, glass, labeled=False))
    if along:
        patches += _car_end(rng, view, x, (x0, x1), z)
    else:
        door = view.shade(color, 0.88, z)
        patches.append(view.facing(x - 0.05, x + 0.05, bottom, top, cabin_z[0], door, labeled=False))
        patches += _car_wheels(view, (x0 + 0.2 * length, x1 - 0.2 * length), z)
    return Item(CAR, "instance", z, 0.0, patches, view.shadow(x0, x1, z, z1))


def _car_end(rng: np.random.Generator, view: View, x: float, extent: tuple[float, float], z: float) -> list[Patch]:
    """Makes lamps, tires and license plate of a car seen from behind (red lamps) or in front (white lamps)."""
    tire = view.shade((18, 18, 20), 1, z)
    lamp = view.shade(((225, 40, 30), (250, 245, 215))[int(rng.integers(2))], 1, z)
    patches = []
    for lamp_x in (extent[0] + 0.1, extent[1] - 0.42):
        patches.append(view.facing(lamp_x, lamp_x + 0.32, 0.55, 0.72, z, lamp, labeled=False))
        patches.append(view.facing(lamp_x - 0.04, lamp_x + 0.24, 0.0, 0.26, z, tire, labeled=False))
    plate = view.shade((235, 235, 225), 1, z)
    patches.append(view.facing(x - 0.25, x + 0.25, 0.36, 0.5, z, plate, labeled=False))
    return patches


def _car_wheels(view: View, centers: Sequence[float], z: float) -> list[Patch]:
    """Makes the wheels of a car seen from the side."""
    tire, rim = view.shade((18, 18, 20), 1, z), view.shade((150, 150, 155), 1, z)
    patches = []
    for x in centers:
        patches.append(view.ellipse((x, 0.33, z), 0.34, 0.34, tire))
        patches.append(view.ellipse((x, 0.33, z), 0.17, 0.17, rim))
    return patches


def make_person(rng: np.random.Generator, view: View, x: float, y: float, z: float, *, color: Color) -> Item:
    """Makes a walker who faces the camera: legs, arms, trunk, head, hair; `color` is that of the shirt."""
    height = rng.uniform(1.25, 1.5) if chance(rng, 0.2) else rng.uniform(1.65, 2.0)
    wide = height * rng.uniform(0.21, 0.25)
    hip, shoulder = 0.47 * height, 0.82 * height
    trousers = pick_color(rng, TROUSER_COLORS, 10)
    skin = view.shade(pick_color(rng, SKIN_COLORS, 8), 1, z)
    hair = view.shade(pick_color(rng, HAIR_COLORS, 8), 1, z)
    step = rng.uniform(0.15, 0.5) * wide

    def flat(corners: Sequence[Point], color: Color, factor: float) -> Patch:
        points = [view.project(x + wide * px, y + py, z) for px, py in corners]
        return Patch(points, view.shade(color, factor, z), True, True)

    patches = [
        flat(((-0.62, hip), (0.1, hip), (-0.1 - step, 0.0), (-0.62 - step, 0.0)), trousers, 0.9),
        flat(((-0.1, hip), (0.62, hip), (0.62 + step, 0.0), (0.1 + step, 0.0)), trousers, 1.1),
        flat(((-0.7, shoulder), (-1.0, 0.78 * height), (-1.1, hip), (-0.8, hip)), color, 0.75),
        flat(((0.7, shoulder), (1.0, 0.78 * height), (1.1, hip), (0.8, hip)), color, 0.75),
        flat(((-0.85, shoulder), (0.85, shoulder), (0.68, 0.95 * hip), (-0.68, 0.95 * hip)), color, 1.0),
        view.ellipse((x, y + 0.91 * height, z), 0.075 * height, 0.095 * height, hair, edge=True),
        view.ellipse((x, y + 0.89 * height, z), 0.06 * height, 0.07 * height, skin, labeled=False),
    ]
    return Item(PERSON, "instance", z, y, patches, view.shadow(x - wide, x + wide, z, z + 0.5))


def make_box(
    rng: np.random.Generator, view: View, x: float, y: float, z: float, *, color: Color, size: float = 0.6
) -> Item:
    """Makes a cardboard box with a strip of tape and a sticker."""
    half = 0.49 * size * rng.uniform(0.9, 1.0)
    height = 0.88 * size if size > 0.6 else size  # The larger boxes are those of piles, whose layers have this height.
    patches = view.cuboid((x - half, x + half), (y, y + height), (z, z + 2 * half), color)
    tape = view.shade((226, 208, 168), 0.95, z)
    patches.append(view.facing(x - 0.09 * size, x + 0.09 * size, y, y + height, z, tape, labeled=False))
    bottom = y + 0.2 * height
    sticker = view.shade((235, 235, 235), 0.95, z)
    left = x + 0.2 * size
    patches.append(view.facing(left, left + 0.18 * size, bottom, bottom + 0.16 * size, z, sticker, labeled=False))
    return Item(BOX, "instance", z, y, patches, view.shadow(x - half, x + half, z, z + 2 * half))


def make_ball(
    rng: np.random.Generator, view: View, x: float, y: float, z: float, *, color: Color, size: float = 0.6
) -> Item:
    """Makes a bright ball with a stripe and a highlight, darker on the side away from the light."""
    radius = 0.5 * size * rng.uniform(0.9, 1.02)
    center_y = y + radius
    lean = -0.18 if view.light_from_left else 0.18
    center, lit_center = (x, center_y, z), (x + lean * radius, center_y + 0.15 * radius, z)
    highlight = (x + 2 * lean * radius, center_y + 0.5 * radius, z)
    stripe = view.shade((245, 245, 245), 1, z)
    patches = [
        view.ellipse(center, radius, radius, view.shade(color, 0.68, z), edge=True),
        view.ellipse(lit_center, 0.8 * radius, 0.78 * radius, view.shade(color, 1, z), labeled=False),
        view.ellipse(center, 0.9 * radius, 0.16 * radius, stripe, labeled=False),
        view.ellipse(highlight, 0.16 * radius, 0.14 * radius, (255, 255, 255), labeled=False),
    ]
    return Item(BALL, "instance", z, y, patches, view.shadow(x - radius, x + radius, z, z + radius))
