"""The panoptic head of LPSNet, which has no parameters: boxes pasted onto the pixels of their class (section 3.4).

It works on its own, with the boxes and the semantic map of any model:

    head = PanopticHead(dataset_info, conflicts="smallest_area")
    panoptic = head(semantic, boxes, scores, classes)["panoptic"]
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

from keras import ops

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.errors import UserError, unknown_name
from deeplab2_like.model.boxes import box_area, take_rows
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.lpsnet.config import Conflicts
from deeplab2_like.model.lpsnet.targets import border_ratio, level_index
from deeplab2_like.model.overlaps import Window, pixel_bounds, resolve_overlaps, split_into_blocks
from deeplab2_like.model.segments import SegmentTable, paint_segments, segment_outputs
from deeplab2_like.model.stages import stage


class PanopticHead:
    """Makes a panoptic map from boxes and a semantic map.

    The mask of a box consists of the pixels inside it that have its class. Boxes are pasted in the order of their
    scores; a box is dropped if better ones cover more than a share of its mask. Because a pixel has one class, masks
    overlap only within a class. A pixel inside several masks goes to

    - `closest_border_ness`: the box for which its border-ness is closest to the predicted border-ness of the pixel;
    - `smallest_area`: the smallest box;
    - `highest_score`: the best box.

    Pixels of stuff keep their class; pixels of things outside all boxes become void.

    Args:
        dataset_info: The meaning of the values of the panoptic map.
        conflicts: The box that gets a pixel inside several masks.
        overlap_threshold: The share.
        stuff_area_limit: Smaller stuff segments become void, in pixels.
        size_limits: If border-ness is predicted on several levels: for each level but the last, the largest distance
            from a pixel to a side of its box, in pixels of the map.

    Raises:
        UserError: If `conflicts` is unknown, or `overlap_threshold` is not in 0..1.
    """

    def __init__(
        self,
        dataset_info: DatasetInfo,
        *,
        conflicts: Conflicts = "closest_border_ness",
        overlap_threshold: float = 0.3,
        stuff_area_limit: int = 4096,
        size_limits: Sequence[Any] = (),
    ) -> None:
        if conflicts not in get_args(Conflicts):
            raise unknown_name("rule of conflicts", conflicts, get_args(Conflicts))
        if not 0 <= overlap_threshold <= 1:
            raise UserError(f"overlap_threshold is a share, 0 to 1, but it is {overlap_threshold}.")
        self.dataset_info = dataset_info
        self.conflicts = conflicts
        self.overlap_threshold = overlap_threshold
        self.stuff_area_limit = stuff_area_limit
        self.size_limits = tuple(size_limits)
        # Stuff classes are painted as they are; thing classes and the class after the last one, unknown, are not.
        stuff = dataset_info.stuff_classes
        self.class_of_semantic = (*(c if c in stuff else -1 for c in range(dataset_info.num_classes)), -1)

    def __call__(
        self, semantic: Tensor, boxes: Tensor, scores: Tensor, classes: Tensor, border_ness: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Makes the map from boxes in any order.

        Args:
            semantic: int [B, H, W], class id of each pixel; any other number where it is unknown.
            boxes: float32 [B, N, 4], (y_min, x_min, y_max, x_max) in pixels of the map.
            scores: float32 [B, N]; rows with score zero and rows whose class is not a thing class are not used.
            classes: int [B, N], class ids of things.
            border_ness: float32 [B, L, H, W], predicted border-ness of each pixel on each of the L levels; only for
                `closest_border_ness`.

        Returns:
            The dictionary of `PanopticSystem.postprocess`: rows 0 to N - 1 are things in the order of their scores, row
            N + c is the stuff of class c, with score 1.

        Raises:
            UserError: If border-ness is needed, but missing or of another shape, or the label divisor has no room for
                so many boxes.
        """
        semantic, classes = (ops.cast(values, "int32") for values in (semantic, classes))
        boxes, scores = (ops.cast(values, "float32") for values in (boxes, scores))
        if border_ness is not None:
            border_ness = ops.cast(border_ness, "float32")
        if boxes.shape[1] == 0:
            # Sorting needs at least one row; this one is not used.
            boxes, scores, classes = (
                ops.pad(values, [[0, 0], [0, 1], *[[0, 0]] * (len(values.shape) - 2)])
                for values in (boxes, scores, classes)
            )
        num_classes = self.dataset_info.num_classes
        semantic = ops.where((semantic >= 0) & (semantic < num_classes), semantic, num_classes)
        is_thing = ops.any(classes[..., None] == ops.array(self.dataset_info.thing_classes, "int32"), axis=-1)
        # The comparison also drops scores that are NaN.
        scores = ops.where(is_thing & (scores > 0), scores, 0.0)
        order = ops.argsort(-scores, axis=-1)
        scores = take_rows(scores, order)
        table = self.paste(semantic, take_rows(boxes, order), scores, take_rows(classes, order), border_ness)
        return segment_outputs(table, scores, ops.ones((ops.shape(scores)[0], num_classes)))

    def paste(
        self, semantic: Tensor, boxes: Tensor, scores: Tensor, classes: Tensor, border_ness: Tensor | None = None
    ) -> SegmentTable:
        """Makes the map and its segment table from boxes in the order of their scores; see `__call__`."""
        if border_ness is None and self.conflicts == "closest_border_ness":
            raise UserError(
                "Rule 'closest_border_ness' of PanopticHead needs the predicted border-ness of each pixel; give it, or "
                "choose conflicts 'smallest_area' or 'highest_score'."
            )
        levels = len(self.size_limits) + 1
        if border_ness is not None and (len(border_ness.shape) != 4 or border_ness.shape[1] != levels):
            raise UserError(
                f"The predicted border-ness has the shape {tuple(border_ness.shape)}; PanopticHead with "
                f"{len(self.size_limits)} size_limits needs [B, {levels}, H, W], a map for each level."
            )
        if boxes.shape[1] >= self.dataset_info.label_divisor:
            raise UserError(
                f"There are {boxes.shape[1]} boxes, but label_divisor {self.dataset_info.label_divisor} of data set "
                f"'{self.dataset_info.name}' has room for {self.dataset_info.label_divisor - 1} instances; give fewer."
            )
        owner = paste_boxes(
            semantic,
            boxes,
            scores > 0,
            classes,
            border_ness if self.conflicts == "closest_border_ness" else None,
            size_limits=self.size_limits,
            smallest_first=self.conflicts == "smallest_area",
            overlap_threshold=self.overlap_threshold,
        )
        return paint_segments(
            semantic,
            owner,
            classes,
            class_of_semantic=self.class_of_semantic,
            dataset_info=self.dataset_info,
            stuff_area_limit=self.stuff_area_limit,
        )


@stage
def paste_boxes(
    semantic: Tensor,
    boxes: Tensor,
    used: Tensor,
    classes: Tensor,
    border_ness: Tensor | None,
    *,
    size_limits: Sequence[Any],
    smallest_first: bool,
    overlap_threshold: float,
) -> Tensor:
    """Assigns pixels to boxes in the order of their rows, see `PanopticHead`; a pixel is inside if its center is.

    Args:
        semantic: int32 [B, H, W].
        boxes: float32 [B, N, 4].
        used: bool [B, N], the boxes that take part, the first rows of each image.
        classes: int32 [B, N].
        border_ness: float32 [B, L, H, W], if pixels inside several boxes go to the closest border-ness; otherwise None.
        size_limits: See `PanopticHead`, [L - 1].
        smallest_first: Whether they go to the smallest box instead of the first one.
        overlap_threshold: Largest share of a mask that earlier boxes may hold.

    Returns:
        int32 [B, H, W]: the box of each pixel, or N for none.
    """
    batch, height, width = ops.shape(semantic)
    blocks = split_into_blocks(semantic)
    y, x, (y_min, x_min, y_max, x_max) = _pixels_and_sides(boxes, height, width)
    inside = _AxisValues((y > y_min) & (y < y_max), (x > x_min) & (x < x_max))

    def mask_in_window(n: Tensor, window: Window) -> Tensor:
        classes_here = window.read(blocks, ops.arange(batch))  # [B, L, K]
        inside_rows, inside_columns = inside.at(n, window)
        return (classes_here == ops.take(classes, n, axis=1)[:, None, None]) & inside_rows & inside_columns

    def area_in_window(n: Tensor, window: Window) -> Tensor:
        area = box_area(ops.take(boxes, n, axis=1))[:, None, None]
        return ops.broadcast_to(area, (batch, window.height, window.width))

    cost: Callable[[Tensor, Window], Tensor] | None = area_in_window if smallest_first else None
    if border_ness is not None:
        cost = _border_ness_cost(boxes, border_ness, size_limits)
    return resolve_overlaps(
        used,
        pixel_bounds(boxes, height, width),
        mask_in_window,
        height=height,
        width=width,
        overlap_threshold=overlap_threshold,
        cost_in_window=cost,
    )


def _border_ness_cost(
    boxes: Tensor, border_ness: Tensor, size_limits: Sequence[Any]
) -> Callable[[Tensor, Window], Tensor]:
    """Makes `cost_in_window` of `resolve_overlaps`: the error of the predicted border-ness for a box.

    Args:
        boxes: float32 [B, N, 4].
        border_ness: float32 [B, L, H, W].
        size_limits: See `PanopticHead`, [L - 1].
    """
    num_levels = border_ness.shape[1]
    batch, _, height, width = ops.shape(border_ness)
    blocks = split_into_blocks(ops.reshape(border_ness, (batch * num_levels, height, width)))
    y, x, (y_min, x_min, y_max, x_max) = _pixels_and_sides(boxes, height, width)
    ratio = _AxisValues(border_ratio(y - y_min, y_max - y), border_ratio(x - x_min, x_max - x))
    # The largest of four distances is the larger of the largest along each axis, and so is the level.
    level = _AxisValues(
        level_index(ops.maximum(y - y_min, y_max - y), size_limits),
        level_index(ops.maximum(x - x_min, x_max - x), size_limits),
    )

    def cost_in_window(n: Tensor, window: Window) -> Tensor:
        levels = ops.maximum(*level.at(n, window))  # [B, L, K]
        predicted: Tensor = 0.0
        for index in range(num_levels):
            on_level = window.read(blocks, ops.arange(batch) * num_levels + index)  # [B, L, K]
            predicted = ops.where(levels == index, on_level, predicted)
        ratio_rows, ratio_columns = ratio.at(n, window)
        return ops.abs(ops.sqrt(ratio_rows * ratio_columns) - predicted)

    return cost_in_window


class _AxisValues(NamedTuple):
    """Values of each box that depend only on the row, or only on the column, of a pixel.

    Attributes:
        rows: [B, N, H].
        columns: [B, N, W].
    """

    rows: Tensor
    columns: Tensor

    def at(self, n: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        """Returns the values of box n in the rows and columns of a window: [B, L, 1] and [B, 1, K]."""
        rows = ops.take_along_axis(ops.take(self.rows, n, axis=1), window.lines, axis=1)
        # Columns beyond the border repeat the last one.
        columns = ops.minimum(window.columns, ops.shape(self.columns)[-1] - 1)
        columns = ops.take_along_axis(ops.take(self.columns, n, axis=1), columns, axis=1)
        return rows[..., None], columns[:, None]


def _pixels_and_sides(boxes: Tensor, height: Any, width: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Returns the centers of rows and columns, float32 [H] and [W], and the sides of boxes, 4 x float32 [B, N, 1]."""
    y, x = (ops.cast(ops.arange(size), "float32") + 0.5 for size in (height, width))
    return y, x, [side[..., None] for side in ops.unstack(boxes, 4, axis=-1)]
