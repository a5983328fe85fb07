"""Reports of an evaluation: `metrics.json`, a table and TensorBoard events, in percent as papers print them."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deeplab2_like.evaluation.instance_ap import InstanceAPResult
from deeplab2_like.evaluation.instance_iou import InstanceIoUResult
from deeplab2_like.evaluation.panoptic_quality import PanopticQualityResult
from deeplab2_like.evaluation.semantic_iou import SemanticIoUResult
from deeplab2_like.files import write_atomically
from deeplab2_like.printing import name_text, print_line, print_whole_table


def metrics_dict(
    *,
    panoptic: PanopticQualityResult | None = None,
    semantic: SemanticIoUResult | None = None,
    instance_iou: InstanceIoUResult | None = None,
    instance: InstanceAPResult | None = None,
) -> dict[str, Any]:
    """Arranges results in the form of `metrics.json`.

    Args:
        panoptic: Result of `PanopticQuality`, if it was computed.
        semantic: Result of `SemanticIoU`, if it was computed.
        instance_iou: Result of `InstanceIoU`, if it was computed; only with `semantic`.
        instance: Result of `InstanceAP`, if it was computed.

    Returns:
        Nested mappings, each only if given. Fractions are in percent; "tp", "fp" and "fn" are counts.
        "panoptic": "all", "things", "stuff" and "per_class".
        "semantic": "miou", "fwiou", "per_class", "not_predicted", and with `instance_iou` "iiou", "category_iiou" and
        "iiou_per_class". The IoU of a class that occurs nowhere or that the semantic head does not predict is left out.
        "instance": "ground_truth", the source of the objects; "mask_ap", "box_ap" and so on. An AP without any ground
        truth (for instance of large objects where there are none) is left out.
    """
    metrics: dict[str, Any] = {}
    if panoptic is not None:
        metrics["panoptic"] = {
            group: {name: 100.0 * getattr(getattr(panoptic, group), name) for name in ("pq", "sq", "rq")}
            for group in ("all", "things", "stuff")
        }
        metrics["panoptic"]["per_class"] = {
            name: {
                "pq": 100.0 * quality.pq,
                "sq": 100.0 * quality.sq,
                "rq": 100.0 * quality.rq,
                "tp": quality.true_positives,
                "fp": quality.false_positives,
                "fn": quality.false_negatives,
            }
            for name, quality in panoptic.per_class.items()
        }
    if semantic is not None:
        metrics["semantic"] = {
            "miou": 100.0 * semantic.miou,
            "fwiou": 100.0 * semantic.fwiou,
            "per_class": {name: 100.0 * value for name, value in semantic.per_class.items()},
            "not_predicted": list(semantic.not_predicted),
        }
    if instance_iou is not None:
        named = {"iiou": instance_iou.iiou, "category_iiou": instance_iou.category_iiou}
        metrics["semantic"] |= {name: 100.0 * value for name, value in named.items() if value is not None}
        metrics["semantic"]["iiou_per_class"] = {
            name: 100.0 * value for name, value in instance_iou.per_class.items() if value is not None
        }
    if instance is not None:
        metrics["instance"] = {"ground_truth": instance.ground_truth} | {
            f"{kind}_{name}": 100.0 * value
            for kind, precision in (("mask", instance.mask), ("box", instance.box))
            for name in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
            if (value := getattr(precision, name)) is not None
        }
    return metrics


def scalar_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Names the numbers of `metrics_dict` for TensorBoard, without those of single classes.

    Returns:
        Names, such as `panoptic/pq`, `panoptic/things_pq`, `semantic/miou`, `instance/mask_ap`, and numbers in percent.
    """
    scalars = {
        f"panoptic/{name}" if group == "all" else f"panoptic/{group}_{name}": value
        for group, values in metrics.get("panoptic", {}).items()
        if group != "per_class"
        for name, value in values.items()
    }
    for part in ("semantic", "instance"):
        values = metrics.get(part, {}).items()
        scalars |= {f"{part}/{name}": value for name, value in values if isinstance(value, float)}
    return scalars


def write_metrics(path: str | os.PathLike[str], metrics: Mapping[str, Any]) -> None:
    """Writes the mapping of `metrics_dict` as JSON, whole or not at all.

    Raises:
        UserError: If the file cannot be written.
    """
    write_atomically(path, (json.dumps(metrics, indent=1, allow_nan=False) + "\n").encode())


def write_events(folder: str | os.PathLike[str], metrics: Mapping[str, Any], *, step: int) -> None:
    """Adds the numbers of `scalar_metrics` to the TensorBoard events of a folder, at a training step."""
    import tensorflow as tf  # Imported here, because `evaluate_files` works without TensorFlow.

    writer = tf.summary.create_file_writer(str(folder))
    with writer.as_default(step=step):
        for name, value in scalar_metrics(metrics).items():
            tf.summary.scalar(name, value)
    writer.close()


def write_results(
    folder: str | os.PathLike[str],
    metrics: Mapping[str, Any],
    *,
    model_dir: str | os.PathLike[str],
    step: int,
    split: str,
    images: int,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes `metrics.json`, and, for an evaluation without options, TensorBoard events.

    Args:
        folder: The folder of both.
        metrics: The mapping of `metrics_dict`.
        model_dir: The model folder.
        step: The training step of the weights.
        split: Name of the split.
        images: Number of images of the split.
        options: Further settings that change the numbers, such as an oracle.

    Returns:
        The content of `metrics.json`: `metrics`, and a description of the evaluation under the key `evaluation`.

    Raises:
        UserError: If the file cannot be written.
    """
    options = options or {}
    description = {"model_dir": str(model_dir), "step": step, "split": split, "images": images, **options}
    content = {**metrics, "evaluation": description}
    write_metrics(Path(folder) / "metrics.json", content)
    if not options:
        # With options, for instance an oracle, TensorBoard would show the numbers as those of the plain model.
        write_events(folder, metrics, step=step)
    return content


def print_table(metrics: Mapping[str, Any], *, title: str | None = None, console: Console | None = None) -> None:
    """Prints the mapping of `metrics_dict` as a table; plain text where there is no terminal.

    Args:
        metrics: The mapping of `metrics_dict`, or the content of `metrics.json`.
        title: A line above the table, for instance the data set and the checkpoint.
        console: Where to print; standard output by default.
    """
    console = console or Console()
    semantic = metrics.get("semantic", {})
    class_iou = semantic.get("per_class", {})
    if panoptic := metrics.get("panoptic"):
        if title is not None:
            print_line(title, console)
        table = Table()
        table.add_column("class")
        for header in ("PQ", "SQ", "RQ", "TP", "FP", "FN", "IoU"):
            table.add_column(header, justify="right", no_wrap=True)
        groups = ("all", "things", "stuff")
        for group in groups:
            table.add_row(group, *_format_percents(panoptic[group], "pq", "sq", "rq"), "", "", "", "", style="bold")
        table.add_section()
        for name, quality in panoptic["per_class"].items():
            counts = [quality[key] for key in ("tp", "fp", "fn")]
            if not any(counts) and name not in class_iou:
                continue  # A class that occurs nowhere has no quality; zeros would look like failures.
            values = _format_percents(quality, "pq", "sq", "rq") if any(counts) else ["", "", ""]
            iou = f"{class_iou[name]:.2f}" if name in class_iou else ""
            table.add_row(name_text(name, console), *values, *(str(count) for count in counts), iou)
        print_whole_table(table, console)
        # Again, as the first rows of a table of many classes scroll away.
        _print_line(console, "Panoptic", {f"PQ {group}": panoptic[group]["pq"] for group in groups})
    if semantic:
        titles = {"miou": "mIoU", "fwiou": "fwIoU", "iiou": "iIoU", "category_iiou": "category iIoU"}
        _print_line(console, "Semantic", {title: semantic[key] for key, title in titles.items() if key in semantic})
        if left_out := semantic.get("not_predicted"):
            text = f"mean over {len(class_iou)} classes; the head does not predict {', '.join(left_out)}"
            print_line(f"          {text}", console)
    for kind in ("mask", "box"):
        precisions = {
            key.removeprefix(f"{kind}_").replace("ap", "AP").replace("_", " "): value
            for key, value in metrics.get("instance", {}).items()
            if key.startswith(f"{kind}_")
        }
        if precisions:
            _print_line(console, f"{kind.capitalize()} AP", precisions)
    if ground_truth := metrics.get("instance", {}).get("ground_truth"):
        print_line(f"          AP of {ground_truth}", console)


def _format_percents(values: Mapping[str, float], *keys: str) -> list[str]:
    """Formats percentages with two digits, one more than most papers print."""
    return [f"{values[key]:.2f}" for key in keys]


def _print_line(console: Console, name: str, values: Mapping[str, float]) -> None:
    """Prints named percentages on one line."""
    print_line(f"{name + ':':<10}" + "  ".join(f"{key} {value:.2f}" for key, value in values.items()), console)
