"""Pictures of panoptic maps: colors, overlays on images, comparisons. All images are uint8 RGB [H, W, 3]."""

import colorsys
from collections.abc import Sequence

import cv2
import numpy as np

from deeplab2_like.data.dataset_info import Category, DatasetInfo
from deeplab2_like.data.label_runs import find_runs, list_segments
from deeplab2_like.data.panoptic_label import classes_of_values
from deeplab2_like.errors import UserError

_FONT = cv2.FONT_HERSHEY_SIMPLEX
_WHITE = (255, 255, 255)
_DARK = (24, 24, 28)

# A segment gets its name in the picture if it covers at least this fraction of it.
_MIN_NAMED_FRACTION = 0.004

# An image is dark if 95% of its values are below the first, and no more than 0.5% above the second.
_DARK_BELOW, _BRIGHT_ABOVE = 100, 200

# Pictures side by side are upsampled until they are at least this high, so that their captions can be read,
_MIN_PANEL_HEIGHT = 240
# but not beyond this width: a strip of one row of 8000 pixels would become a picture of gigabytes.
_MAX_PANEL_WIDTH = 8192


def colorize_panoptic(panoptic: np.ndarray, dataset_info: DatasetInfo) -> np.ndarray:
    """Colors a panoptic map: the class gives the color, the instance its shade; void is black.

    Args:
        panoptic: int32 [H, W], panoptic map.
        dataset_info: The meaning of the map.

    Returns:
        uint8 [H, W, 3].

    Raises:
        UserError: If the map holds an unknown class.
    """
    flat = panoptic.reshape(-1)  # [H*W]
    if flat.size == 0:
        return np.zeros((*panoptic.shape, 3), np.uint8)
    ends, lengths = find_runs(flat)
    values, index = np.unique(flat[ends], return_inverse=True)
    classes = classes_of_values(values, dataset_info, name="panoptic")
    colors = np.zeros((values.size, 3), np.uint8)
    for row, (value, class_id) in enumerate(zip(values.tolist(), classes.tolist(), strict=True)):
        if class_id >= 0:
            colors[row] = _shade(dataset_info.categories[class_id], value % dataset_info.label_divisor)
    return np.repeat(colors[index], lengths, axis=0).reshape(*panoptic.shape, 3)  # [H, W, 3]


def draw_overlay(
    image: np.ndarray,
    panoptic: np.ndarray,
    dataset_info: DatasetInfo,
    labels: bool = True,
    opacity: float = 0.55,
) -> np.ndarray:
    """Blends a panoptic map over its image, with the borders of the segments and the names of the larger ones.

    Args:
        image: uint8 [H, W, 3].
        panoptic: int32 [H, W], panoptic map.
        dataset_info: The meaning of the map.
        labels: Whether to write class names.
        opacity: Weight of the colors, 0..1. Void shows the darkened image.

    Returns:
        uint8 [H, W, 3]. Borders of things are white, those between stuff are dark.

    Raises:
        UserError: If the sizes differ or the map holds an unknown class.
    """
    if image.dtype != np.uint8 or image.shape != (*panoptic.shape, 3):
        raise UserError(
            f"The image has shape {image.shape} and type {image.dtype}, the panoptic map shape {panoptic.shape}; the "
            "image must be uint8 [H, W, 3] of the map's height and width."
        )
    picture = cv2.addWeighted(image, 1.0 - opacity, colorize_panoptic(panoptic, dataset_info), opacity, 0.0)
    thickness = max(1, round(min(panoptic.shape) / 400))
    class_map = panoptic // dataset_info.label_divisor
    things = np.isin(class_map, dataset_info.thing_classes)
    borders = _borders(panoptic)
    for kind, color in ((borders & ~_touches(things), _DARK), (borders & _touches(things), _WHITE)):
        kernel = np.ones((thickness, thickness), np.uint8)
        picture[cv2.dilate(kind.astype(np.uint8), kernel).astype(bool)] = color
    if labels:
        _write_names(picture, panoptic, dataset_info)
    return picture


def side_by_side(
    image: np.ndarray,
    ground_truth: np.ndarray | None,
    prediction: np.ndarray | None,
    dataset_info: DatasetInfo,
    captions: bool = True,
) -> np.ndarray:
    """Shows an image, its ground truth and its prediction next to each other.

    Args:
        image: uint8 [H, W, 3].
        ground_truth: int32 [H, W], panoptic map, or None to leave the panel out.
        prediction: int32 [H, W], panoptic map, or None to leave the panel out.
        dataset_info: The meaning of the maps.
        captions: Whether to write its title above each panel.

    Returns:
        uint8 [H', W', 3]; small images are upsampled by a whole factor.

    Raises:
        UserError: If the sizes differ or a map holds an unknown class.
    """
    factor = max(1, min(-(-_MIN_PANEL_HEIGHT // image.shape[0]), _MAX_PANEL_WIDTH // image.shape[1]))

    def upsample(pixels: np.ndarray) -> np.ndarray:
        return pixels.repeat(factor, axis=0).repeat(factor, axis=1)

    panels = [("image", upsample(image))]
    for title, panoptic in (("ground truth", ground_truth), ("prediction", prediction)):
        if panoptic is not None:
            panels.append((title, draw_overlay(upsample(image), upsample(panoptic), dataset_info)))
    pictures = [caption(picture, title) if captions else picture for title, picture in panels]
    return contact_sheet(pictures, columns=len(pictures))


def contact_sheet(images: Sequence[np.ndarray], columns: int | None = None, gap: int = 6) -> np.ndarray:
    """Arranges pictures in a grid on a dark background.

    Args:
        images: uint8 [H, W, 3] each, of any sizes; smaller ones are centered in their cell.
        columns: Pictures per row; by default about as many as there are rows.
        gap: Pixels between the pictures and around them.

    Returns:
        uint8 [H', W', 3].

    Raises:
        UserError: If there are no images.
    """
    if not images:
        raise UserError("A contact sheet needs at least one image.")
    columns = columns or int(np.ceil(np.sqrt(len(images))))
    rows = -(-len(images) // columns)
    heights = [max(image.shape[0] for image in images[row * columns : (row + 1) * columns]) for row in range(rows)]
    widths = [max(image.shape[1] for image in images[column::columns]) for column in range(min(columns, len(images)))]
    tops = np.cumsum([gap, *(height + gap for height in heights)])
    lefts = np.cumsum([gap, *(width + gap for width in widths)])
    sheet = np.full((tops[-1], lefts[-1], 3), _DARK, np.uint8)
    for position, image in enumerate(images):
        row, column = divmod(position, columns)
        y = tops[row] + (heights[row] - image.shape[0]) // 2
        x = lefts[column] + (widths[column] - image.shape[1]) // 2
        sheet[y : y + image.shape[0], x : x + image.shape[1]] = image
    return sheet


def stretch_contrast(image: np.ndarray) -> np.ndarray:
    """Brightens an image that is mostly dark, as those of microscopes are; returns any other unchanged.

    Args:
        image: uint8 [H, W, 3].

    Returns:
        uint8 [H, W, 3]. If 95% of the values are below 100, and 99.5% below 200, the values from 0.5% to 99.5% become 0
        to 255.
    """
    low, most, high = np.percentile(image, (0.5, 95, 99.5))
    if most >= _DARK_BELOW or high >= _BRIGHT_ABOVE or high <= low:
        return image
    return np.clip((image - low) * (255 / (high - low)), 0, 255).round().astype(np.uint8)


def draw_legend(categories: Sequence[Category], width: int) -> np.ndarray:
    """Draws the colors and names of classes, in as many rows as needed.

    Args:
        categories: The classes, at least one.
        width: Width of the picture in pixels.

    Returns:
        uint8 [H, width, 3].
    """
    scale, height, pad = 0.5, 22, 6
    names = [ascii_name(category.name) for category in categories]
    entry = max(cv2.getTextSize(name, _FONT, scale, 1)[0][0] for name in names) + height + 3 * pad
    columns = max(1, width // entry)
    legend = np.full((-(-len(names) // columns) * height + 2 * pad, width, 3), _DARK, np.uint8)
    for position, (category, name) in enumerate(zip(categories, names, strict=True)):
        row, column = divmod(position, columns)
        x, y = column * entry + pad, row * height + pad
        legend[y + 3 : y + height - 3, x : x + height - 6] = category.color
        cv2.putText(legend, name, (x + height, y + height - 7), _FONT, scale, _WHITE, 1, cv2.LINE_AA)
    return legend


def ascii_name(name: str) -> str:
    """Returns a name in the letters that OpenCV draws, with `?` for others."""
    return name.encode("ascii", "replace").decode()


def _shade(category: Category, instance: int) -> tuple[int, int, int]:
    """Returns the color of an instance: its class's color with a hue, saturation and brightness of its own."""
    if instance == 0:
        return category.color
    hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in category.color))
    # Multiples of irrational numbers spread evenly, so neighboring instance ids get clearly different shades.
    first, second, third = ((instance * step) % 1.0 for step in (0.618034, 0.754878, 0.569840))
    hue = (hue + 0.14 * (first - 0.5)) % 1.0
    saturation = min(1.0, max(saturation, 0.35) * (0.7 + 0.6 * second))
    value = min(1.0, max(value, 0.45) * (0.65 + 0.5 * third))
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def _borders(panoptic: np.ndarray) -> np.ndarray:
    """Returns the pixels, bool [H, W], whose right or lower neighbor belongs to another segment."""
    borders = np.zeros(panoptic.shape, bool)
    borders[:, :-1] |= panoptic[:, 1:] != panoptic[:, :-1]
    borders[:-1] |= panoptic[1:] != panoptic[:-1]
    return borders


def _touches(mask: np.ndarray) -> np.ndarray:
    """Returns the pixels, bool [H, W], that are in the mask or whose right or lower neighbor is."""
    touches = mask.copy()
    touches[:, :-1] |= mask[:, 1:]
    touches[:-1] |= mask[1:]
    return touches


def _write_names(picture: np.ndarray, panoptic: np.ndarray, dataset_info: DatasetInfo) -> None:
    """Writes class names into a picture, uint8 [H, W, 3], in place, largest segments first, without overlap."""
    height, width = panoptic.shape
    scale = float(np.clip(min(height, width) / 1000, 0.35, 1.0))
    table = list_segments(panoptic)
    classes = classes_of_values(table.values, dataset_info, name="panoptic")
    taken = np.zeros((height, width), bool)
    for row in np.argsort(-table.areas, kind="stable"):
        if table.areas[row] < max(_MIN_NAMED_FRACTION * panoptic.size, 1):
            break
        if classes[row] < 0:  # Void.
            continue
        category = dataset_info.categories[classes[row]]
        crowd = category.is_thing and table.values[row] % dataset_info.label_divisor == 0
        text = f"{category.name} (crowd)" if crowd else category.name
        (text_width, text_height), baseline = cv2.getTextSize(text, _FONT, scale, 1)
        y_min, x_min, y_max, x_max = table.boxes[row]
        mask = panoptic[y_min:y_max, x_min:x_max] == table.values[row]
        # The name stands at the point farthest from the segment's border; the padding makes the box a border, too.
        inside = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 3)
        y_center, x_center = np.unravel_index(int(inside.argmax()), inside.shape)
        pad = 2
        box_height, box_width = text_height + baseline + 2 * pad, text_width + 2 * pad
        y = int(np.clip(y_min + y_center - 1 - box_height // 2, 0, max(height - box_height, 0)))
        x = int(np.clip(x_min + x_center - 1 - box_width // 2, 0, max(width - box_width, 0)))
        area = np.s_[y : y + box_height, x : x + box_width]
        hides_segment = box_height * box_width > table.areas[row]
        if hides_segment or box_width > width or box_height > height or taken[area].any():
            continue
        taken[area] = True
        picture[area] = picture[area] // 3  # A dark background makes white letters readable on any color.
        origin = (x + pad, y + pad + text_height)
        cv2.putText(picture, text, origin, _FONT, scale, _WHITE, 1, cv2.LINE_AA)


def caption(picture: np.ndarray, text: str) -> np.ndarray:
    """Adds a strip with a text above a picture, uint8 [H, W, 3]."""
    scale = float(np.clip(picture.shape[0] / 700, 0.45, 1.2))
    (_, text_height), baseline = cv2.getTextSize(text, _FONT, scale, 1)
    strip = np.full((text_height + baseline + 8, picture.shape[1], 3), _DARK, np.uint8)
    cv2.putText(strip, text, (4, text_height + 4), _FONT, scale, _WHITE, 1, cv2.LINE_AA)
    return np.concatenate([strip, picture])
