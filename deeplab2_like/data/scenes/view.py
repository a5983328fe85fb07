"""Camera and light of a scene: turn shapes of the world, in meters, into colored polygons on the picture plane."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from deeplab2_like.data.scenes.colors import Color

Point = tuple[float, float]

# Corners of the polygon that stands for a circle of radius 1.
CIRCLE = tuple((math.cos(2 * math.pi * step / 20), math.sin(2 * math.pi * step / 20)) for step in range(20))


class Patch(NamedTuple):
    """One filled polygon on the picture plane.

    Attributes:
        points: Corners (x, y), x in 0..2 and y in 0..1 inside the picture.
        color: Red, green, blue, 0..255.
        labeled: Whether the polygon belongs to the outline of its object; decoration inside it need not.
        edge: Whether to draw a dark line along the border.
    """

    points: Sequence[Point]
    color: Color
    labeled: bool = True
    edge: bool = False


@dataclasses.dataclass(frozen=True)
class View:
    """A pinhole camera that looks along the street, and the light.

    Attributes:
        focal: Focal length, in heights of the picture.
        horizon: y of the horizon on the picture plane.
        vanishing_x: x of the vanishing point on the picture plane.
        camera_height: In meters.
        light_from_left: Whether the light comes from the left.
        sky_color: Distant objects fade into it.
    """

    focal: float
    horizon: float
    vanishing_x: float
    camera_height: float
    light_from_left: bool
    sky_color: Color

    def project(self, x: float, y: float, z: float) -> Point:
        """Projects a point of the world, in meters, to (x, y) on the picture plane."""
        return (
            self.vanishing_x + self.focal * x / z,
            self.horizon + self.focal * (self.camera_height - y) / z,
        )

    def shade(self, color: Color, factor: float, z: float) -> Color:
        """Brightens a color by a factor and fades it into the sky with the distance z."""
        haze = min(0.45, z / 130)  # Distant objects stay visible.
        red, green, blue = (
            min(255.0, max(0.0, c * factor * (1 - haze) + s * haze)) for c, s in zip(color, self.sky_color, strict=True)
        )
        return (red, green, blue)

    def side_light(self, *, left: bool) -> float:
        """Returns the brightness of faces that look to the left or to the right."""
        # A lit side is brighter, and a shaded side darker, than the front (0.88, see `cuboid`).
        return 1.05 if left == self.light_from_left else 0.66

    def ground(self, x0: float, x1: float, z0: float, z1: float, color: Color) -> Patch:
        """Makes an unlabeled rectangle on the ground."""
        corners = ((x0, z0), (x1, z0), (x1, z1), (x0, z1))
        return Patch([self.project(x, 0, z) for x, z in corners], self.shade(color, 1, (z0 + z1) / 3), labeled=False)

    def facing(
        self, x0: float, x1: float, y0: float, y1: float, z: float, color: Color, *, labeled: bool = True
    ) -> Patch:
        """Makes an upright rectangle that faces the camera; it has an edge if it is labeled."""
        left, top = self.project(x0, y1, z)
        right, bottom = self.project(x1, y0, z)
        return Patch([(left, top), (right, top), (right, bottom), (left, bottom)], color, labeled, labeled)

    def side(
        self, x: float, y0: float, y1: float, z0: float, z1: float, color: Color, *, labeled: bool = True
    ) -> Patch:
        """Makes an upright rectangle along the street, in the plane x; it has an edge if it is labeled."""
        corners = ((y0, z0), (y1, z0), (y1, z1), (y0, z1))
        return Patch([self.project(x, y, z) for y, z in corners], color, labeled, labeled)

    def ellipse(
        self,
        center: tuple[float, float, float],
        radius_x: float,
        radius_y: float,
        color: Color,
        *,
        labeled: bool = True,
        edge: bool = False,
    ) -> Patch:
        """Makes an ellipse that faces the camera; `center` is (x, y, z), and the radii are in meters."""
        x, y = self.project(*center)
        scale = self.focal / center[2]
        points = [(x + scale * radius_x * c, y + scale * radius_y * s) for c, s in CIRCLE]
        return Patch(points, color, labeled, edge)

    def cuboid(
        self, x: tuple[float, float], y: tuple[float, float], z: tuple[float, float], color: Color
    ) -> list[Patch]:
        """Makes the faces of a cuboid that the camera sees, from far to near: top, one side, front."""
        (x0, x1), (y0, y1), (z0, z1) = x, y, z
        patches = []
        if y1 < self.camera_height:
            corners = ((x0, z0), (x1, z0), (x1, z1), (x0, z1))
            top = [self.project(x, y1, z) for x, z in corners]
            patches.append(Patch(top, self.shade(color, 1.22, z0), True, True))
        # The camera is at x = 0: it sees the side that is turned towards it, and no side of a cuboid in front of it.
        if x0 > 0:
            patches.append(self.side(x0, y0, y1, z0, z1, self.shade(color, self.side_light(left=True), z0)))
        elif x1 < 0:
            patches.append(self.side(x1, y0, y1, z0, z1, self.shade(color, self.side_light(left=False), z0)))
        patches.append(self.facing(x0, x1, y0, y1, z0, self.shade(color, 0.88, z0)))
        return patches

    def shadow(self, x0: float, x1: float, z0: float, z1: float) -> list[Point]:
        """Returns the corners of the shadow of an object with this footprint; it reaches away from the light."""
        reach = 0.35 * (x1 - x0)
        x0, x1 = (x0, x1 + reach) if self.light_from_left else (x0 - reach, x1)
        return [self.project(x, 0, z) for x, z in ((x0, z0 - 0.15), (x1, z0 - 0.15), (x1, z1), (x0, z1))]
