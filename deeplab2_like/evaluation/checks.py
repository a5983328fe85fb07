"""Checks that all metrics share."""

import numpy as np

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.errors import UserError


def check_maps(ground_truth: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Checks a pair of label maps and gives both a batch axis.

    Args:
        ground_truth: Integers [H, W] or [B, H, W].
        prediction: Integers of the same shape.

    Returns:
        Both maps as [B, H, W].

    Raises:
        UserError: If the shapes differ, have another rank, or the values are not integers.
    """
    ground_truth, prediction = np.asarray(ground_truth), np.asarray(prediction)
    for name, labels in (("ground-truth", ground_truth), ("predicted", prediction)):
        if labels.dtype.kind not in "iu":
            raise UserError(f"The {name} map has type {labels.dtype}; label maps hold integers, convert it to int32.")
    if ground_truth.shape != prediction.shape:
        raise UserError(
            f"The ground-truth map has shape {ground_truth.shape} but the predicted map {prediction.shape}; resize the "
            "prediction to the size of the ground truth."
        )
    if ground_truth.ndim not in (2, 3):
        raise UserError(f"Label maps must be [H, W] or [B, H, W], got shape {ground_truth.shape}.")
    if ground_truth.ndim == 2:
        ground_truth, prediction = ground_truth[None], prediction[None]  # [1, H, W]
    return ground_truth, prediction


def require_same_categories(metric: str, first: DatasetInfo, second: DatasetInfo) -> None:
    """Raises `UserError` unless two metrics are for the same classes; `metric` is their name in the message."""
    if first.categories != second.categories:
        raise UserError(
            f"Cannot merge the {metric} of data sets '{first.name}' and '{second.name}': their categories differ; "
            "evaluate both with the same ones."
        )
