"""Palettes, and random choices from them."""

from collections.abc import Sequence

import numpy as np

# Red, green and blue, 0..255, not rounded.
Color = tuple[float, float, float]

CAR_COLORS: tuple[Color, ...] = (
    (190, 30, 35),
    (35, 60, 165),
    (225, 225, 228),
    (150, 155, 162),
    (45, 48, 56),
    (30, 110, 120),
    (215, 175, 40),
    (120, 25, 70),
)
BALL_COLORS: tuple[Color, ...] = (
    (250, 60, 200),
    (255, 110, 20),
    (40, 220, 230),
    (250, 235, 60),
    (150, 70, 240),
    (90, 240, 90),
)
BOX_COLORS: tuple[Color, ...] = (
    (206, 146, 62),
    (164, 108, 40),
    (232, 186, 104),
    (184, 130, 56),
    (216, 132, 48),
    (196, 160, 92),
)
SHIRT_COLORS: tuple[Color, ...] = (
    (210, 50, 50),
    (60, 100, 210),
    (240, 240, 235),
    (245, 200, 60),
    (60, 160, 90),
    (160, 80, 170),
    (235, 130, 60),
    (40, 45, 60),
)
TROUSER_COLORS: tuple[Color, ...] = ((45, 50, 75), (60, 58, 56), (95, 80, 60), (30, 30, 34))
SKIN_COLORS: tuple[Color, ...] = ((240, 200, 170), (205, 150, 115), (140, 95, 65), (225, 175, 145))
HAIR_COLORS: tuple[Color, ...] = ((45, 32, 24), (120, 84, 48), (24, 22, 22), (170, 150, 120))
FACADE_COLORS: tuple[Color, ...] = (
    (176, 96, 74),
    (205, 178, 140),
    (186, 120, 100),
    (214, 200, 178),
    (150, 110, 92),
    (196, 142, 110),
)
WINDOW_COLORS: tuple[Color, ...] = ((70, 84, 104), (96, 108, 122), (190, 176, 130))
SKY_COLORS: tuple[Color, ...] = ((120, 170, 225), (165, 195, 225), (195, 205, 218), (215, 208, 212))
CLOUD_COLORS: tuple[Color, ...] = ((228, 230, 234),)
GRASS_COLORS: tuple[Color, ...] = ((96, 132, 58), (116, 140, 70), (84, 120, 62))
HEDGE_COLORS: tuple[Color, ...] = ((62, 104, 48), (84, 116, 52))
CROWN_COLORS: tuple[Color, ...] = ((58, 112, 44), (86, 126, 46), (50, 96, 62), (128, 122, 44))
DISTANT_BUILDING_COLORS: tuple[Color, ...] = ((168, 132, 116),)
DISTANT_TREE_COLORS: tuple[Color, ...] = ((92, 122, 80),)
SIDEWALK_COLORS: tuple[Color, ...] = ((176, 176, 190), (164, 166, 178), (188, 184, 188))
ASPHALT_COLORS: tuple[Color, ...] = ((88, 88, 94), (104, 102, 102), (74, 76, 84))
HOOD_COLORS: tuple[Color, ...] = ((58, 60, 66), (120, 30, 34), (160, 164, 170))
UNKNOWN_OBJECT_COLORS: tuple[Color, ...] = ((120, 124, 132), (150, 140, 150))


def scale_color(color: Color, red: float, green: float, blue: float) -> Color:
    """Multiplies the channels of a color, each by its own factor."""
    return (color[0] * red, color[1] * green, color[2] * blue)


def pick_color(rng: np.random.Generator, palette: Sequence[Color], jitter: float) -> Color:
    """Picks a color of a palette and varies it by up to `jitter` gray levels per channel and again in brightness."""
    red, green, blue = palette[int(rng.integers(len(palette)))]
    shift = rng.uniform(-jitter, jitter, 4).tolist()
    return (red + shift[0] + shift[3], green + shift[1] + shift[3], blue + shift[2] + shift[3])


def pick_distinct_colors(
    rng: np.random.Generator, palette: Sequence[Color], num_colors: int, jitter: float
) -> list[Color]:
    """Picks colors for the members of a group; no two are from the same palette entry while there are enough."""
    order = rng.permutation(len(palette)).tolist()
    return [pick_color(rng, (palette[order[i % len(palette)]],), jitter) for i in range(num_colors)]


def chance(rng: np.random.Generator, probability: float) -> bool:
    """Returns True with this probability."""
    return bool(rng.random() < probability)
