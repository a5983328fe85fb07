"""`import-weights`: made-up checkpoints of the released layouts become model folders that every command can use."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tensorflow as tf
from reference_state import read_deeplab2_state, read_reference_state

from deeplab2_like.cli import main
from deeplab2_like.configs import list_configs, load_config
from deeplab2_like.data.known_datasets import DATA_SETS, find_data_set
from deeplab2_like.errors import UserError
from deeplab2_like.model.panoptic_deeplab import PanopticDeepLab
from deeplab2_like.model_folder import check_model_folder, load_model_folder
from deeplab2_like.weights.deeplab2_panoptic_deeplab import deeplab2_config
from deeplab2_like.weights.import_weights import MODEL_SOURCES, recognize
from deeplab2_like.weights.released import RELEASED

DATA = Path(__file__).parents[1] / "data"
COCO = DATA_SETS["coco"]


Refuse = Callable[..., str]


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Runs `import-weights`, which must refuse with one sentence, and returns that."""

    def run(*arguments: Any) -> str:
        capsys.readouterr()
        status = main(["import-weights", *(str(argument) for argument in arguments)])
        lines = capsys.readouterr().err.splitlines()
        assert status == 2, lines
        assert len(lines) == 1, lines
        return lines[0].removeprefix("deeplab2-like: ")

    return run


def import_file(*arguments: Any) -> None:
    assert main(["import-weights", *(str(argument) for argument in arguments)]) == 0


def read(folder: str, name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / folder / f"{name}.npz") as file:
        return dict(file)


# --- Panoptic FPN. ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fpn_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("fpn") / "model_final.npz"
    state = read_reference_state(DATA / "detectron2_panoptic_fpn")
    np.savez(file, **state, pixel_mean=np.zeros(3, np.float32))
    return file


@pytest.fixture(scope="module")
def fpn_model(fpn_file: Path) -> Path:
    model = fpn_file.parent / "new" / "model"
    # The reference image is small, and was not resized.
    import_file(fpn_file, "--output-dir", model, "--set", "model.resize=null")
    return model


def test_panoptic_fpn_gives_the_maps_of_detectron2(fpn_model: Path) -> None:
    image = read("detectron2_panoptic_fpn", "forward")["image"]
    expected = read("detectron2_panoptic_fpn", "postprocess")
    low = ["model.postprocess.score_threshold=0.1", "model.postprocess.stuff_area_limit=200"]
    for overrides, name in (([], "panoptic_stock"), (low, "panoptic_low")):
        config, system, step = load_model_folder(fpn_model, overrides)
        assert step == 0
        outputs = system(image[None]) | {"network_size": tf.constant(image.shape[:2])}
        found = system.postprocess(outputs, (180, 225))["panoptic"][0].numpy()
        # Rounding decides some pixels on the borders of segments.
        assert np.mean(found == expected[name]) > 0.999
        assert set(np.unique(found)) == set(np.unique(expected[name]))
    assert config.model.backbone.name == "resnet50"
    assert system.dataset_info == COCO


def test_source_of_the_weights(fpn_file: Path, fpn_model: Path) -> None:
    source = json.loads((fpn_model / "source.json").read_text())
    assert source["sha256"] == {"model_final.npz": hashlib.sha256(fpn_file.read_bytes()).hexdigest()}
    assert source["source"] == "detectron2_panoptic_fpn"
    assert source["config"] == "panoptic_fpn/coco_detectron2"
    assert source["overrides"] == ["model.backbone.name=resnet50", "model.resize=null"]
    assert len(source["loaded"]) == 330
    assert source["ignored"] == ["pixel_mean"]
    assert source["kept_initial"] == []
    names = {path.name for path in fpn_model.rglob("*")}
    assert names == {
        "config.yaml",
        "dataset_info.json",
        "source.json",
        "checkpoints",
        "ckpt-0.index",
        "ckpt-0.data-00000-of-00001",
    }
    assert list(fpn_model.parent.iterdir()) == [fpn_model]


def write_coco_set(folder: Path, image: np.ndarray, panoptic: np.ndarray) -> None:
    """Writes an image and its panoptic map as a data set in COCO panoptic format."""
    for name in ("images", "panoptic"):
        (folder / name).mkdir(parents=True)
    assert cv2.imwrite(str(folder / "images" / "1.png"), image[:, :, ::-1])
    segments, ids = [], np.zeros(panoptic.shape, np.int32)
    for number, value in enumerate(np.unique(panoptic[panoptic != COCO.void]), start=1):
        ids[panoptic == value] = number
        segments.append({"id": number, "category_id": COCO.categories[value // 1000].id, "iscrowd": 0, "area": 1})
    assert cv2.imwrite(str(folder / "panoptic" / "1.png"), np.stack([ids * 0, ids * 0, ids], axis=2).astype(np.uint8))
    height, width = panoptic.shape
    content = {
        "images": [{"id": 1, "file_name": "1.png", "height": height, "width": width}],
        "annotations": [{"image_id": 1, "file_name": "1.png", "segments_info": segments}],
        "categories": COCO.to_coco_categories(),
    }
    (folder / "panoptic_val.json").write_text(json.dumps(content))


def test_evaluation_of_imported_weights(fpn_model: Path, tmp_path: Path) -> None:
    image = read("detectron2_panoptic_fpn", "forward")["image"]
    reference = read("detectron2_panoptic_fpn", "postprocess")["panoptic_low"]
    # The reference map has 3/2 of the size of the image: sampled at the centers of the pixels.
    rows, columns = (((np.arange(side) + 0.5) * 1.5).astype(int) for side in image.shape[:2])
    reference = reference[rows][:, columns]
    write_coco_set(tmp_path, image, reference)
    inputs = ["--images", tmp_path / "images", "--panoptic", tmp_path / "panoptic"]
    convert = ["coco-panoptic", *inputs, "--json", tmp_path / "panoptic_val.json", "--output-dir", tmp_path / "records"]
    assert main(["convert", *(str(argument) for argument in convert)]) == 0
    overrides = [f"data.path={tmp_path / 'records'}", "model.postprocess.score_threshold=0.1"]
    # Areas at the size of the image are 4/9 of those of the reference.
    overrides.append(f"model.postprocess.stuff_area_limit={200 * 4 // 9}")
    arguments = ["--model-dir", str(fpn_model), "--output-dir", str(tmp_path / "results"), "--set", *overrides]
    assert main(["evaluate", *arguments]) == 0
    metrics = json.loads((tmp_path / "results" / "metrics.json").read_text())
    # Random weights find nothing. The network is sure of little in this image of noise, so a few segments differ.
    assert metrics["panoptic"]["all"]["rq"] > 85


# --- Other sources. ---------------------------------------------------------------------------------------------------


def compare_segments(found: np.ndarray, expected: np.ndarray) -> tuple[int, int, float]:
    """Returns how many of the found segments match an expected one, of how many, and their share of equal pixels."""
    areas = [dict(zip(*np.unique(panoptic, return_counts=True), strict=True)) for panoptic in (found, expected)]
    pairs, shared = np.unique(np.stack([found.ravel(), expected.ravel()]), axis=1, return_counts=True)
    matches = [
        area
        for (one, other), area in zip(pairs.T, shared, strict=True)
        if one // 1000 == other // 1000 and area > (areas[0][one] + areas[1][other] - area) / 2
    ]
    return len(matches), len(areas[0]), sum(matches) / found.size


def test_panoptic_deeplab_gives_the_maps_of_detectron2(tmp_path: Path) -> None:
    np.savez(tmp_path / "file.npz", **read_reference_state(DATA / "detectron2_panoptic_deeplab"))
    # The reference model was built for crops of 128x128, and its image was not resized.
    changes = ["model.aspp.pooling_window=[8,8]", "model.resize=null"]
    import_file(tmp_path / "file.npz", "--output-dir", tmp_path / "model", "--set", *changes)
    config, system, _ = load_model_folder(tmp_path / "model")
    image = read("detectron2_panoptic_deeplab", "forward")["image"]
    found = system.infer(image[None])["panoptic"][0].numpy()
    expected = read("detectron2_panoptic_deeplab", "panoptic")["stock"]
    # Detectron2 finds 180 centers in this image of noise. 22 of them are the second of two pixels with equal heat at
    # the border, which are one center here; all other segments are there in both.
    matched, total, pixels = compare_segments(found, expected)
    assert total == 161
    assert matched >= 154  # Ties of this noise may fall either way, depending on the processor.
    assert pixels > 0.94
    assert {value for value in np.unique(found) if value < 11_000} == {4000, 6000}
    assert config.model.decoder.convolution == "separable"
    assert system.dataset_info == DATA_SETS["cityscapes"]


def test_panoptic_fcn_computes_what_the_released_code_computes(tmp_path: Path) -> None:
    np.savez(tmp_path / "file.npz", **read_reference_state(DATA / "detectron2_panoptic_fcn"))
    import_file(tmp_path / "file.npz", "--output-dir", tmp_path / "model", "--set", "model.resize=null")
    config, system, _ = load_model_folder(tmp_path / "model")
    expected = read("detectron2_panoptic_fcn", "forward")
    outputs = system(expected["image"][None])
    # The reference maps are from other weights of the last convolutions, so the raw outputs are compared.
    for name in outputs.keys() & expected.keys():
        values = outputs[name][0, ::2, ::2] if name.endswith("p3") or name == "feature" else outputs[name][0]
        values = values[..., ::2] if name == "feature" else values[..., : expected[name].shape[-1]]
        # Deformable convolutions amplify rounding errors.
        tolerance = 0.02 if name.startswith(("center", "region")) else 2e-3
        assert np.abs(values - expected[name]).max() < tolerance * expected[name].std(), name
    assert len(outputs.keys() & expected.keys()) == 16
    assert config.model.image_mean == (103.53, 116.28, 123.675)


def deeplab2_shapes(name: str) -> dict[str, np.ndarray]:
    """Arrays with the names and shapes of a DeepLab2 checkpoint, which take no memory."""
    lines = (DATA / "deeplab2_panoptic_deeplab" / f"{name}.txt").read_text().splitlines()
    shapes = {name: tuple(int(size) for size in sizes.split("x")) for name, sizes in map(str.split, lines)}
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("name", "config", "default"),
    [
        ("cityscapes_resnet50_os32", "cityscapes_deeplab2", "cityscapes_deeplab2"),
        ("cityscapes_resnet50_os32", "cityscapes_deeplab2_os16", "cityscapes_deeplab2"),
        ("cityscapes_resnet50_beta_os32", "cityscapes_resnet50_beta_deeplab2", "cityscapes_resnet50_beta_deeplab2"),
        # MobileNetV3 was released at output stride 16 only.
        (
            "cityscapes_mobilenet_v3_large_os16",
            "cityscapes_mobilenet_v3_large_deeplab2_os16",
            "cityscapes_mobilenet_v3_large_deeplab2_os16",
        ),
        (
            "cityscapes_mobilenet_v3_large_os16",
            "cityscapes_mobilenet_v3_large_deeplab2",
            "cityscapes_mobilenet_v3_large_deeplab2_os16",
        ),
        ("coco_resnet50_os16", "coco_deeplab2", "coco_deeplab2"),
        ("coco_resnet50_os16", "coco_deeplab2_os16", "coco_deeplab2"),
    ],
)
def test_configs_of_deeplab2(name: str, config: str, default: str) -> None:
    state = deeplab2_shapes(name)
    data_set = name.partition("_")[0]
    assert recognize(state, "file") == "deeplab2_panoptic_deeplab"
    source = MODEL_SOURCES["deeplab2_panoptic_deeplab"]
    assert source.find_config(state) == (f"panoptic_deeplab/{default}", data_set)
    stride = 16 if "os16" in config else 32
    expected = deeplab2_config(state, data_set=data_set, output_stride=stride)
    for overrides in ([], source.find_overrides(state)):
        assert load_config(f"panoptic_deeplab/{config}", overrides).model == expected


def test_configs_of_deeplab2_for_other_backbones() -> None:
    # They differ by these keys from those that the test above compares.
    stem, small = "model.backbone.stem=three_convolutions", "model.backbone.name=mobilenet_v3_small"
    for name, base, override in (
        ("coco_resnet50_beta_deeplab2", "coco_deeplab2", stem),
        ("coco_resnet50_beta_deeplab2_os16", "coco_deeplab2_os16", stem),
        ("cityscapes_mobilenet_v3_small_deeplab2", "cityscapes_mobilenet_v3_large_deeplab2", small),
        ("cityscapes_mobilenet_v3_small_deeplab2_os16", "cityscapes_mobilenet_v3_large_deeplab2_os16", small),
    ):
        assert load_config(f"panoptic_deeplab/{name}") == load_config(f"panoptic_deeplab/{base}", [override])


@pytest.mark.parametrize("size", ["small", "large"])
def test_configs_of_deeplab2_that_no_guide_lists_build(size: str) -> None:
    config = load_config(f"panoptic_deeplab/cityscapes_mobilenet_v3_{size}_deeplab2")
    system = PanopticDeepLab(config.model, DATA_SETS["cityscapes"])  # Its variables are created later.
    assert system.config.backbone.name == f"mobilenet_v3_{size}"


def test_deeplab2_gives_its_maps(tmp_path: Path) -> None:
    # A folder with the files of a TensorFlow checkpoint.
    folder = tmp_path / "mobilenet"
    folder.mkdir()
    state = read_deeplab2_state(DATA / "deeplab2_panoptic_deeplab" / "cityscapes_mobilenet_v3_large_os16.txt")
    tf.raw_ops.SaveV2(
        prefix=str(folder / "ckpt-60000"),
        tensor_names=[f"{name}/.ATTRIBUTES/VARIABLE_VALUE" for name in state],
        shape_and_slices=[""] * len(state),
        tensors=list(state.values()),
    )
    # The reference model was built for crops of 129x257, of which its image is one.
    import_file(
        folder,
        "--output-dir",
        tmp_path / "model",
        "--set",
        "model.min_padded_size=[129,257]",
        "model.aspp.pooling_window=[9,17]",
    )
    source = json.loads((tmp_path / "model" / "source.json").read_text())
    assert set(source["sha256"]) == {"ckpt-60000.index", "ckpt-60000.data-00000-of-00001"}
    _, system, _ = load_model_folder(tmp_path / "model")
    expected = read("deeplab2_panoptic_deeplab", "cityscapes_mobilenet_v3_large_os16")
    logits = system(expected["image"][None])["semantic_logits"][0, ::4, ::4]
    assert np.abs(logits - expected["semantic_logits"]).max() < 1e-3 * expected["semantic_logits"].std()


def arrays(*names: str, **shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Empty arrays with these names, and arrays of these shapes, whose names have `__` for a dot."""
    named = {name.replace("__", "."): np.zeros(shape, np.float32) for name, shape in shapes.items()}
    return dict.fromkeys(names, np.zeros(0, np.float32)) | named


@pytest.mark.parametrize(
    ("depth", "head", "source", "config", "overrides"),
    [
        (
            101,
            arrays("sem_seg_head.a", "proposal_generator.a", "roi_heads.a"),
            "detectron2_panoptic_fpn",
            ("panoptic_fpn/coco_detectron2", "coco"),
            [],
        ),
        (
            50,
            arrays("ins_embed_head.a", "sem_seg_head.head.depthwise.weight", sem_seg_head__predictor__weight=(133, 2)),
            "detectron2_panoptic_deeplab",
            ("panoptic_deeplab/coco_detectron2", "coco"),
            ["model.decoder.convolution=separable"],
        ),
        (
            101,
            arrays("ins_embed_head.a", sem_seg_head__predictor__weight=(19, 2)),
            "detectron2_panoptic_deeplab",
            ("panoptic_deeplab/cityscapes_detectron2", "cityscapes"),
            ["model.decoder.convolution=plain"],
        ),
        (
            50,
            arrays("ins_embed_head.a", sem_seg_head__predictor__weight=(20, 2)),
            "detectron2_panoptic_deeplab",
            (None, None),
            ["model.decoder.convolution=plain"],
        ),
        (
            101,
            arrays(
                "position_head.a",
                "kernel_head.a",
                feature_encoder__encode_head__encode_head_head_1__dcnv2__weight=(256, 2),
            ),
            "detectron2_panoptic_fcn",
            ("panoptic_fcn/coco_detectron2", "coco"),
            ["model.encoder.deformable=true", "model.encoder.channels=256"],
        ),
    ],
)
def test_what_the_names_show(
    depth: int,
    head: dict[str, np.ndarray],
    source: str,
    config: tuple[str | None, str | None],
    overrides: list[str],
) -> None:
    prefix = "backbone" if source == "detectron2_panoptic_deeplab" else "backbone.bottom_up"
    blocks = {50: 6, 101: 23}[depth]
    state = arrays(*(f"{prefix}.res4.{block}.conv1.weight" for block in range(blocks))) | head
    assert recognize(state, "file") == source
    assert MODEL_SOURCES[source].find_config(state) == config
    assert MODEL_SOURCES[source].find_overrides(state) == [f"model.backbone.name=resnet{depth}", *overrides]


def test_classes_that_no_config_has(tmp_path: Path, refuse: Refuse) -> None:
    np.savez(tmp_path / "file.npz", **arrays("ins_embed_head.a", sem_seg_head__predictor__weight=(20, 2)))
    assert refuse(tmp_path / "file.npz", "--output-dir", tmp_path / "new") == (
        f"'{tmp_path / 'file.npz'}' (Panoptic-DeepLab of Detectron2) has neither the number of classes "
        "of Cityscapes nor that of COCO; give its classes with --data-set FILE.json, and a config with --config."
    )


def test_settings_of_the_releases() -> None:
    coco = load_config("panoptic_deeplab/coco_detectron2").model.model_dump()
    # Every image is 640x640 with its padding, as the image pooling needs it.
    assert (coco["min_padded_size"], coco["aspp"]["pooling_window"]) == ((640, 640), (40, 40))
    assert coco["resize"] == {"shorter_side": None, "longer_side": 640}
    assert (coco["postprocess"]["nms_kernel"], coco["postprocess"]["stuff_area_limit"]) == (41, 4096)
    assert (coco["loss"]["sigma"], coco["loss"]["top_k_share"]) == (8, 1.0)
    cityscapes = load_config("panoptic_deeplab/cityscapes_detectron2").model.model_dump()
    assert (cityscapes["min_padded_size"], cityscapes["aspp"]["pooling_window"]) == ((1, 1), (32, 64))
    assert (cityscapes["postprocess"]["nms_kernel"], cityscapes["postprocess"]["stuff_area_limit"]) == (7, 2048)
    assert (cityscapes["loss"]["sigma"], cityscapes["loss"]["top_k_share"]) == (10, 0.2)
    for side, limit in ((400, 666), (512, 854), (600, 1000)):
        config = load_config(f"panoptic_fcn/coco_{side}_detectron2").model.model_dump()
        assert config["resize"] == {"shorter_side": side, "longer_side": {"max": limit}}
        assert config["postprocess"]["score_threshold"] == 0.05


# --- Wrong input. -----------------------------------------------------------------------------------------------------


def test_other_classes(fpn_file: Path, tmp_path: Path, refuse: Refuse) -> None:
    with np.load(fpn_file) as file:
        state = dict(file)
    state["sem_seg_head.predictor.weight"] = np.zeros((8, 128, 1, 1), np.float32)
    state["sem_seg_head.predictor.bias"] = np.zeros(8, np.float32)
    np.savez(tmp_path / "other.npz", **state)
    new = tmp_path / "new"
    message = refuse(tmp_path / "other.npz", "--output-dir", new)
    assert message.startswith(
        f"'{tmp_path / 'other.npz'}' has other classes than data set 'coco', which has 133: 2 of "
    )
    assert "give the classes of the file with --data-set FILE.json" in message
    patterns = ["sem_seg_head.predictor.*", "roi_heads.box_predictor.*", "roi_heads.mask_head.predictor.*"]
    assert message.endswith(f"with --keep-initial {' '.join(repr(pattern) for pattern in patterns)}.")
    assert not new.exists()
    import_file(tmp_path / "other.npz", "--output-dir", new, "--keep-initial", *patterns)
    source = json.loads((new / "source.json").read_text())
    assert sorted(source["kept_initial"])[-1] == "sem_seg_head.predictor.weight"
    # The weights and biases of four layers.
    assert (len(source["loaded"]), len(source["kept_initial"]), len(source["ignored"])) == (322, 8, 1)


def test_names_that_are_missing_or_unexpected(fpn_file: Path, tmp_path: Path, refuse: Refuse) -> None:
    with np.load(fpn_file) as file:
        state = dict(file)
    del state["backbone.fpn_lateral3.bias"]
    state["roi_heads.box_head.fc3.weight"] = np.zeros(3, np.float32)
    np.savez(tmp_path / "other.npz", **state)
    assert refuse(tmp_path / "other.npz", "--output-dir", tmp_path / "new") == (
        f"'{tmp_path / 'other.npz'}' does not fit config 'panoptic_fpn/coco_detectron2': 1 missing "
        "(backbone.fpn_lateral3.bias); 1 unexpected (roi_heads.box_head.fc3.weight); use the config that belongs to "
        "the file, or leave names out with --keep-initial PATTERN."
    )
    assert not (tmp_path / "new").exists()


def test_config_of_another_system(fpn_file: Path, tmp_path: Path, refuse: Refuse) -> None:
    message = refuse(fpn_file, "--config", "panoptic_fcn/coco_resnet50", "--output-dir", tmp_path / "new")
    assert message == (
        f"'{fpn_file}' is a Panoptic FPN of Detectron2, but config 'panoptic_fcn/coco_resnet50' is for panoptic_fcn; "
        "leave out --config, or give one for panoptic_fpn, such as --config panoptic_fpn/coco_detectron2."
    )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["a.weight", "b.weight"],
            r"' cannot be imported, because its names, such as a\.weight, b\.weight, are not those of ",
        ),
        (["c"], r"such as c, are not those of Panoptic FPN of Detectron2, .*--list` shows\.$"),
        ([], "holds no arrays"),
        (["backbone.stem.conv1.weight", "backbone.res2.0.conv1.weight"], "a backbone alone"),
        (["stem.conv1.weight", "res2.0.conv1.weight"], r"a backbone alone.*--set model\.backbone\.weights="),
        (["conv1.weight", "layer1.0.conv1.weight", "fc.bias"], "a backbone alone"),
    ],
)
def test_unknown_files(names: list[str], message: str, tmp_path: Path, refuse: Refuse) -> None:
    np.savez(tmp_path / "file.npz", **{name: np.zeros(1, np.float32) for name in names})
    assert re.search(message, refuse(tmp_path / "file.npz", "--output-dir", tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_config_of_another_system_whose_keys_the_file_would_change(tmp_path: Path, refuse: Refuse) -> None:
    # The file would set `model.decoder.convolution`, which Panoptic FPN does not have.
    state = arrays("ins_embed_head.a", sem_seg_head__predictor__weight=(19, 2))
    np.savez(tmp_path / "file.npz", **state)
    options = ("--config", "panoptic_fpn/coco_detectron2", "--output-dir", tmp_path / "new")
    assert "but config 'panoptic_fpn/coco_detectron2' is for panoptic_fpn" in refuse(tmp_path / "file.npz", *options)


def test_other_weights_for_the_backbone(fpn_file: Path, tmp_path: Path, refuse: Refuse) -> None:
    options = ("--output-dir", tmp_path / "new", "--set", "model.backbone.weights=other.npz")
    assert refuse(fpn_file, *options) == (
        f"'{fpn_file}' has weights for the backbone, so no others can be loaded; leave out `model.backbone.weights`, "
        "or set it to null."
    )
    assert not (tmp_path / "new").exists()


def test_depth_that_is_not_known(tmp_path: Path, refuse: Refuse) -> None:
    names = ["proposal_generator.a", "roi_heads.a", "sem_seg_head.a", "backbone.bottom_up.res4.0.conv1.weight"]
    np.savez(tmp_path / "file.npz", **{name: np.zeros(1, np.float32) for name in names})
    message = refuse(tmp_path / "file.npz", "--output-dir", tmp_path / "new")
    assert "has 1 blocks named 'backbone.bottom_up.res4.*', but ResNet-50 has 6 and ResNet-101 has 23; give" in message


def test_folders_that_are_not_written(fpn_file: Path, tmp_path: Path, refuse: Refuse) -> None:
    (tmp_path / "file").write_text("mine")
    assert refuse(fpn_file, "--output-dir", tmp_path).endswith(
        "exists and is not an empty folder, and nothing is replaced; give a new or empty folder."
    )
    assert refuse(fpn_file, "--output-dir", tmp_path / "file").startswith(f"'{tmp_path / 'file'}' exists")
    assert refuse(fpn_file, "--output-dir", tmp_path / "file" / "new").startswith("Cannot write")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_missing_options(fpn_file: Path, tmp_path: Path, refuse: Refuse) -> None:
    for arguments in ([], [fpn_file], ["--output-dir", tmp_path / "new"]):
        assert refuse(*arguments).startswith("Give a checkpoint and --output-dir MODEL_DIR, or --list")
    assert refuse(tmp_path, "--output-dir", tmp_path / "new").startswith(
        f"Folder '{tmp_path}' has no TensorFlow checkpoint"
    )


def test_classes_of_a_file(tmp_path: Path) -> None:
    scenes = find_data_set("cityscapes")
    assert scenes.num_classes == 19
    (tmp_path / "classes.json").write_text(json.dumps({"categories": scenes.to_coco_categories()}))
    assert find_data_set(str(tmp_path / "classes.json")) == scenes
    scenes.save(tmp_path)
    assert find_data_set(str(tmp_path / "dataset_info.json")) == scenes
    (tmp_path / "other.json").write_text("[]")
    for name, message in (("other.json", "has no list 'categories'"), ("none.json", "cannot be read")):
        with pytest.raises(UserError, match=message):
            find_data_set(str(tmp_path / name))
    with pytest.raises(UserError, match="Data set 'coko' is unknown; give cityscapes, coco, or a file"):
        find_data_set("coko")


def test_training_does_not_resume_imported_weights(fpn_model: Path) -> None:
    with pytest.raises(UserError, match=r"holds imported weights, .* another --model-dir with --init-from "):
        check_model_folder(fpn_model, load_config("panoptic_fpn/coco_detectron2"), COCO)


def test_list_of_released_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import-weights", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(RELEASED) + 1
    (fpn,) = (line for line in lines if "Panoptic FPN, ResNet-50, 3x" in line)
    assert re.split(r"\s{2,}", fpn)[2:6] == ["COCO", "41.5", "about 184 MB", "panoptic_fpn/coco_detectron2"]
    assert fpn.endswith("/panoptic_fpn_R_50_3x/139514569/model_final_c10459.pkl")
    assert {released.config for released in RELEASED} <= set(list_configs())


def test_size_of_released_weights() -> None:
    def megabytes(shapes: Iterable[Sequence[int]]) -> int:
        return round(sum(4 * math.prod(shape) for shape in shapes) / 1e6)

    def detectron2_shapes(folder: str) -> list[list[int]]:
        lines = (DATA / folder / "state_keys.tsv").read_text().splitlines()
        return [[int(size) for size in line.split("\t")[1].split(",") if size] for line in lines]

    sizes = {released.config: released.megabytes for released in RELEASED}
    for name, folder in (
        ("panoptic_deeplab/cityscapes_detectron2", "detectron2_panoptic_deeplab"),
        ("panoptic_fcn/coco_600_detectron2", "detectron2_panoptic_fcn"),
    ):
        assert sizes[name] == megabytes(detectron2_shapes(folder))
    for name, file in (
        ("cityscapes_deeplab2", "cityscapes_resnet50_os32"),
        ("cityscapes_resnet50_beta_deeplab2", "cityscapes_resnet50_beta_os32"),
        ("cityscapes_mobilenet_v3_large_deeplab2_os16", "cityscapes_mobilenet_v3_large_os16"),
        ("coco_deeplab2_os16", "coco_resnet50_os16"),
    ):
        assert sizes[f"panoptic_deeplab/{name}"] == megabytes(array.shape for array in deeplab2_shapes(file).values())
