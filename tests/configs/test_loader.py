"""Configs: inheritance, overrides, and what the messages say."""

import shlex
from pathlib import Path

import pytest

from deeplab2_like.configs import list_configs, load_config, save_config
from deeplab2_like.configs.loader import builtin_config_file
from deeplab2_like.configs.schema import SideLimit, was_saved_before
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


# A line of its own in the comments of a config: the config, and the keys that the line sets.
COMMENTED = [
    (name, line.partition("--set ")[2])
    for name in list_configs()
    for line in builtin_config_file(name).read_text().splitlines()
    if line.startswith("#   --set ")
]


@pytest.mark.parametrize(("name", "keys"), COMMENTED)
def test_the_keys_in_the_comments_of_a_config_can_be_set(name: str, keys: str) -> None:
    assert load_config(name, shlex.split(keys)) != load_config(name)


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


@pytest.mark.parametrize("shorter_side", ["800", "[800, 900]", "{choices: [900, 800]}"])
def test_the_limit_of_the_longer_side_may_equal_the_smallest_shorter_side(whole: Path, shorter_side: str) -> None:
    override = f"data.resize={{shorter_side: {shorter_side}, longer_side: {{max: 800}}}}"
    resize = load_config(whole, [override]).data.resize
    assert resize is not None
    assert resize.longer_side == SideLimit(max=800)


def test_only_sections_with_all_keys_of_an_earlier_version_were_saved_by_it(whole: Path) -> None:
    saved = {"low": 1, "high": 2}
    assert was_saved_before(saved, "new", saved_keys=("low", "high"))
    assert was_saved_before({**saved, "newer": 3}, "new", saved_keys=("low", "high"))
    assert not was_saved_before({"low": 1}, "new", saved_keys=("low", "high"))  # A user wrote it.
    assert not was_saved_before({**saved, "new": 3}, "new", saved_keys=("low", "high"))
    assert not was_saved_before(3, "new", saved_keys=())
    # A section that a user wrote, so it takes the defaults.
    model = load_config(whole, ["model.decoder.semantic_channels=64", "model.backbone.output_stride=8"]).model
    content = model.model_dump()
    assert content["decoder"]["instance_low_level_channels"] == {"res3": 32, "res2": 16}
    assert content["backbone"]["atrous_conversion"] == "exact"


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
    with pytest.raises(UserError, match=r"'trainer' .* is null, but must be a section of keys and values; its"):
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
            r"Config key 'trainer.steps' in --set 'trainer.steps=many' is 'many', but must be a whole number\.$",
        ),
        (
            "trainer.schedule.name=step",
            r"section 'trainer.schedule' in --set 'trainer.schedule.name=step' is invalid: `bou",
        ),
        ("trainer.steps=0", r"Config key 'trainer.steps' .* is 0, but must be at least 1\.$"),
        (
            "trainer.optimizer.name=adams",
            r"'trainer.optimizer.name' .* is 'adams', but must be one of 'adam', 'sgd'\.$",
        ),
        ("data.crop_size=[0, 4]", r"'data.crop_size' .* is \[0, 4\], but must be a height and a width of at least 1\."),
        (
            "data.scale_range=[2, 1]",
            r"'data.scale_range' .*, but must be two positive numbers, the smaller one first\.",
        ),
        (
            "data.resize={}",
            r"'data.resize' .* is invalid: it needs a size, `shorter_side` such as 800 or `lon",
        ),
        ("data.resize={longer_side: {max: 9}}", r"'data.resize' .* is invalid: it needs a size, `shorter_side`"),
        (
            "data.resize={shorter_side: 5, longer_side: 9}",
            r"'data.resize' .*: `longer_side: 9` sets the size alone; remove `shorter_side` or set a limit, "
            r"`longer_side: \{max: 9\}`\.$",
        ),
        (
            "data.resize={shorter_side: 800, longer_side: {max: 400}}",
            r"'data.resize' .*: `longer_side: \{max: 400\}` is below the shorter side of 800; set a limit of at least "
            r"800, or `longer_side: 400` without `shorter_side`\.$",
        ),
        (
            "model.resize={shorter_side: 800, longer_side: {max: 799}}",
            r"'model.resize' .*: `longer_side: \{max: 799\}` is below the shorter side of 800",
        ),
        ("data.resize={shorter_side: [640, 800], longer_side: {max: 639}}", "is below the shorter side of 640; set a"),
        (
            "data.resize={shorter_side: {choices: [800, 640]}, longer_side: {max: 639}}",
            "is below the shorter side of 640; set a limit of at least 640",
        ),
        (
            "data.resize.shorter_side=[9, 8]",
            r"data.resize.shorter_side' .* is \[9, 8\], but must be two sizes, the smaller one first\.$",
        ),
        (
            "data.resize.shorter_side=[7, 8, 9]",
            r"data.resize.shorter_side' .*, but must be a size such as 800, a range su",
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
            r"'model.resize' .*: `shorter_side` must be one size, as the network size is fixed; a range and choices",
        ),
        ("model.resize={shorter_side: {choices: [8, 9]}}", r"'model.resize' .* the network size is fixed; a range "),
        ("data.scale_step=0", r"'data.scale_step' .* is 0, but must be above 0, or null\.$"),
        (
            "data={crop_size: [8, 8], scale_range: [0.5, 1.5], scale_step: 0.3}",
            r"'data' .*: `scale_step` 0.3 does not lead from 0.5 to 1.5 in whole steps; change it or `scale_range`\.$",
        ),
        ("trainer.learning_rate=fast", r"is 'fast', but must be a number\.$"),
        ("data.flip=maybe", r"is 'maybe', but must be true or false\.$"),
        ("data.crop_size=5", r"'data.crop_size' .* is 5, but must be a list such as \[512, 1024\]\.$"),
        ("trainer.steps=null", r"'trainer.steps' .* is null, but must be a whole number\.$"),
        ("trainer=3", r"Config key 'trainer' .* is 3, but must be a section"),
        ("model=3", r"Config key 'model' .* is 3, but must be a section"),
        ("trainer.steps.more=3", r"Override 'trainer.steps.more=3' fails: 'trainer.steps' is a value, not a section\."),
        ("trainer.steps", r"Override 'trainer.steps' must have the form key.path=value, such as trainer.steps=1000\."),
        ("=3", r"Override '=3' must have the form"),
        ("trainer..steps=3", r"Override 'trainer..steps=3' must have the form"),
        (
            "data.path={a",
            r"The value of override 'data.path=\{a' is not valid YAML \(did not .* in line 2\); quote it\.$",
        ),
    ],
)
def test_wrong_overrides(whole: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(whole, [override])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        # Numbers out of range.
        ("trainer.steps=-1", "Config key 'trainer.steps' in SOURCE is -1, but must be at least 1."),
        (
            "trainer.seed=4294967296",
            "Config key 'trainer.seed' in SOURCE is 4294967296, but must be at most 4294967295.",
        ),
        ("data.color_jitter.hue=0.7", "Config key 'data.color_jitter.hue' in SOURCE is 0.7, but must be at most 0.5."),
        ("data.color_jitter.hue=-0.5", "Config key 'data.color_jitter.hue' in SOURCE is -0.5, but must be at least 0."),
        ("trainer.learning_rate=0", "Config key 'trainer.learning_rate' in SOURCE is 0, but must be above 0."),
        ("model.norm.momentum=1.5", "Config key 'model.norm.momentum' in SOURCE is 1.5, but must be below 1."),
        (
            "trainer.evaluate_every=0",
            "Config key 'trainer.evaluate_every' in SOURCE is 0, but must be at least 1, or null.",
        ),
        (
            "trainer.optimizer.multipliers={head: -1}",
            "Config key 'trainer.optimizer.multipliers.head' in SOURCE is -1, but must be at least 0.",
        ),
        # Wrong types.
        ("trainer.steps=1.5", "Config key 'trainer.steps' in SOURCE is 1.5, but must be a whole number."),
        ("trainer.steps=.inf", "Config key 'trainer.steps' in SOURCE is inf, but must be a finite number."),
        (
            "trainer.steps=2020-01-01",
            "Config key 'trainer.steps' in SOURCE is '2020-01-01', but must be a whole number.",
        ),
        ("trainer.steps={a: 1}", "Config key 'trainer.steps' in SOURCE must be a whole number."),
        (
            "trainer.steps=[true, null, x]",
            "Config key 'trainer.steps' in SOURCE is [true, null, 'x'], but must be a whole number.",
        ),
        (
            "trainer.optimizer.clip_norm=much",
            "Config key 'trainer.optimizer.clip_norm' in SOURCE is 'much', but must be a number, or null.",
        ),
        ("data.flip=2", "Config key 'data.flip' in SOURCE is 2, but must be true or false."),
        ("data.path=true", "Config key 'data.path' in SOURCE is true, but must be a string, or null."),
        # Null where it is not allowed.
        ("data.flip=null", "Config key 'data.flip' in SOURCE is null, but must be true or false."),
        (
            "trainer.optimizer.name=null",
            "Config key 'trainer.optimizer.name' in SOURCE is null, but must be one of 'adam', 'sgd'.",
        ),
        (
            "data.crop_size=null",
            "Config key 'data.crop_size' in SOURCE is null, but must be a list such as [512, 1024].",
        ),
        # Choices.
        (
            "model.backbone.output_stride=4",
            "Config key 'model.backbone.output_stride' in SOURCE is 4, but must be one of 8, 16, 32.",
        ),
        (
            "model.backbone.deformable_stages=[res5, res6]",
            "Config key 'model.backbone.deformable_stages[1]' in SOURCE is 'res6', but must be one of 'res3', 'res4', "
            "'res5'.",
        ),
        # Lists.
        ("data.crop_size=[5]", "Config key 'data.crop_size' in SOURCE is [5], but must be a list of length 2."),
        ("data.crop_size=[]", "Config key 'data.crop_size' in SOURCE is [], but must be a list of length 2."),
        (
            "data.crop_size=[1, 2, 3]",
            "Config key 'data.crop_size' in SOURCE is [1, 2, 3], but must be a list of length 2.",
        ),
        ("data.crop_size=[8, a]", "Config key 'data.crop_size[1]' in SOURCE is 'a', but must be a whole number."),
        (
            "model.aspp.pooling_window=[1]",
            "Config key 'model.aspp.pooling_window' in SOURCE is [1], but must be a list of length 2, or null.",
        ),
        # Values in place of sections.
        (
            "data.resize=800",
            "Config key 'data.resize' in SOURCE is 800, but must be a section of keys and values, or null; its keys "
            "are longer_side, shorter_side.",
        ),
        (
            "model.norm=[group]",
            "Config key 'model.norm' in SOURCE is ['group'], but must be a section of keys and values; its keys are "
            "epsilon, kind, momentum.",
        ),
        (
            "model=false",
            "Config key 'model' in SOURCE is false, but must be a section of keys and values; its keys are aspp, "
            "backbone, decoder, dual_aspp, dual_decoder, image_mean, image_std, instance_aspp, loss, "
            "min_padded_size, norm, postprocess, resize, resizing, semantic_only, void_class.",
        ),
        (
            "trainer.optimizer.multipliers=3",
            "Config key 'trainer.optimizer.multipliers' in SOURCE is 3, but must be a section of keys and values.",
        ),
        (
            "trainer.optimizer.multipliers={3: 4}",
            "Config key 'trainer.optimizer.multipliers' in SOURCE has the key 3, but its keys must be strings.",
        ),
        # Unknown keys.
        (
            "data.color_jitter={hew: 1}",
            "Unknown config key 'data.color_jitter.hew'. Did you mean 'data.color_jitter.hue'? Known in "
            "'data.color_jitter': brightness, contrast, hue, saturation.",
        ),
        (
            "data.color_jitter={3: 4}",
            "Unknown config key 'data.color_jitter.3'. Known in 'data.color_jitter': brightness, contrast, hue, "
            "saturation.",
        ),
        # Validators of the library.
        (
            "model.postprocess.nms_kernel=6",
            "Config key 'model.postprocess.nms_kernel' in SOURCE is 6, but must be odd.",
        ),
        (
            "data.resize.shorter_side={choice: [3]}",
            "Config key 'data.resize.shorter_side' in SOURCE must be a size such as 800, a range such as [640, 800] or "
            "choices such as {choices: [640, 672, 704]}.",
        ),
        (
            "data.resize={}",
            "Config section 'data.resize' in SOURCE is invalid: it needs a size, `shorter_side` such as 800 or "
            "`longer_side` such as 1025.",
        ),
        (
            "model.dual_decoder=false",
            "Config section 'model' in SOURCE is invalid: dual_aspp needs dual_decoder, as one decoder has one input; "
            "set both to the same value.",
        ),
        (
            "data.path=gs://b/c",
            "Config key 'data.path' in SOURCE is invalid: 'gs://b/c' is not a local path, and only local paths work; "
            "copy the data to a local folder, or mount the bucket and give the folder it is mounted on.",
        ),
    ],
)
def test_each_fault_is_one_plain_sentence(override: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        load_config("panoptic_deeplab/scenes_tiny", [override])
    assert str(error.value) == sentence.replace("SOURCE", f"--set '{override}'")


def test_every_fault_is_named_with_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(WHOLE.replace("batch_size: 2", "batch_size: 0").replace("resnet_tiny", "[1]"))
    with pytest.raises(UserError) as error:
        load_config(path, ["trainer.steps=-1", "trainer.steps=0", "data.flop=true"])
    assert str(error.value) == (
        f"Config key 'model.backbone.name' in config '{path}' is [1], but must be a string. "
        "Unknown config key 'data.flop'. Did you mean 'data.flip'? Known in 'data': color_jitter, crop_size, dihedral, "
        "flip, path, resize, scale_range, scale_step, train_split, val_split. "
        "Config key 'trainer.steps' in --set 'trainer.steps=0' is 0, but must be at least 1. "
        f"Config key 'trainer.batch_size' in config '{path}' is 0, but must be at least 1."
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
        (WHOLE.replace("panoptic_deeplab", "null"), r"^Config '.*bad.yaml' has no key 'system'; add the name of the"),
        ("system: panoptic_deeplab", r"Config key 'data' is missing"),
        (f"{WHOLE}\n3: 4", r"^Unknown config key '3'\. Known: data, model, system, trainer\.$"),
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
