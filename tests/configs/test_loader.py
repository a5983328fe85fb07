"""Configs: inheritance, overrides, and what the messages say."""

from pathlib import Path

import pytest

from deeplab2_like.configs import list_configs, load_config, save_config
from deeplab2_like.data.scenes import scenes_info
from deeplab2_like.errors import UserError
from deeplab2_like.model import build_system

WHOLE = """
system: panoptic_deeplab
data: {crop_size: [32, 64], flip: false}
model: {backbone: {name: resnet_tiny}}
trainer: {steps: 10, batch_size: 2, learning_rate: 0.1, optimizer: {name: sgd, momentum: 0.8}}
"""


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    path = tmp_path / "whole.yaml"
    path.write_text(WHOLE)
    return path


@pytest.mark.parametrize("name", list_configs())
def test_built_in_configs_load_and_come_back_equal(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    assert config.system == name.partition("/")[0]
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("name", ["panoptic_deeplab/scenes_tiny"])
def test_small_configs_build(name: str) -> None:
    assert name in list_configs()
    config = load_config(name)
    system = build_system(config, scenes_info())
    assert system.trainable_variables
    assert all(side % 8 == 0 for side in config.data.crop_size)


def test_overrides(whole: Path) -> None:
    overrides = [
        "trainer.steps=20",
        "trainer.learning_rate=1e-3",  # Which YAML 1.1 takes for a word.
        "data.crop_size=[48, 96]",
        "data.path=/records/with=sign",
        "data.color_jitter={hue: 0.1}",
        "trainer.optimizer.clip_norm=null",
        "model.backbone.name=resnet50",
        "model.loss.sigma=4",
    ]
    config = load_config(whole, overrides)
    assert config.trainer.steps == 20
    assert config.trainer.learning_rate == 0.001
    assert config.data.crop_size == (48, 96)
    assert config.data.path == "/records/with=sign"
    assert config.data.color_jitter.hue == 0.1
    assert config.trainer.optimizer.clip_norm is None
    model = config.model.model_dump()
    assert (model["backbone"]["name"], model["loss"]["sigma"]) == ("resnet50", 4)
    # What no override names is as in the file.
    assert (config.trainer.batch_size, config.trainer.optimizer.momentum) == (2, 0.8)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("{short_side: 600, long_side: 1000}", "{shorter_side: 600, longer_side: {max: 1000}}"),
        # The defaults of earlier versions.
        ("{short_side: 600}", "{shorter_side: 600, longer_side: {max: 1333}}"),
        ("{long_side: 1000}", "{shorter_side: 800, longer_side: {max: 1000}}"),
        ("null", "null"),
    ],
)
def test_sizes_of_earlier_versions_are_read(whole: Path, tmp_path: Path, old: str, new: str) -> None:
    earlier = tmp_path / "earlier.yaml"
    earlier.write_text(WHOLE.replace("model: {", f"model: {{resize: {old}, "))
    assert load_config(earlier) == load_config(whole, [f"model.resize={new}"])


def test_an_override_changes_a_size_of_an_earlier_version(tmp_path: Path) -> None:
    earlier = tmp_path / "earlier.yaml"
    earlier.write_text(WHOLE.replace("model: {", "model: {resize: {short_side: 600, long_side: 1000}, "))
    model = load_config(earlier, ["model.resize.shorter_side=700"]).model.model_dump()
    assert model["resize"] == {"shorter_side": 700, "longer_side": {"max": 1000}}


COCO = [name for name in list_configs() if "/coco_" in name and not name.startswith("panoptic_deeplab/")]


@pytest.mark.parametrize("name", COCO)
def test_crops_of_coco_hold_landscape_and_portrait_images(name: str) -> None:
    data = load_config(name).data
    assert data.resize is not None
    side = data.resize.shorter_side
    largest = side[1] if isinstance(side, tuple) else side
    # 480x640 pixels, the most frequent size of COCO.
    assert min(data.crop_size) >= round(largest * 640 / 480)
    assert data.scale_range == (1.0, 1.0)


@pytest.mark.parametrize(
    ("name", "sides"),
    [
        # Longer sides by section 4 and Table 9 of Panoptic-DeepLab; its 641 is a multiple of the stride plus one.
        ("panoptic_deeplab/mapillary_resnet50", {"longer_side": 2177, "shorter_side": None}),
        ("panoptic_deeplab/coco_resnet50_1025", {"longer_side": 1025, "shorter_side": None}),
        ("panoptic_deeplab/coco_resnet50", {"longer_side": 640, "shorter_side": None}),
        ("lpsnet/coco_resnet101_736", {"shorter_side": 736, "longer_side": {"max": 1226}}),
        ("lpsnet/cityscapes_resnet50_1200", {"shorter_side": 1200, "longer_side": None}),
    ],
)
def test_training_and_inference_have_the_size_of_the_paper(name: str, sides: dict[str, object]) -> None:
    config = load_config(name).model_dump()
    assert config["data"]["resize"] == config["model"]["resize"] == sides


def test_panoptic_deeplab_trains_on_mapillary_as_in_the_paper() -> None:
    config = load_config("panoptic_deeplab/mapillary_resnet50")
    trainer, postprocess = config.trainer, config.model.model_dump()["postprocess"]
    assert (trainer.steps, trainer.batch_size, trainer.learning_rate) == (150_000, 64, 0.001)
    assert postprocess["stuff_area_limit"] == 4096
    # One less than in the paper, where 1025 is a multiple of the stride plus one.
    assert config.data.crop_size == (1024, 1024)


def test_the_last_override_counts(whole: Path) -> None:
    assert load_config(whole, ["trainer.steps=20", "trainer.steps=30"]).trainer.steps == 30


def test_base_is_replaced_key_by_key(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    middle = tmp_path / "folder" / "middle.yaml"
    # As seen from the file, not from where the program runs.
    middle.write_text("base: ../whole.yaml\ntrainer: {steps: 20, optimizer: {momentum: 0.7}}\n")
    top = tmp_path / "folder" / "top.yml"
    top.write_text("base: middle.yaml\ndata: {crop_size: [8, 8]}\n")
    monkeypatch.chdir("/")
    config = load_config(top)
    assert config.data.crop_size == (8, 8)  # A list is one value.
    assert config.data.flip is False
    assert (config.trainer.steps, config.trainer.batch_size) == (20, 2)
    assert (config.trainer.optimizer.name, config.trainer.optimizer.momentum) == ("sgd", 0.7)


def test_base_may_be_built_in(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: panoptic_deeplab/scenes_tiny\ntrainer: {steps: 7}\n")
    config, base = load_config(path), load_config("panoptic_deeplab/scenes_tiny")
    assert config.trainer.steps == 7
    assert config.model == base.model


def test_circle(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("base: second.yaml")
    second.write_text("base: first.yaml")
    with pytest.raises(UserError, match=r"first.yaml' is based on itself through .*first.yaml -> .*second.yaml;"):
        load_config(first)


def test_circle_through_the_parent_folder(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "own.yaml"
    path.parent.mkdir()
    path.write_text("base: ../folder/own.yaml")
    with pytest.raises(UserError, match=r"own.yaml' is based on itself through .*own.yaml; remove"):
        load_config(path)


def test_a_section_must_have_keys(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("base: panoptic_deeplab/scenes_tiny\ntrainer: null\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"'trainer' .* has the value None: must be a section of keys and values\.$"):
        load_config(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "trainer.stepz=3",
            r"Unknown config key 'trainer.stepz'\. Did you mean 'trainer.steps'\? Known in 'trainer': acc[a-z_, ]*\.$",
        ),
        ("trainer.optimizer.momentun=0", r"Unknown config key 'trainer.optimizer.momentun'\. Did you mean 'trainer.op"),
        ("model.backbon.name=x", r"Unknown config key 'model.backbon'\. Did you mean 'model.backbone'\?"),
        ("model.postproces.x=3", r"Unknown config key 'model.postproces'\. Did you mean 'model.postprocess'\?"),
        # Nothing in the section is close: a whole path would find something by its section alone.
        ("trainer.lr=3", r"Unknown config key 'trainer.lr'\. Known in 'trainer': accumulate_steps, .*, tpu\.$"),
        (
            "trainr.steps=3",
            r"Unknown config key 'trainr'\. Did you mean 'trainer'\? Known: data, model, system, trainer",
        ),
        ("system=panoptic_deeplap", r"Unknown system 'panoptic_deeplap'\. Did you mean 'panoptic_deeplab'\?"),
        ("system=[a]", r"Unknown system '\['a'\]'"),
        (
            "trainer.steps=many",
            r"Config key 'trainer.steps' in --set 'trainer.steps=many' has the value 'many': must be a whole number\.$",
        ),
        (
            "trainer.schedule.name=step",
            r"'trainer.schedule' in --set 'trainer.schedule.name=step' is not allowed: `bou",
        ),
        ("trainer.steps=0", r"Config key 'trainer.steps' .* has the value 0: .* greater than or equal to 1"),
        (
            "trainer.optimizer.name=adams",
            r"'trainer.optimizer.name' .* the value 'adams': must be one of 'adam', 'sgd'\.$",
        ),
        ("data.crop_size=[0, 4]", r"'data.crop_size' .* has the value \[0, 4\]: height and width must be at least 1\."),
        ("data.scale_range=[2, 1]", r"'data.scale_range' .*: must be two positive numbers, the smaller one first\."),
        (
            "data.resize={}",
            r"'data.resize' .* is not allowed: needs a size: `shorter_side`, such as 800, or `lon",
        ),
        ("data.resize={longer_side: {max: 9}}", r"'data.resize' .* is not allowed: needs a size: `shorter_side`"),
        (
            "data.resize={shorter_side: 5, longer_side: 9}",
            r"'data.resize' .*: `longer_side: 9` sets the size alone; remove `shorter_side` or set a limit, "
            r"`longer_side: \{max: 9\}`\.$",
        ),
        (
            "data.resize.shorter_side=[9, 8]",
            r"data.resize.shorter_side' .*: must be two sizes, the smaller one first\.$",
        ),
        (
            "data.resize.shorter_side=[7, 8, 9]",
            r"data.resize.shorter_side' .*: must be a size such as 800, a range su",
        ),
        ("data.resize.shorter_side={choices: []}", r"'data.resize.shorter_side' .* choices such as \{choices: \[640, "),
        (
            "data.resize={shorter_side: 8, longer_side: {min: 9}}",
            r"'data.resize.longer_side' .* must be a size such as",
        ),
        ("data.train_split=train+train", r"must be one split or several different ones joined by '\+', such as train"),
        ("data.train_split=train+", r"must be one split or several different ones joined by '\+', such as train"),
        ("data.val_split=train+val", "must be one split; several joined by '\\+' are for `train_split` only"),
        ("data.resize.short_side=8", r"'data.resize.short_side'\. Did you mean 'data.resize.shorter_side'\? Known in"),
        (
            "model.resize.shorter_side=[8, 9]",
            r"'model.resize' .*: the network size must be fixed: `shorter_side` can be a range or choices only in `d",
        ),
        ("model.resize={shorter_side: {choices: [8, 9]}}", r"'model.resize' .*: the network size must be fixed: "),
        ("data.scale_step=0", r"'data.scale_step' .* has the value 0: Input should be greater than 0"),
        (
            "data={crop_size: [8, 8], scale_range: [0.5, 1.5], scale_step: 0.3}",
            r"'data' .*: `scale_step` 0.3 does not lead from 0.5 to 1.5 in whole steps; change it or `scale_range`\.$",
        ),
        ("trainer.learning_rate=fast", r"has the value 'fast': must be a number\.$"),
        ("data.flip=maybe", r"has the value 'maybe': must be true or false\.$"),
        ("data.crop_size=5", r"'data.crop_size' .* has the value 5: must be a list such as \[512, 1024\]\.$"),
        ("trainer.steps=null", r"'trainer.steps' .* has the value None"),
        ("trainer=3", r"Config key 'trainer' .* has the value 3"),
        ("model=3", r"Config key 'model' .* has the value 3"),
        ("trainer.steps.more=3", r"Override 'trainer.steps.more=3' fails: 'trainer.steps' is a value, not a section\."),
        ("trainer.steps", r"Override 'trainer.steps' must have the form key.path=value, such as trainer.steps=1000\."),
        ("=3", r"Override '=3' must have the form"),
        ("trainer..steps=3", r"Override 'trainer..steps=3' must have the form"),
        ("data.path={a", r"The value of override 'data.path=\{a' is not valid YAML; quote it\."),
    ],
)
def test_wrong_overrides(whole: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(whole, [override])


def test_every_fault_is_named_with_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(WHOLE.replace("batch_size: 2", "batch_size: 0").replace("resnet_tiny", "[1]"))
    with pytest.raises(UserError) as error:
        load_config(path, ["trainer.steps=-1", "trainer.steps=0", "data.flop=true"])
    assert str(error.value) == (
        f"Config key 'model.backbone.name' in config '{path}' has the value [1]: must be a text. "
        "Unknown config key 'data.flop'. Did you mean 'data.flip'? Known in 'data': color_jitter, crop_size, dihedral, "
        "flip, path, resize, scale_range, scale_step, train_split, val_split. "
        "Config key 'trainer.steps' in --set 'trainer.steps=0' has the value 0: Input should be greater than or equal "
        f"to 1. Config key 'trainer.batch_size' in config '{path}' has the value 0: Input should be greater than or "
        "equal to 1."
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "data: {crop_size: [8, 8]}",
            r"^Config '.*bad.yaml' has no key 'system'; add the name of the system to train\.$",
        ),
        (
            WHOLE.replace("steps: 10,", ""),
            r"Config key 'trainer.steps' is missing in config '.*bad.yaml'; set it there",
        ),
        ("system: panoptic_deeplab", r"Config key 'data' is missing"),
        ("- a\n- b", r"Config file '.*bad.yaml' must hold keys and values"),
        ("", r"Config file '.*bad.yaml' must hold keys and values"),
        ("a: [1", r"Config file '.*bad.yaml' is not valid YAML"),
        ("base: 3", r"Key 'base' in '.*bad.yaml' must be the name of a config or a YAML file, but is 3\."),
        ("base: missing.yaml", r"Config file '.*missing.yaml' does not exist"),
        ("base: panoptic_deeplab/scenes_tine", r"Unknown config .* Did you mean 'panoptic_deeplab/scenes_tiny' or '"),
    ],
)
def test_wrong_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_config(path)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Config file '.*none.yaml' does not exist; `deeplab2-like configs` lists the"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"Unknown config 'panoptic_deeplab'\..* `deeplab2-like configs` lists them\.$"):
        load_config("panoptic_deeplab")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary.yaml' is not valid YAML"):
        load_config(tmp_path / "binary.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(UserError, match=r"folder.yaml' does not exist"):
        load_config(tmp_path / "folder.yaml")


def test_a_config_cannot_be_changed_by_accident(whole: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(whole).trainer.steps = 3


def test_saving_where_it_is_impossible(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Cannot write '.*whole.yaml/config.yaml'"):
        save_config(load_config(whole), whole / "config.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["whole.yaml"]
