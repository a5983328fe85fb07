"""Post-processing of Panoptic FPN (section 3.2): instances by score, and stuff in the pixels without an instance."""

from collections.abc import Mapping
from typing import NamedTuple

from keras import ops

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.model.detection.instances import thing_class_ids
from deeplab2_like.model.geometry import Geometry
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.overlaps import resolve_mask_overlaps
from deeplab2_like.model.panoptic_fpn.config import PostprocessConfig
from deeplab2_like.model.segments import paint_segments, region_scores, segment_outputs
from deeplab2_like.model.semantic import SemanticClasses


class Instances(NamedTuple):
    """The N instances of each panoptic map.

    Attributes:
        owner: int32 [B, H, W], the instance of each pixel, N for none.
        classes: int32 [B, N], class ids.
        scores: float32 [B, N], zero for unused rows.
    """

    owner: Tensor
    classes: Tensor
    scores: Tensor


def postprocess(
    outputs: Mapping[str, Tensor],
    geometry: Geometry,
    config: PostprocessConfig,
    dataset_info: DatasetInfo,
    *,
    classes: SemanticClasses,
    stride: int,
    true_semantic: Tensor | None = None,
    true_instances: Instances | None = None,
) -> dict[str, Tensor]:
    """Turns raw outputs into panoptic maps.

    Args:
        outputs: Raw outputs, see `PanopticFPN`; those that are replaced may be missing.
        geometry: Sizes of the images.
        config: Thresholds.
        dataset_info: The meaning of the panoptic map; it has C classes.
        classes: The semantic classes.
        stride: Network pixels per semantic logit.
        true_semantic: int32 [B, H, W], semantic classes in place of the predicted ones; their segments have score 1.
        true_instances: Instances in place of the detected ones.

    Returns:
        The dictionary of `PanopticSystem.postprocess`: rows 0 to N - 1 are instances by score, row N + c is class c.
        The score of a stuff segment is the mean probability of its class.
    """
    semantic = true_semantic
    if semantic is None:
        semantic = geometry.argmax(outputs["semantic_logits"], stride=stride)
    instances = true_instances
    if instances is None:
        instances = find_instances(outputs, geometry, config, dataset_info)
    table = paint_segments(
        semantic,
        instances.owner,
        instances.classes,
        class_of_semantic=(*classes.painted_class, -1),  # The class after the last one is void.
        dataset_info=dataset_info,
        stuff_area_limit=config.stuff_area_limit,
    )
    if true_semantic is None:
        probability = ops.softmax(outputs["semantic_logits"], axis=-1)
        scores = region_scores(probability, table, classes.of_class, geometry, stride=stride)
    else:
        scores = ops.ones((ops.shape(semantic)[0], dataset_info.num_classes), "float32")
    return segment_outputs(table, instances.scores, scores)


def find_instances(
    outputs: Mapping[str, Tensor], geometry: Geometry, config: PostprocessConfig, dataset_info: DatasetInfo
) -> Instances:
    """Resolves the overlaps of the detections above the score threshold.

    Args:
        outputs: The detections of `Detector`; without them there are no instances.
        geometry: Sizes of the images.
        config: Thresholds.
        dataset_info: The thing classes.
    """
    height, width = geometry.image_size
    if "scores" not in outputs:
        batch = ops.shape(outputs["semantic_logits"])[0]
        return no_instances(batch, geometry)
    scores = outputs["scores"]
    owner = resolve_mask_overlaps(
        (scores >= config.score_threshold) & (scores > 0),
        geometry.boxes_to_image(outputs["boxes"]),
        outputs["masks"],
        height=height,
        width=width,
        overlap_threshold=config.overlap_threshold,
    )
    return Instances(owner, thing_class_ids(outputs["thing_classes"], dataset_info), scores)


def no_instances(batch: Tensor, geometry: Geometry) -> Instances:
    """Returns zero instances (N = 0) for each image of a batch."""
    return Instances(
        owner=ops.zeros((batch, *geometry.image_size), "int32"),
        classes=ops.zeros((batch, 0), "int32"),
        scores=ops.zeros((batch, 0), "float32"),
    )
