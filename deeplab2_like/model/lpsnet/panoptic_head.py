"""The parameter-free panoptic head of LPSNet (section 3.4): boxes pasted onto the pixels of their class.

It works on its own, with the boxes and the semantic map of any model:

    head = PanopticHead(dataset_info, conflicts="smallest_area")
    panoptic = head(semantic, boxes, scores, classes)["panoptic"]
"""

from collections.abc import Sequence
from typing import Any, Literal

from keras import ops

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.model.boxes import box_area, take_rows
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.lpsnet.targets import border_ratio, level_of
from deeplab2_like.model.overlaps import line_ranges, resolve_overlaps
from deeplab2_like.model.segments import SegmentTable, merge, segment_outputs
from deeplab2_like.model.stages import stage

Conflicts = Literal["closest_border_ness", "smallest_area", "highest_score"]


class PanopticHead:
    """Makes a panoptic map of boxes and a semantic map.

    The mask of a box is the pixels in it that have its class. Boxes are pasted in the order of their scores; one of
    whose mask a larger share than a threshold is in the masks of better boxes is dropped. As a pixel has one class,
    masks overlap only within a class. A pixel in several of them goes to

    - `closest_border_ness`: the box for which its border-ness is closest to what the network predicted for this pixel;
    - `smallest_area`: the smallest box;
    - `highest_score`: the best box.

    Pixels of stuff keep their class; pixels of things that no box has become void.

    Args:
        dataset_info: What the values of the panoptic map mean.
        conflicts: Who gets the pixels of several boxes.
        overlap_threshold: The share.
        stuff_area_limit: Smaller stuff segments become void, in pixels.
        size_limits: If border-ness was predicted on several levels: between one level and the next, the largest
            distance from a pixel to a side of its object, in pixels of the map.

    Raises:
        UserError: If there is no such rule of conflicts, or the share is none.
    """

    def __init__(
        self,
        dataset_info: DatasetInfo,
        *,
        conflicts: Conflicts = "closest_border_ness",
        overlap_threshold: float = 0.3,
        stuff_area_limit: int = 4096,
        size_limits: Sequence[float] = (),
    ) -> None:
        known = ("closest_border_ness", "smallest_area", "highest_score")
        if conflicts not in known:
            raise UserError(f"Unknown rule of conflicts '{conflicts}'. Known: {', '.join(known)}.")
        if not 0 <= overlap_threshold <= 1:
            raise UserError(f"overlap_threshold is a share, 0 to 1, but it is {overlap_threshold}.")
        self.dataset_info = dataset_info
        self.conflicts = conflicts
        self.overlap_threshold = overlap_threshold
        self.stuff_area_limit = stuff_area_limit
        self.size_limits = tuple(size_limits)
        is_thing = [category.is_thing for category in dataset_info.categories]
        self.painted_class = (*(-1 if thing else class_id for class_id, thing in enumerate(is_thing)), -1)

    def __call__(
        self, semantic: Tensor, boxes: Tensor, scores: Tensor, classes: Tensor, predicted: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Makes the map, of boxes in any order.

        Args:
            semantic: int [B, H, W], class id of each pixel; any other number where it is not known.
            boxes: float32 [B, N, 4], (y_min, x_min, y_max, x_max) in pixels of the map.
            scores: float32 [B, N]; rows of zero are not used, nor are those of classes that are no things.
            classes: int [B, N], class ids of things.
            predicted: float32 [B, L, H, W], border-ness that was predicted for each pixel, on each of the levels; only
                for `closest_border_ness`.

        Returns:
            The dictionary of `PanopticSystem.postprocess`: rows 0 to N - 1 are things by score, row N + c is class c,
            whose score is 1.

        Raises:
            UserError: If border-ness is needed, but missing or of another shape, or so many boxes cannot be told apart
                with the label divisor.
        """
        semantic, classes = (ops.cast(values, "int32") for values in (semantic, classes))
        boxes, scores = (ops.cast(values, "float32") for values in (boxes, scores))
        if predicted is not None:
            predicted = ops.cast(predicted, "float32")
        if boxes.shape[1] == 0:
            # One row that is not used: there must be something to sort.
            boxes, scores, classes = (
                ops.pad(values, [[0, 0], [0, 1], *[[0, 0]] * (len(values.shape) - 2)])
                for values in (boxes, scores, classes)
            )
        num_classes = self.dataset_info.num_classes
        semantic = ops.where((semantic >= 0) & (semantic < num_classes), semantic, num_classes)
        is_thing = ops.any(classes[..., None] == ops.array(self.dataset_info.thing_classes, "int32"), axis=-1)
        # Also drops what is not a number.
        scores = ops.where(is_thing & (scores > 0), scores, 0.0)
        order = ops.argsort(-scores, axis=-1)
        scores = take_rows(scores, order)
        merged = self.paste(semantic, take_rows(boxes, order), scores, take_rows(classes, order), predicted)
        return segment_outputs(merged, scores, ops.ones((ops.shape(scores)[0], self.dataset_info.num_classes)))

    def paste(
        self, semantic: Tensor, boxes: Tensor, scores: Tensor, classes: Tensor, predicted: Tensor | None = None
    ) -> SegmentTable:
        """The map and its table of segments, of boxes whose best ones come first; see `__call__`."""
        if predicted is None and self.conflicts == "closest_border_ness":
            raise UserError(
                "Rule 'closest_border_ness' of PanopticHead needs the predicted border-ness of each pixel; give it, or "
                "choose conflicts 'smallest_area' or 'highest_score'."
            )
        levels = len(self.size_limits) + 1
        if predicted is not None and (len(predicted.shape) != 4 or predicted.shape[1] != levels):
            raise UserError(
                f"The predicted border-ness has the shape {tuple(predicted.shape)}; PanopticHead with "
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
            predicted if self.conflicts == "closest_border_ness" else None,
            size_limits=self.size_limits,
            by_area=self.conflicts == "smallest_area",
            overlap_threshold=self.overlap_threshold,
        )
        return merge(
            semantic,
            owner,
            classes,
            class_of_semantic=self.painted_class,
            num_classes=self.dataset_info.num_classes,
            stuff_area_limit=self.stuff_area_limit,
            label_divisor=self.dataset_info.label_divisor,
            void=self.dataset_info.void,
        )


@stage
def paste_boxes(
    semantic: Tensor,
    boxes: Tensor,
    used: Tensor,
    classes: Tensor,
    predicted: Tensor | None,
    *,
    size_limits: Sequence[float],
    by_area: bool,
    overlap_threshold: float,
) -> Tensor:
    """Gives pixels to boxes in the order of their rows; see `PanopticHead`.

    A pixel is in a box if its centre is.

    Args:
        semantic: int32 [B, H, W].
        boxes: float32 [B, N, 4].
        used: bool [B, N], true for the first rows of each image, those that take part.
        classes: int32 [B, N].
        predicted: float32 [B, L, H, W]; None if pixels of several boxes do not go to the closest border-ness.
        size_limits: See `PanopticHead`; one fewer than levels.
        by_area: Whether they go to the smallest box; else, if not by border-ness either, to the first.
        overlap_threshold: A box of whose mask a larger share is in earlier masks is dropped.

    Returns:
        int32 [B, H, W]: the row, or N for pixels that no box has.
    """
    batch, height, width = ops.shape(semantic)
    levels = 0 if predicted is None else predicted.shape[1]
    flat = ops.reshape(semantic, (batch * height, width))
    y_min, x_min, y_max, x_max = (side[..., None] for side in ops.unstack(boxes, 4, axis=-1))  # each [B, N, 1]
    y, x = (ops.cast(ops.arange(size), "float32") + 0.5 for size in (height, width))
    # What depends on the row or on the column alone, of each box: [B, N, H] and [B, N, W].
    is_in_rows, is_in_columns = (y > y_min) & (y < y_max), (x > x_min) & (x < x_max)
    ratio_of_rows, ratio_of_columns = border_ratio(y - y_min, y_max - y), border_ratio(x - x_min, x_max - x)
    level_of_rows = level_of(ops.maximum(y - y_min, y_max - y), size_limits)
    level_of_columns = level_of(ops.maximum(x - x_min, x_max - x), size_limits)

    def of_rows(values: Tensor, n: Tensor, rows: Tensor) -> Tensor:
        """Of box n and some rows, int32 [B, L]: [B, L, 1]."""
        return ops.take_along_axis(ops.take(values, n, axis=1), rows, axis=1)[..., None]

    def of_columns(values: Tensor, n: Tensor) -> Tensor:
        """Of box n: [B, 1, W]."""
        return ops.take(values, n, axis=1)[:, None]

    def rows_in_window(top: Tensor, lines: Any) -> Tensor:
        return top[:, None] + ops.arange(lines)[None, :]  # [B, L]

    def mask_in_window(n: Tensor, top: Tensor, lines: Any) -> Tensor:
        rows = rows_in_window(top, lines)
        classes_here = ops.take(flat, rows + (ops.arange(batch) * height)[:, None], axis=0)  # [B, L, W]
        is_of_class = classes_here == ops.take(classes, n, axis=1)[:, None, None]
        return is_of_class & of_rows(is_in_rows, n, rows) & of_columns(is_in_columns, n)

    def area_in_window(n: Tensor, top: Tensor, lines: Any) -> Tensor:
        return ops.broadcast_to(box_area(ops.take(boxes, n, axis=1))[:, None, None], (batch, lines, width))

    def difference_in_window(n: Tensor, top: Tensor, lines: Any) -> Tensor:
        rows = rows_in_window(top, lines)
        # The largest of four distances is the larger one of the largest along each axis, and so is its level.
        level = ops.maximum(of_rows(level_of_rows, n, rows), of_columns(level_of_columns, n))  # [B, L, W]
        of_levels = ops.reshape(predicted, (batch * levels * height, width))
        here: Tensor = 0.0
        for index in range(levels):
            lines_of_level = ops.take(
                of_levels, rows + ((ops.arange(batch) * levels + index) * height)[:, None], axis=0
            )
            here = ops.where(level == index, lines_of_level, here)
        return ops.abs(ops.sqrt(of_rows(ratio_of_rows, n, rows) * of_columns(ratio_of_columns, n)) - here)

    return resolve_overlaps(
        used,
        *line_ranges(boxes, height),
        mask_in_window,
        height=height,
        width=width,
        overlap_threshold=overlap_threshold,
        cost_in_window=difference_in_window if predicted is not None else area_in_window if by_area else None,
    )
