"""The layout of metrics.json and the printed table."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from deeplab2_like.data.dataset_info import Category, DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.evaluation.instance_ap import InstanceAP
from deeplab2_like.evaluation.panoptic_quality import PanopticQuality
from deeplab2_like.evaluation.report import metrics_dict, print_table, scalar_metrics, write_metrics
from deeplab2_like.evaluation.semantic_iou import SemanticIoU

INFO = DatasetInfo(
    "toy",
    (
        Category(1, "sky", False, (0, 0, 255)),
        Category(2, "[cat]", True, (255, 0, 0)),
        Category(3, "dog", True, (0, 255, 0)),
    ),
    label_divisor=10,
    ignore_label=9,
)


@pytest.fixture
def metrics():
    """4 sky pixels, of which 3 are found (IoU 3/4), and a cat of 4 pixels found with 1 too many (IoU 4/5)."""
    ground_truth = np.array([[0, 0, 0, 0, 11, 11, 11, 11]])
    prediction = np.array([[0, 0, 0, 11, 11, 11, 11, 11]])
    panoptic, semantic, instance = PanopticQuality(INFO), SemanticIoU(INFO), InstanceAP(INFO)
    panoptic.update_state(ground_truth, prediction)
    semantic.update_state(ground_truth, prediction)
    instance.update_from_panoptic(
        "a", ground_truth, prediction, segment_id=[11], segment_class=[1], segment_score=[0.5]
    )
    return metrics_dict(panoptic=panoptic.result(), semantic=semantic.result(), instance=instance.result())


def test_layout_in_percent(metrics):
    assert list(metrics) == ["panoptic", "semantic", "instance"]
    assert metrics["panoptic"]["all"] == pytest.approx({"pq": 77.5, "sq": 77.5, "rq": 100.0})
    assert metrics["panoptic"]["things"] == pytest.approx({"pq": 80.0, "sq": 80.0, "rq": 100.0})
    assert metrics["panoptic"]["stuff"] == pytest.approx({"pq": 75.0, "sq": 75.0, "rq": 100.0})
    assert metrics["panoptic"]["per_class"] == {
        "sky": pytest.approx({"pq": 75.0, "sq": 75.0, "rq": 100.0, "tp": 1, "fp": 0, "fn": 0}),
        "[cat]": pytest.approx({"pq": 80.0, "sq": 80.0, "rq": 100.0, "tp": 1, "fp": 0, "fn": 0}),
        "dog": {"pq": 0.0, "sq": 0.0, "rq": 0.0, "tp": 0, "fp": 0, "fn": 0},
    }
    assert metrics["semantic"] == {
        "miou": pytest.approx(77.5),
        "fwiou": pytest.approx(77.5),
        "per_class": pytest.approx({"sky": 75.0, "[cat]": 80.0}),
        "not_predicted": [],
    }
    assert scalar_metrics(metrics)["semantic/miou"] == pytest.approx(77.5)
    assert "semantic/per_class" not in scalar_metrics(metrics)
    # IoU 0.8 reaches 7 of the 10 thresholds 0.50, 0.55, ..., 0.95. There are no medium or large cats.
    assert metrics["instance"] == pytest.approx(
        {
            "ground_truth": "panoptic labels",
            "mask_ap": 70.0,
            "mask_ap50": 100.0,
            "mask_ap75": 100.0,
            "mask_ap_small": 70.0,
            "box_ap": 70.0,
            "box_ap50": 100.0,
            "box_ap75": 100.0,
            "box_ap_small": 70.0,
        }
    )
    assert metrics_dict() == {}
    # TensorBoard gets the numbers only.
    assert scalar_metrics(metrics)["instance/mask_ap"] == pytest.approx(70)
    assert all(isinstance(value, float) for value in scalar_metrics(metrics).values())


def test_file_is_the_mapping(metrics, tmp_path):
    write_metrics(tmp_path / "new" / "metrics.json", metrics)
    assert json.loads((tmp_path / "new" / "metrics.json").read_text()) == metrics
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["metrics.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot write '.*file/metrics\.json'"):
        write_metrics(tmp_path / "file" / "metrics.json", metrics)


def test_table_without_a_terminal(metrics):
    stream = io.StringIO()
    print_table(metrics, title="toy, [val]", console=Console(file=stream, width=100))
    text = stream.getvalue()
    assert "\x1b" not in text
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert rows == [
        ["all", "77.50", "77.50", "100.00", "", "", "", ""],
        ["things", "80.00", "80.00", "100.00", "", "", "", ""],
        ["stuff", "75.00", "75.00", "100.00", "", "", "", ""],
        ["sky", "75.00", "75.00", "100.00", "1", "0", "0", "75.00"],
        # Names in brackets are no markup.
        ["[cat]", "80.00", "80.00", "100.00", "1", "0", "0", "80.00"],
        # Nobody has seen a dog.
    ]
    assert "toy, [val]" in text
    assert "PQ all 77.50  PQ things 80.00  PQ stuff 75.00" in text
    assert "mIoU 77.50  fwIoU 77.50" in text
    assert "AP 70.00  AP50 100.00  AP75 100.00  AP small 70.00" in text
    assert text.count("AP50") == 2
    assert text.splitlines()[-1].strip() == "AP of panoptic labels"


def test_table_of_a_part():
    stream = io.StringIO()
    print_table({"semantic": {"miou": 12.25, "fwiou": 5.0}}, console=Console(file=stream))
    assert stream.getvalue() == "Semantic: mIoU 12.25  fwIoU 5.00\n"


def test_classes_that_the_semantic_head_does_not_predict():
    stream = io.StringIO()
    semantic = {"miou": 50.0, "fwiou": 50.0, "per_class": {"sky": 50.0}, "not_predicted": ["[cat]", "dog"]}
    print_table({"semantic": semantic}, console=Console(file=stream, width=100))
    assert "mean over 1 classes; the head does not predict [cat], dog\n" in stream.getvalue()
