"""Evaluation of COCO panoptic files, from any program; needs neither a model nor TensorFlow."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deeplab2_like.errors import UserError
from deeplab2_like.evaluation import report
from deeplab2_like.evaluation.coco_format import CocoPanopticReader
from deeplab2_like.evaluation.overlaps import ClassifiedOverlaps, count_segment_overlaps
from deeplab2_like.evaluation.panoptic_quality import Matches, PanopticQuality
from deeplab2_like.evaluation.semantic_iou import SemanticIoU
from deeplab2_like.files import make_folder
from deeplab2_like.parallel import map_in_order


def evaluate_files(
    *,
    ground_truth: str | os.PathLike[str],
    ground_truth_dir: str | os.PathLike[str],
    prediction: str | os.PathLike[str],
    prediction_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str] | None = None,
    reference_crowd_rule: bool = False,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Computes PQ and mIoU of a prediction in the COCO panoptic format.

    The ground truth decides which images and categories count. The prediction's JSON needs `annotations` only; those of
    other images are ignored. Images are read in parallel and counted in the order of the ground truth, so the result
    does not depend on `workers`, to the last bit. Only the JSON takes memory that grows with the number of images.

    Args:
        ground_truth: The JSON of the labels.
        ground_truth_dir: The folder of its PNG files.
        prediction: The JSON of the predictions.
        prediction_dir: The folder of its PNG files.
        output_dir: Folder for `metrics.json`; None writes no file.
        reference_crowd_rule: Whether to count exactly as panopticapi does on one core, see `PanopticQuality`.
        workers: Number of threads; None: one per core. Most of the time goes into decoding PNG files.
        progress: Called after each image with the number of images done and the total.

    Returns:
        The content of `metrics.json`: "panoptic" and "semantic", in percent.

    Raises:
        UserError: If a file or folder is missing or damaged, an image has no prediction, maps differ in size, or a
            PNG and its list of segments do not have the same ids.
    """
    workers = (os.cpu_count() or 1) if workers is None else workers
    if workers < 1:
        raise UserError(f"workers must be 1 or more, got {workers}.")
    truth = CocoPanopticReader(ground_truth, ground_truth_dir)
    info = truth.dataset_info
    predicted = CocoPanopticReader(prediction, prediction_dir, dataset_info=info)
    if not len(truth):
        raise UserError(f"'{ground_truth}' has no annotations, so there is nothing to evaluate.")
    unpredicted = [image_id for image_id in truth.annotations if image_id not in predicted.annotations]
    if unpredicted:
        raise UserError(
            f"'{prediction}' has no annotation of image '{unpredicted[0]}' ({len(unpredicted)} of {len(truth)} images "
            "are missing); predict every image of the ground truth, and give the same 'image_id'."
        )
    if output_dir is not None:
        make_folder(output_dir)  # Before the evaluation, which may take long, so that an error comes early.
    quality, iou = PanopticQuality(info, reference_crowd_rule=reference_crowd_rule), SemanticIoU(info)

    # Runs in several threads: it reads files and changes no state. The sums below are added in order.
    def match(image_id: int | str) -> tuple[Matches, ClassifiedOverlaps]:
        truth_ids, truth_segments = truth.read_segments(image_id)
        predicted_ids, predicted_segments = predicted.read_segments(image_id)
        try:
            overlaps = count_segment_overlaps(truth_ids, truth_segments, predicted_ids, predicted_segments, info)
            return quality.match_segments(overlaps, truth_segments), overlaps
        except UserError as error:
            raise UserError(f"Image '{image_id}': {error}") from error

    for done, (matches, overlaps) in enumerate(map_in_order(match, truth.annotations, workers=workers), start=1):
        quality.add(matches)
        iou.add(overlaps)
        if progress is not None:
            progress(done, len(truth))
    metrics = report.metrics_dict(panoptic=quality.result(), semantic=iou.result())
    if output_dir is not None:
        report.write_metrics(Path(output_dir) / "metrics.json", metrics)
    return metrics
