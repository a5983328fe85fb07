"""Evaluates a system on examples: inference, then the metrics."""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from deeplab2_like.evaluation import report
from deeplab2_like.evaluation.checks import check_maps
from deeplab2_like.evaluation.inference import (
    Example,
    ExampleFunction,
    Outputs,
    make_example_function,
    make_inference_function,
)
from deeplab2_like.evaluation.instance_ap import InstanceAP
from deeplab2_like.evaluation.instance_iou import InstanceIoU, has_cityscapes_classes
from deeplab2_like.evaluation.instance_json import InstanceAnnotations
from deeplab2_like.evaluation.overlaps import ClassifiedOverlaps, count_panoptic_overlaps
from deeplab2_like.evaluation.panoptic_quality import Matches, PanopticQuality
from deeplab2_like.evaluation.semantic_iou import SemanticIoU
from deeplab2_like.model import PanopticSystem
from deeplab2_like.parallel import map_in_order


def evaluate(
    system: PanopticSystem,
    examples: Iterable[Example],
    *,
    infer: ExampleFunction | None = None,
    after_image: Callable[[Example, Outputs], None] | None = None,
    workers: int | None = None,
    annotations: InstanceAnnotations | None = None,
) -> dict[str, Any]:
    """Computes PQ, mIoU and AP over a data set.

    PQ is that of the panoptic map. mIoU is that of the semantic head (`PanopticSystem.semantic_map`), so it depends
    neither on the instances nor on the stuff limit.

    The network sees one image at a time, at its own size, while other threads measure the outputs for earlier images.

    Args:
        system: The trained system.
        examples: Examples of `pipeline.make_eval_dataset`.
        infer: Function from an example to the dictionary of `PanopticSystem.infer`, with instances and a batch of one,
            as `make_example_function` and `make_oracle_function` return; by default plain inference.
        after_image: Called in order with each example and its outputs.
        workers: Number of threads that measure; by default the number of cores.
        annotations: The ground truth of AP; by default that of the panoptic labels.

    Returns:
        The content of `metrics.json`, in percent.
    """
    info = system.dataset_info
    infer_example = infer or make_example_function(make_inference_function(system, with_instances=True))
    quality, iou = PanopticQuality(info), SemanticIoU(info, classes=system.semantic_classes)
    precision = InstanceAP(info, annotations)
    instance_iou = InstanceIoU(info) if _predicts_cityscapes(system) else None

    def predict_all() -> Iterator[tuple[int, Example, Outputs]]:
        for number, example in enumerate(examples):
            yield number, example, {name: value.numpy()[0] for name, value in infer_example(example).items()}

    def measure(item: tuple[int, Example, Outputs]) -> _Measurement:
        number, example, outputs = item
        (label,), (prediction,) = check_maps(example["panoptic"].numpy(), outputs["panoptic"])
        overlaps = count_panoptic_overlaps(label, prediction, info)
        class_overlaps = count_panoptic_overlaps(label // info.label_divisor, outputs["semantic"], info, divisor=1)
        instances = InstanceAP(info, annotations)
        # Numbered, because images of different folders may have the same name.
        file_name = example["image_id"].numpy().decode()
        name = f"{number}/{file_name}"
        if "instance_masks" in outputs:
            own = {key: outputs[f"instance_{key}"] for key in ("masks", "scores", "classes", "boxes")}
            instances.update_from_instances(name, label, **own, file_name=file_name)
        else:
            table = {key: outputs[key] for key in ("segment_id", "segment_class", "segment_score")}
            instances.update_from_panoptic(name, label, prediction, **table, file_name=file_name)
        own_iou = None if instance_iou is None else InstanceIoU(info)
        if own_iou is not None:
            own_iou.update_state(label, outputs["semantic"])
        return _Measurement(example, outputs, class_overlaps, quality.match_panoptic(overlaps), instances, own_iou)

    for measurement in map_in_order(measure, predict_all(), workers=workers or os.cpu_count() or 1):
        quality.add(measurement.matches)
        iou.add(measurement.class_overlaps)
        precision.merge(measurement.instances)
        if instance_iou is not None and measurement.instance_iou is not None:
            instance_iou.merge(measurement.instance_iou)
        if after_image is not None:
            after_image(measurement.example, measurement.outputs)
    return report.metrics_dict(
        panoptic=quality.result(),
        semantic=iou.result(),
        instance_iou=None if instance_iou is None else instance_iou.result(),
        instance=precision.result(),
    )


def _predicts_cityscapes(system: PanopticSystem) -> bool:
    """Returns whether iIoU is defined: for the classes of Cityscapes, if the semantic head predicts them all."""
    info = system.dataset_info
    return has_cityscapes_classes(info) and len(system.semantic_classes) == info.num_classes


class _Measurement(NamedTuple):
    """One image, its outputs, and the counts of the metrics."""

    example: Example
    outputs: Outputs
    class_overlaps: ClassifiedOverlaps
    matches: Matches
    instances: InstanceAP
    instance_iou: InstanceIoU | None
