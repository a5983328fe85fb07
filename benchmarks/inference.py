"""How long inference takes, part by part, for every system, with ResNet-50 and COCO's classes.

The image is noise, and so are the weights; what depends on the number of instances is made up: `--instances` of them,
with round masks, all above the threshold. Each part is a graph of its own for the size at hand, batch 1:

* `network`: from the image to raw outputs, convolutions, and for Panoptic FPN boxes and masks in boxes;
* `dense part`, for Panoptic FPN: the network without proposals and heads of the detector;
* `post-processing`: everything after the network, for Panoptic FCN including selection and fusion of kernels, for
  LPSNet including selection of boxes;
* `class of pixels`, for Panoptic FPN: the argmax of the upsampled semantic logits;
* `merge`, for Panoptic FPN: the rest of post-processing, from masks at image size to scored segments;
* `panoptic head`, for LPSNet: pasting of boxes onto the semantic map, conflicts, and painting of the map;
* `potential and affinities`, for the unifying system: both at the resolution of the semantic map. The paper counts 5 G
  multiply-adds for the affinities, beside 140 G of backbone and pyramid, at 800x1300;
* `panoptic submodule`, for the unifying system: these, and the argmax over all slots at full size.

The post-processing runs with its stages compiled with XLA, and as a plain graph beside it. Median over the runs.

    python benchmarks/inference.py [--size 800x1216] [--instances 100] [--runs 5] [--json FILE]
    python benchmarks/inference.py --systems unifying --config cityscapes_resnet50 --size 1024x2048
"""

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table

from deeplab2_like.configs import load_config
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.files import write_atomically
from deeplab2_like.model import SYSTEMS, PanopticSystem, build_system
from deeplab2_like.model.geometry import Geometry
from deeplab2_like.model.lpsnet import LPSNet, PanopticHead
from deeplab2_like.model.panoptic_fcn import PanopticFCN
from deeplab2_like.model.panoptic_fcn.postprocess import find_things, rank_things
from deeplab2_like.model.panoptic_fpn import PanopticFPN
from deeplab2_like.model.stages import compiled_stages
from deeplab2_like.model.unifying import Unifying
from deeplab2_like.model.unifying.postprocess import find_best_slots
from deeplab2_like.model.unifying.potential import slot_potentials

compile_with_xla = functools.partial(tf.function, jit_compile=True)
# COCO's: 80 things, 53 stuff.
COCO = DatasetInfo.from_coco_categories(
    [{"id": i, "name": f"class {i}", "isthing": int(i < 80)} for i in range(133)], name="coco"
)


def milliseconds(function: Callable[[], Any], runs: int) -> float:
    """Median time of a call, after two that compile."""
    times = []
    for run in range(runs + 2):
        start = time.perf_counter()
        tf.nest.map_structure(lambda value: value.numpy(), function())
        if run >= 2:
            times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def made_up_detections(outputs: dict[str, tf.Tensor], height: int, width: int, number: int) -> dict[str, tf.Tensor]:
    """Replaces detections by instances of all sizes, best first."""
    random = np.random.default_rng(0)
    rows, side = outputs["boxes"].shape[1], outputs["masks"].shape[-1]
    sides = np.exp(random.uniform(np.log(16), np.log(min(height, width) / 1.5), (rows, 2)))
    middle = random.uniform(0, 1, (rows, 2)) * (height, width)
    boxes = np.concatenate([middle - sides / 2, middle + sides / 2], axis=1)  # [N, 4]
    boxes = np.clip(boxes, 0, [height, width, height, width])
    y, x = (np.mgrid[:side, :side] + 0.5) / side - 0.5
    masks = np.broadcast_to(np.clip(1.5 - 2.5 * np.hypot(y, x), 0, 1), (rows, side, side))
    scores = np.where(np.arange(rows) < number, np.linspace(0.99, 0.6, rows), 0.0)
    made_up = {"boxes": boxes, "scores": scores, "masks": masks}
    return outputs | {name: tf.constant(value[None], tf.float32) for name, value in made_up.items()}


def made_up_kernels(
    system: PanopticFCN, outputs: dict[str, tf.Tensor], height: int, width: int, number: int
) -> dict[str, tf.Tensor]:
    """Replaces the outputs of Panoptic FCN by round things of all sizes, spread over all classes.

    A disk is where r^2 - (y - v)^2 - (x - u)^2 is positive, which is linear in 1, y, x and y^2 + x^2: these are the
    first channels of the feature, and the kernel at the center of a thing holds their factors.
    """
    random = np.random.default_rng(0)
    coarse_height, coarse_width, channels = outputs["feature"].shape[1:]
    y, x = np.mgrid[:coarse_height, :coarse_width] * (system.config.stride / min(height, width))
    feature = np.zeros((1, coarse_height, coarse_width, channels), np.float32)
    feature[0, ..., :4] = np.stack([np.ones_like(y), y, x, y**2 + x**2], axis=-1)
    made_up = {"feature": feature}
    level_strides = system.config.level_strides
    levels = list(level_strides)
    for level in levels:
        made_up[f"center_{level}"] = np.full(outputs[f"center_{level}"].shape, -8.0, np.float32)
        made_up[f"kernel_{level}"] = outputs[f"kernel_{level}"].numpy()
    for index in range(number):
        radius = np.exp(random.uniform(np.log(8), np.log(min(height, width) / 3)))
        # The last two levels have too few positions.
        level = levels[min(int(np.log2(1 + radius / 16)), len(levels) - 3)]
        rows, columns = made_up[f"center_{level}"].shape[1:3]
        row, column = random.integers(rows), random.integers(columns)
        v, u = np.array([row, column]) * (level_strides[level] / min(height, width))
        factors = np.array([(radius / min(height, width)) ** 2 - v**2 - u**2, 2 * v, 2 * u, -1.0])
        made_up[f"center_{level}"][0, row, column, index % made_up[f"center_{level}"].shape[-1]] = (
            4 - 3 * index / number
        )
        made_up[f"kernel_{level}"][0, row, column] = 0
        made_up[f"kernel_{level}"][0, row, column, :4] = 1000 * factors
    embed = system.kernel_head.embed_things
    embed.kernel.assign(np.eye(*embed.kernel.shape))
    return outputs | {name: tf.constant(value, tf.float32) for name, value in made_up.items()}


def paste_made_up_boxes(system: LPSNet, height: int, width: int, number: int) -> Callable[[Any], Any]:
    """Pastes boxes of all sizes and classes with the panoptic head of LPSNet, on a semantic map made of these boxes.

    Half of the boxes have the same class, so that there are conflicts.
    """
    random = np.random.default_rng(0)
    config, rows = system.config.postprocess, system.config.postprocess.detections
    sides = np.exp(random.uniform(np.log(16), np.log(min(height, width) / 1.5), (rows, 2)))
    middle = random.uniform(0, 1, (rows, 2)) * (height, width)
    boxes = np.concatenate([middle - sides / 2, middle + sides / 2], axis=1)  # [N, 4]
    boxes = np.clip(boxes, 0, [height, width, height, width])
    classes = np.where(np.arange(rows) % 2, 0, random.integers(0, 80, rows))
    semantic = np.full((1, height, width), 100, np.int32)
    for box, class_id in zip(boxes.astype(int), classes, strict=True):
        semantic[0, box[0] : box[2], box[1] : box[3]] = class_id
    scores = np.where(np.arange(rows) < number, np.linspace(0.99, 0.5, rows), 0.0)
    head = PanopticHead(
        system.dataset_info,
        conflicts=config.conflicts,
        overlap_threshold=config.overlap_threshold,
        stuff_area_limit=config.stuff_area_limit,
        size_limits=system.config.box.size_limits,
    )
    inputs = [
        tf.constant(semantic),
        tf.constant(boxes[None], tf.float32),
        tf.constant(scores[None], tf.float32),
        tf.constant(classes[None], tf.int32),
        tf.constant(random.random((1, len(system.config.box.levels), height, width)), tf.float32),
    ]
    return lambda outputs: head.paste(*inputs)


def measure(system: PanopticSystem, size: tuple[int, int], instances: int, runs: int) -> dict[str, float]:
    """Times the parts of a system, in milliseconds."""
    height, width = size
    image = tf.constant(np.random.default_rng(0).integers(0, 256, (1, height, width, 3)), tf.uint8)
    network = tf.function(lambda images: system(images, training=False), autograph=False)
    outputs = dict(network(image))
    times = {"network": milliseconds(lambda: network(image), runs)}
    parts: dict[str, Callable[..., Any]] = {"post-processing": lambda outputs: system.finish(outputs, size)}
    if isinstance(system, PanopticFPN):

        def dense(images: tf.Tensor) -> Any:
            pyramid = system.fpn(system.backbone(system.prepare_images(images), training=False), training=False)
            return pyramid, system.semantic_branch(pyramid, training=False)

        dense_graph = tf.function(dense, autograph=False)
        times["dense part"] = milliseconds(lambda: dense_graph(image), runs)
        outputs = made_up_detections(outputs, height, width, instances)
        parts["class of pixels"] = lambda outputs: Geometry.of(outputs, size).argmax(
            outputs["semantic_logits"], stride=system.stride
        )
    if isinstance(system, PanopticFCN):
        outputs = made_up_kernels(system, outputs, height, width, instances)
        things = find_things(outputs, system.config, system.kernel_head)
        things, _, _ = rank_things(outputs["feature"], things, system.config.postprocess)
        used = np.sum(things.scores >= system.config.postprocess.map_score_threshold)
        print(f"{system.name}: {used} of {instances} things are neither fused nor below the score threshold")
    if isinstance(system, Unifying):
        outputs = made_up_detections(outputs, height, width, instances)
        options = {"potential": system.config.panoptic.potential, "stride": system.stride}
        parts["panoptic submodule"] = lambda outputs: find_best_slots(
            outputs, Geometry.of(outputs, size), system.config.postprocess, system.dataset_info, **options
        )
        parts["potential and affinities"] = lambda outputs: slot_potentials(outputs, system.dataset_info, **options)[1]
    if isinstance(system, LPSNet):
        parts["panoptic head"] = paste_made_up_boxes(system, height, width, instances)
    for name, part in parts.items():

        def in_stages(outputs: Any, part: Callable[..., Any] = part) -> Any:
            with compiled_stages(compile_with_xla):
                return part(outputs)

        for suffix, function in (("", in_stages), (", plain graph", part)):
            graph = tf.function(function, autograph=False)
            times[name + suffix] = milliseconds(functools.partial(graph, outputs), runs)
    if "class of pixels" in times:
        for suffix in ("", ", plain graph"):
            times[f"merge{suffix}"] = times[f"post-processing{suffix}"] - times[f"class of pixels{suffix}"]
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="800x1216", help="height x width (default: %(default)s)")
    parser.add_argument("--config", default="coco_resnet50", help="name of the config (default: %(default)s)")
    parser.add_argument("--instances", type=int, default=100)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--systems", nargs="+", default=sorted(SYSTEMS))
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    height, width = (int(side) for side in options.size.split("x"))

    results = {}
    for name in options.systems:
        system = build_system(load_config(f"{name}/{options.config}"), COCO)
        results[name] = measure(system, (height, width), options.instances, options.runs)
        table = Table(title=f"{name}, {height}x{width}, ResNet-50", title_justify="left")
        table.add_column("part")
        table.add_column("ms", justify="right")
        table.add_column("share of network and post-processing", justify="right")
        total = results[name]["network"] + results[name]["post-processing"]
        for part, value in results[name].items():
            table.add_row(part, f"{value:.0f}", f"{100 * value / total:.1f} %")
        Console().print(table)
    if options.json is not None:
        write_atomically(options.json, (json.dumps(results, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
