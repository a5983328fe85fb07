"""How badly a model that only knows the classes does on `scenes`.

It takes the true class of every pixel, cuts every thing class into connected components (8-neighbors) and scores them
as if they were instances. Crowd regions and void are left out of the prediction, which only helps it. The data set is
worth testing instance segmentation on only if this stays low: exit status 1 if things PQ is not below the limit.

    python benchmarks/scenes_difficulty.py [--images 100] [--size 128x256] [--json FILE]
"""

import argparse
import json
import sys
from pathlib import Path

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.scenes import render_scene, scenes_info
from deeplab2_like.evaluation.panoptic_quality import PanopticQuality, PanopticQualityResult
from deeplab2_like.files import write_atomically

LIMIT = 55.0
FIRST_VALIDATION_INDEX = 1_000_000


def components_of_semantic_map(panoptic: np.ndarray, info: DatasetInfo) -> np.ndarray:
    """Replaces the instances of a label by the connected components of its classes.

    Args:
        panoptic: int32 [H, W], the label.
        info: What its values mean.

    Returns:
        int32 [H, W]: stuff as it was; every thing class cut into connected components; crowds and void as void.
    """
    class_map, instance_map = panoptic // info.label_divisor, panoptic % info.label_divisor
    prediction = panoptic.copy()
    for class_id in info.thing_classes:
        is_class = class_map == class_id
        prediction[is_class] = info.void
        _, components = cv2.connectedComponents((is_class & (instance_map > 0)).astype(np.uint8), connectivity=8)
        is_component = components > 0
        prediction[is_component] = class_id * info.label_divisor + components[is_component]
    return prediction


def measure(images: int, height: int, width: int) -> PanopticQualityResult:
    """Scores the components of the true classes on the first `images` validation scenes."""
    info = scenes_info()
    metric = PanopticQuality(info)
    for index in range(FIRST_VALIDATION_INDEX, FIRST_VALIDATION_INDEX + images):
        _, panoptic = render_scene(index, height=height, width=width)
        metric.update_state(panoptic, components_of_semantic_map(panoptic, info))
    return metric.result()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100, help="number of validation scenes")
    parser.add_argument("--size", default="128x256", help="HEIGHTxWIDTH in pixels")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    try:
        height, width = (int(part) for part in arguments.size.lower().split("x"))
    except ValueError:
        parser.error(f"--size must be HEIGHTxWIDTH, for example 128x256, got '{arguments.size}'")
    if arguments.images < 1:
        parser.error(f"--images must be 1 or more, got {arguments.images}")

    result = measure(arguments.images, height, width)
    info = scenes_info()
    names = [info.categories[class_id].name for class_id in info.thing_classes]
    scores = {name: result.per_class[name] for name in names} | {"things": result.things}
    rows = {name: {key: 100 * getattr(score, key) for key in ("pq", "sq", "rq")} for name, score in scores.items()}

    print(f"Components of the true classes, {arguments.images} scenes of {height}x{width}, in percent")
    table = Table("class")
    for column in ("PQ", "SQ", "RQ"):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(f"{value:.1f}" for value in row.values()))
    Console().print(table)
    passed = rows["things"]["pq"] < LIMIT
    print(f"things PQ {rows['things']['pq']:.1f}, limit {LIMIT:.0f}: {'passed' if passed else 'FAILED'}")

    if arguments.json:
        content = {"images": arguments.images, "size": [height, width], "limit": LIMIT, "passed": passed, "pq": rows}
        write_atomically(arguments.json, (json.dumps(content, indent=1) + "\n").encode())
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
