"""A predictor for tests without a network: things are the connected components of the image's colors."""

import cv2
import numpy as np

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.export.prediction import PanopticPrediction, make_prediction

INFO = DatasetInfo.from_coco_categories(
    [
        {"id": 7, "name": "road", "isthing": 0, "color": [128, 64, 128]},
        {"id": 26, "name": "car", "isthing": 1, "color": [0, 0, 142]},
        {"id": 24, "name": "person", "isthing": 1, "color": [220, 20, 60]},
        {"id": 23, "name": "sky", "isthing": 0, "color": [70, 130, 180]},
    ],
    name="fake",
)


class FakePredictor:
    """Reads the class of a pixel from red, of an image uint8 [H, W, 3]; values without a class are void.

    Connected pixels of a thing class, also diagonally, are one object; objects are numbered by their first pixels. The
    score of a class is given by `scores`.
    """

    def __init__(self, info: DatasetInfo = INFO, *, identity: str = "fake", scores: dict[int, float] | None = None):
        self.dataset_info = info
        self.identity = identity
        self.scores = scores or {}
        self.sizes: list[tuple[int, int]] = []

    def __call__(self, image: np.ndarray) -> PanopticPrediction:
        assert image.flags.c_contiguous
        self.sizes.append(image.shape[:2])
        info, classes = self.dataset_info, image[..., 0]
        panoptic = np.full(classes.shape, info.void, np.int32)
        for class_id, category in enumerate(info.categories):
            mask = classes == class_id
            panoptic[mask] = class_id * info.label_divisor
            if category.is_thing:
                _, components = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
                values, first = np.unique(components[mask], return_index=True)
                order = np.zeros(int(components.max()) + 1, np.int32)
                order[values[np.argsort(first)]] = np.arange(1, values.size + 1)
                panoptic[mask] += order[components[mask]]
        values = np.unique(panoptic)
        scores = {value: self.scores.get(value // info.label_divisor, 0.5) for value in values.tolist()}
        return make_prediction(panoptic, scores, info)


def image_of(classes: np.ndarray) -> np.ndarray:
    """Makes the image, uint8 [H, W, 3], in which `FakePredictor` sees these classes, [H, W]."""
    return np.stack([classes] * 3, axis=-1).astype(np.uint8)
