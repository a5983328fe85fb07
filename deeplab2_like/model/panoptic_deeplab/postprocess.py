"""Post-processing of Panoptic-DeepLab (section 3.2); its cost hardly depends on the numbers of classes and centers.

The usual formulation holds class probabilities at full size, and a distance for every pair of pixel and center. Here

- classes: bilinear upsampling by a whole factor mixes the same coarse neighbors in `factor * factor` ways ("phases"),
  so the argmax of a phase is computed on the coarse grid, and only class ids exist at full size;
- nearest center: the plane is cut into cells, each with a list of its nearest centers in order. A pixel walks along
  the list of the cell that its offset points to, and stops when the triangle inequality rules out the rest. The
  result is that of comparing all centers;
- votes: one histogram over pairs of segment and class; then one table look-up paints the map.

Each function marked `stage` may be compiled on its own, see `deeplab2_like.model.stages`.
"""

from collections.abc import Mapping
from typing import Any

from keras import ops

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.model.geometry import Geometry
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.panoptic_deeplab.config import PostprocessConfig
from deeplab2_like.model.panoptic_deeplab.views import resize_outputs
from deeplab2_like.model.resampling import upsample_bilinear
from deeplab2_like.model.segments import look_up, mean_probability, number_within_class
from deeplab2_like.model.stages import stage

# Side of a cell in pixels, and how many of its nearest centers a cell lists before all centers are tried.
_CELL = 16
_CANDIDATES = 16
# Larger than any distance, also squared, and finite in float32.
_FAR = 1e30


def postprocess(
    outputs: Mapping[str, Tensor],
    geometry: Geometry,
    config: PostprocessConfig,
    dataset_info: DatasetInfo,
    *,
    stride: int,
    center_is_logit: bool,
) -> dict[str, Tensor]:
    """Turns raw outputs into panoptic maps.

    Args:
        outputs: `semantic_logits` float32 [B, h, w, C], or with the void class [B, h, w, C + 1], and, unless semantic
            only, `center` [B, h, w, 1] and `offset` [B, h, w, 2] (y, x) in network pixels.
        geometry: Sizes of the images.
        config: Thresholds.
        dataset_info: The meaning of the panoptic map.
        stride: Network pixels per output pixel.
        center_is_logit: Whether `center` needs a sigmoid.

    Returns:
        The dictionary of `PanopticSystem.postprocess` with K = top_k + C: rows 0 to top_k - 1 are instances in the
        order of their centers' heat, row top_k + c is the stuff of class c. The score of an instance is the heat of its
        center times the mean probability of its class (section 3.3), the score of stuff that mean probability; these
        probabilities are read at the resolution of the logits.
    """
    logits = outputs["semantic_logits"]
    num_classes, top_k = dataset_info.num_classes, config.top_k
    aligned_corners = geometry.aligned_corners
    height, width = geometry.image_size
    is_thing = ops.array([category.is_thing for category in dataset_info.categories])  # [C]
    classes = geometry.argmax(logits, stride=stride)  # [B, H, W]

    if "center" in outputs:
        instance_outputs, instance_stride = {name: outputs[name] for name in ("center", "offset")}, stride
        if geometry.network_size is not None:
            instance_outputs, instance_stride = resize_outputs(instance_outputs, geometry, stride=stride), 1
        centers, heat = find_centers(
            instance_outputs["center"],
            height=height,
            width=width,
            stride=instance_stride,
            is_logit=center_is_logit,
            threshold=config.center_threshold,
            nms_kernel=config.nms_kernel,
            top_k=top_k,
            aligned_corners=aligned_corners,
        )
        offset = upsample_offset(
            instance_outputs["offset"],
            height=height,
            width=width,
            stride=instance_stride,
            aligned_corners=aligned_corners,
        )
        rows = assign_segments(classes, is_thing, offset, centers, heat)
    else:
        # Semantic only: a thing class is one region without instances, like a crowd.
        heat = ops.zeros((ops.shape(logits)[0], top_k), "float32")
        is_thing = ops.zeros_like(is_thing)
        rows = classes + top_k

    votes = count_votes(rows, classes, num_rows=top_k + num_classes + 1, num_classes=logits.shape[-1])
    table = _segment_table(
        votes,
        heat,
        is_thing,
        label_divisor=dataset_info.label_divisor,
        void=dataset_info.void,
        stuff_area_limit=config.stuff_area_limit,
    )
    area = ops.sum(votes, axis=-1)
    probability = mean_probability(
        ops.softmax(logits, axis=-1),
        rows,
        table["class"],
        area,
        stride=stride,
        aligned_corners=aligned_corners,
        **geometry.network_sides,
    )
    used = table["used"]
    objectness = ops.concatenate([heat, ops.ones((ops.shape(heat)[0], num_classes), "float32")], axis=1)
    return {
        "panoptic": look_up(table["panoptic"], rows),
        "segment_id": ops.where(used, table["panoptic"][:, :-1], 0),
        "segment_class": ops.where(used, table["class"][:, :-1], 0),
        "segment_score": ops.where(used, objectness * probability[:, :-1], 0.0),
    }


@stage
def find_centers(
    center: Tensor,
    *,
    height: Any,
    width: Any,
    stride: int,
    is_logit: bool,
    threshold: float,
    nms_kernel: int,
    top_k: int,
    aligned_corners: bool = False,
) -> tuple[Tensor, Tensor]:
    """Finds the peaks of the upsampled heat map.

    Args:
        center: float32 [B, h, w, 1] heat map.
        height: Image height without padding.
        width: Image width without padding.
        stride: Image pixels per value of the map.
        is_logit: Whether the map needs a sigmoid.
        threshold: Heat that a peak must exceed.
        nms_kernel: Side of the window in which a peak must be the maximum.
        top_k: Number of peaks to keep.
        aligned_corners: How the map is upsampled, see `resampling`.

    Returns:
        int32 [B, top_k, 2] (y, x) positions and float32 [B, top_k] heat, best first; unused rows zero.
    """
    heat = ops.sigmoid(center) if is_logit else center
    heat = upsample_bilinear(heat, stride, aligned_corners=aligned_corners)[:, :height, :width]  # [B, H, W, 1]
    highest = ops.max_pool(heat, (nms_kernel, 1), strides=1, padding="same")
    highest = ops.max_pool(highest, (1, nms_kernel), strides=1, padding="same")
    heat = ops.where((heat == highest) & (heat > threshold), heat, 0.0)[..., 0]  # [B, H, W]

    # Two peaks are at least half a window apart, unless they tie: a block of that side holds one at most. The best of
    # each block is found first, as top-k over blocks is much cheaper than over pixels.
    side = (nms_kernel + 1) // 2
    heat = ops.pad(heat, [[0, 0], [0, -height % side], [0, -width % side]])
    batch, padded_height, padded_width = ops.shape(heat)
    rows, columns = padded_height // side, padded_width // side
    blocks = ops.reshape(heat, (batch, rows, side, columns, side))  # [B, Y, side, X, side]
    blocks = ops.transpose(blocks, (0, 1, 3, 2, 4))  # [B, Y, X, side, side]
    blocks = ops.reshape(blocks, (batch, rows * columns, side * side))  # [B, Y * X, side * side]
    value, block = _top_k_padded(ops.max(blocks, axis=-1), top_k)  # [B, K]
    inside = ops.argmax(ops.take_along_axis(blocks, block[..., None], axis=1), axis=-1)  # [B, K]
    inside = ops.cast(inside, "int32")
    y = block // columns * side + inside // side
    x = block % columns * side + inside % side
    centers = ops.where((value > 0)[..., None], ops.stack([y, x], axis=-1), 0)
    return centers, value


def _top_k_padded(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the k largest values, [B, N] and not negative, and their indices; missing values are zero."""
    value, index = ops.top_k(ops.pad(values, [[0, 0], [0, k]]), k)
    last = ops.shape(values)[1] - 1
    return value, ops.minimum(ops.cast(index, "int32"), last)


@stage
def upsample_offset(offset: Tensor, *, height: Any, width: Any, stride: int, aligned_corners: bool = False) -> Tensor:
    """Upsamples offsets, float32 [B, h, w, 2] in image pixels, to float32 [B, H, W, 2]."""
    return upsample_bilinear(offset, stride, aligned_corners=aligned_corners)[:, :height, :width]


@stage
def assign_segments(classes: Tensor, is_thing: Tensor, offset: Tensor, centers: Tensor, heat: Tensor) -> Tensor:  # noqa: PLR0915 - one algorithm, whose steps share many tensors
    """Assigns each pixel to a row of the segment table: things to the nearest center, stuff to its class.

    A pixel p of a thing is compared with the centers c of its cell's list, in order of their distance to the middle m
    of the cell. As |p - c| >= |m - c| - |p - m|, the walk ends once this lower bound for the next center exceeds
    the best distance. Pixels whose walk has not ended with the list are compared with all centers, one after the other.

    Args:
        classes: int32 [B, H, W] class ids; C for void.
        is_thing: bool [C].
        offset: float32 [B, H, W, 2] (y, x), in image pixels.
        centers: int32 [B, K, 2] (y, x), in image pixels.
        heat: float32 [B, K], zero for unused rows.

    Returns:
        int32 [B, H, W]: k for an instance, K + class for stuff, K + C for void and for things where there is no center.
    """
    batch, height, width = ops.shape(classes)
    num_centers, num_classes = centers.shape[1], is_thing.shape[0]
    y = offset[..., 0] + ops.cast(ops.arange(height), "float32")[:, None]  # [B, H, W]
    x = offset[..., 1] + ops.cast(ops.arange(width), "float32")[None, :]  # [B, H, W]
    # Unused rows lie far away; float32 distances to them stay finite and larger than any other.
    used = heat > 0
    center_y = ops.where(used, ops.cast(centers[..., 0], "float32"), 1e9)  # [B, K]
    center_x = ops.where(used, ops.cast(centers[..., 1], "float32"), 1e9)  # [B, K]

    # The list of each cell, and the distance of each next entry to the middle of the cell.
    cells_y, cells_x = (height - 1) // _CELL + 1, (width - 1) // _CELL + 1
    middle_y = (ops.cast(ops.arange(cells_y), "float32") + 0.5) * _CELL
    middle_x = (ops.cast(ops.arange(cells_x), "float32") + 0.5) * _CELL
    distance = ops.square(middle_y[:, None, None] - center_y[:, None, None, :]) + ops.square(
        middle_x[None, :, None] - center_x[:, None, None, :]
    )  # [B, cells_y, cells_x, K]
    candidates = min(_CANDIDATES, num_centers)
    closeness, order = ops.top_k(-distance, candidates)  # [B, cells_y, cells_x, M]
    order = ops.reshape(ops.cast(order, "int32"), (batch, cells_y * cells_x * candidates))  # [B, cells * M]
    listed_y = ops.reshape(ops.take_along_axis(center_y, order, axis=1), (-1,))  # [B * cells * M]
    listed_x = ops.reshape(ops.take_along_axis(center_x, order, axis=1), (-1,))  # [B * cells * M]
    reach = ops.sqrt(-closeness)
    reach = ops.where(reach < 1e8, reach, _FAR)
    # Centers that are not listed are at least as far as the last entry.
    beyond = reach[..., -1:] if candidates < num_centers else ops.full_like(reach[..., -1:], _FAR)
    next_reach = ops.reshape(ops.concatenate([reach[..., 1:], beyond], axis=-1), (-1,))  # [B * cells * M]

    thing = ops.take(ops.concatenate([is_thing, ops.zeros_like(is_thing[:1])]), classes)  # [B, H, W]
    cell_y = ops.cast(ops.clip(y, 0.0, ops.cast(height - 1, "float32")), "int32") // _CELL
    cell_x = ops.cast(ops.clip(x, 0.0, ops.cast(width - 1, "float32")), "int32") // _CELL
    image = ops.arange(batch)[:, None, None]
    list_start = ((image * cells_y + cell_y) * cells_x + cell_x) * candidates  # [B, H, W]
    to_middle_y = (ops.cast(cell_y, "float32") + 0.5) * _CELL - y
    to_middle_x = (ops.cast(cell_x, "float32") + 0.5) * _CELL - x
    to_middle = ops.sqrt(ops.square(to_middle_y) + ops.square(to_middle_x))  # [B, H, W]
    # The slack covers rounding; one step too many does no harm. Stuff is done from the start.
    to_middle = ops.where(thing, to_middle + 0.01, -_FAR)

    def must_walk(step: Tensor, best: Tensor, best_step: Tensor, any_unfinished: Tensor) -> Tensor:
        del best, best_step
        return (step < candidates) & any_unfinished

    def walk(step: Tensor, best: Tensor, best_step: Tensor, any_unfinished: Tensor) -> tuple[Tensor, ...]:
        near_y = ops.take(listed_y, list_start + step)
        near_x = ops.take(listed_x, list_start + step)
        square = ops.square(y - near_y) + ops.square(x - near_x)
        closer = square < best
        best = ops.where(closer, square, best)
        best_step = ops.where(closer, step, best_step)
        any_unfinished = ops.any(ops.take(next_reach, list_start + step) < ops.sqrt(best) + to_middle)
        return step + 1, best, best_step, any_unfinished

    far = ops.full_like(y, _FAR)
    zeros = ops.zeros_like(classes)
    start = (ops.array(0, "int32"), far, zeros, ops.any(thing))
    _, best, best_step, any_unfinished = ops.while_loop(must_walk, walk, start)
    nearest = ops.take(ops.reshape(order, (-1,)), list_start + best_step)  # [B, H, W]

    def must_compare(index: Tensor, best: Tensor, nearest: Tensor) -> Tensor:
        del best, nearest
        return (index < num_centers) & any_unfinished

    def compare(index: Tensor, best: Tensor, nearest: Tensor) -> tuple[Tensor, ...]:
        this_y = ops.reshape(ops.take(center_y, index, axis=1), (-1, 1, 1))  # [B, 1, 1]
        this_x = ops.reshape(ops.take(center_x, index, axis=1), (-1, 1, 1))  # [B, 1, 1]
        square = ops.square(y - this_y) + ops.square(x - this_x)
        closer = square < best
        return index + 1, ops.where(closer, square, best), ops.where(closer, index, nearest)

    _, _, nearest = ops.while_loop(must_compare, compare, (ops.array(0, "int32"), best, nearest))

    none = num_centers + num_classes
    instance = ops.where(ops.any(used, axis=1)[:, None, None], nearest, none)
    return ops.where(thing, instance, classes + num_centers)


@stage
def count_votes(rows: Tensor, classes: Tensor, *, num_rows: int, num_classes: int) -> Tensor:
    """Counts the classes within each segment.

    Args:
        rows: int32 [B, H, W] row of the segment table of each pixel.
        classes: int32 [B, H, W] class of each pixel, or void.
        num_rows: R, number of rows of the table.
        num_classes: C, or C + 1 with the void class.

    Returns:
        int32 [B, R, C].
    """
    batch = ops.shape(rows)[0]
    image = ops.arange(batch)[:, None, None]
    pair = (image * num_rows + rows) * num_classes + classes
    ones = ops.ones_like(ops.reshape(pair, (-1,)))
    counts = ops.segment_sum(ones, ops.reshape(pair, (-1,)), num_segments=batch * num_rows * num_classes)
    return ops.reshape(counts, (batch, num_rows, num_classes))  # [B, R, C]


def _segment_table(
    votes: Tensor, heat: Tensor, is_thing: Tensor, *, label_divisor: int, void: int, stuff_area_limit: int
) -> dict[str, Tensor]:
    """Decides the class and the id of every row of the segment table (majority vote, stuff area limit).

    Args:
        votes: int32 [B, R, C] or with the void class [B, R, C + 1]; R = K + C + 1: instances, stuff classes, and
            pixels without a segment.
        heat: float32 [B, K].
        is_thing: bool [C].
        label_divisor: Factor between class and instance ids.
        void: Panoptic value of void.
        stuff_area_limit: Stuff of fewer pixels becomes void.

    Returns:
        `class` int32 [B, R]; `panoptic` int32 [B, R], the value to paint; `used` bool [B, R - 1].
    """
    num_centers, num_classes = heat.shape[1], is_thing.shape[0]
    area = ops.sum(votes, axis=-1)  # [B, R]
    instance_class = ops.cast(ops.argmax(votes[:, :num_centers], axis=-1), "int32")  # [B, K]
    present = area[:, :num_centers] > 0
    instance_value = instance_class * label_divisor + number_within_class(instance_class, present)

    stuff_class = ops.arange(num_classes)[None, :] + ops.zeros_like(area[:, :1])  # [B, C]
    stuff_area = area[:, num_centers:-1]
    large = (stuff_area >= stuff_area_limit) & (stuff_area > 0) & ~is_thing[None, :]
    used = ops.concatenate([present, large], axis=1)  # [B, K + C]
    none = ops.zeros_like(area[:, :1])
    value = ops.concatenate([instance_value, stuff_class * label_divisor], axis=1)
    return {
        "class": ops.concatenate([instance_class, stuff_class, none], axis=1),
        "panoptic": ops.concatenate([ops.where(used, value, void), none + void], axis=1),
        "used": used,
    }
