"""Import of DeepLab2's TensorFlow checkpoints of Panoptic-DeepLab.

DeepLab2 names a variable by the attributes that lead to it, such as
`encoder/_stage2/_block1/_conv1_bn_act/_conv/kernel`. Its arrays have Keras' layouts. Two orders differ: its decoders
put the upsampled features before the low-level ones, and where void is a class, it is the first one.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deeplab2_like.errors import UserError, unknown_name
from deeplab2_like.files import literal_folder, require_local
from deeplab2_like.model.backbone.mobilenet_v3 import LARGE, SMALL, FinalConvolution, Stages, list_blocks
from deeplab2_like.model.config import BackboneConfig
from deeplab2_like.model.panoptic_deeplab import PanopticDeepLab, PanopticDeepLabConfig
from deeplab2_like.weights.assign import Assignment, assign_by_name, has_prefixes, match_layer_name
from deeplab2_like.weights.backbone_names import BackboneSource

_SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"
# Entries of a checkpoint that are not weights: the state of the optimizer, moving averages of the weights and counters.
_STATE = re.compile(
    r"(optimizer|step|global_step|save_counter|_CHECKPOINTABLE_OBJECT_GRAPH)(/.*)?|.*/\.OPTIMIZER_SLOT/.*"
)


def read_deeplab2_checkpoint(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a TensorFlow checkpoint of DeepLab2.

    Args:
        path: The common part of the names of its files, such as `ckpt-60000` for `ckpt-60000.index` and
            `ckpt-60000.data-00000-of-00001`, or a folder with one checkpoint.

    Returns:
        The weights by their names, without the ending that all names have. The state of the optimizer, moving averages
        of the weights and counters are left out.

    Raises:
        UserError: If there is no checkpoint, or it is damaged or incomplete.
    """
    import tensorflow as tf

    require_local(path)
    prefix = find_checkpoint_prefix(Path(path))
    state = {}
    with literal_folder(prefix.parent) as folder:
        try:
            reader = tf.train.load_checkpoint(str(folder / prefix.name))
            for name in reader.get_variable_to_shape_map():
                if name.endswith(_SUFFIX) and not _STATE.fullmatch(name):
                    state[name.removesuffix(_SUFFIX)] = np.asarray(reader.get_tensor(name))
        except (tf.errors.OpError, LookupError, RuntimeError, ValueError) as error:
            raise UserError(
                f"Checkpoint '{prefix}' is damaged or incomplete; download its files '{prefix.name}.index' and "
                f"'{prefix.name}.data-...' again."
            ) from error
    if not state:
        raise UserError(f"Checkpoint '{prefix}' has no weights of Keras layers; give a checkpoint of DeepLab2.")
    return state


def is_tensorflow_checkpoint(path: Path) -> bool:
    """Returns whether a path may be one of `read_deeplab2_checkpoint`: a folder, or the name of a checkpoint."""
    return path.is_dir() or path.suffix == ".index" or path.with_name(f"{path.name}.index").is_file()


def find_checkpoint_prefix(path: Path) -> Path:
    """Returns the common part of the names of a checkpoint's files, see `read_deeplab2_checkpoint`."""
    if path.is_dir():
        found = sorted(path.glob("*.index"))
        if len(found) > 1:
            raise UserError(
                f"Folder '{path}' has {len(found)} checkpoints, such as '{found[0].stem}'; give one of them: "
                f"'{found[0].with_suffix('')}'."
            )
        if not found:
            raise UserError(
                f"Folder '{path}' has no TensorFlow checkpoint, a file that ends in .index; give the folder of one, or "
                "the file of the weights itself."
            )
        return found[0].with_suffix("")
    prefix = path.with_suffix("") if path.suffix == ".index" else path
    if not prefix.with_name(f"{prefix.name}.index").is_file():
        raise UserError(
            f"Checkpoint '{path}' does not exist; give the common part of the names of its files, such as "
            "'ckpt-60000' for 'ckpt-60000.index', or their folder."
        )
    return prefix


@dataclasses.dataclass(frozen=True)
class _DataSet:
    """The settings of DeepLab2's released models of a data set.

    Attributes:
        training_crop: Height and width of training crops, and of the padded images in evaluation.
        postprocess: Keys of the section `postprocess`.
        resize: The section `resize`.
        void_class: Whether void is a class.
    """

    training_crop: tuple[int, int]
    postprocess: Mapping[str, Any]
    resize: Mapping[str, Any] | None = None
    void_class: bool = False


DATA_SETS: dict[str, _DataSet] = {
    "cityscapes": _DataSet((1025, 2049), {"nms_kernel": 13, "stuff_area_limit": 2048}),
    "coco": _DataSet(
        (641, 641), {"nms_kernel": 41, "stuff_area_limit": 4096}, resize={"longer_side": 641}, void_class=True
    ),
}


def deeplab2_config(
    state: Mapping[str, np.ndarray],
    *,
    data_set: str,
    output_stride: int = 32,
    training_crop: tuple[int, int] | None = None,
) -> PanopticDeepLabConfig:
    """Returns the `model` section with which weights of DeepLab2 give the same results as in DeepLab2.

    Args:
        state: The weights, see `read_deeplab2_checkpoint`; their names and shapes tell the backbone.
        data_set: One of `DATA_SETS`. It decides the post-processing and the size of the images.
        output_stride: 16 or 32, which the weights do not tell.
        training_crop: Height and width that the model was trained with, in pixels, if they are not those of the
            released models. The image pooling and the padding depend on it.

    Raises:
        UserError: If the data set is unknown, or the weights have no backbone that this library has.
    """
    if data_set not in DATA_SETS:
        raise unknown_name("data set of DeepLab2", data_set, DATA_SETS)
    settings = DATA_SETS[data_set]
    crop = training_crop or settings.training_crop
    backbone = deeplab2_backbone(state)
    # DeepLab2's MobileNetV3 has other settings at output stride 16 than at 32.
    fine_mobilenet = output_stride == 16 and backbone["name"].startswith("mobilenet")
    return PanopticDeepLabConfig.model_validate(
        {
            "backbone": {**backbone, "output_stride": output_stride},
            "norm": {"epsilon": 1e-5 if fine_mobilenet else 1e-3},
            "image_mean": (127.5, 127.5, 127.5),
            "image_std": (127.5, 127.5, 127.5),
            "resize": settings.resize,
            "resizing": "aligned_corners",
            "min_padded_size": crop,
            "void_class": settings.void_class,
            "aspp": {
                "rates": tuple(rate * 32 // output_stride for rate in (3, 6, 9)),
                "convolution": "plain",
                "pooling_window": tuple((side - 1) // output_stride + 1 for side in crop),
                "pooling_norm": True,
            },
            # DeepLab2 averages the errors in y and x.
            "loss": {"offset_weight": 0.005, "small_instance_weight": 1.0 if fine_mobilenet else 3.0},
            "postprocess": {"top_k": 400, **settings.postprocess, **({"nms_kernel": 7} if fine_mobilenet else {})},
        }
    )


def deeplab2_backbone(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the keys of the `backbone` section that weights of DeepLab2 need.

    Args:
        state: The weights, see `read_deeplab2_checkpoint`; those of the backbone are enough, so checkpoints of ImageNet
            are recognized, too.

    Raises:
        UserError: If they have no backbone that this library has.
    """
    title = _find_backbone(state)
    if title is not None:
        return dict(_BACKBONES[title].keys)
    raise UserError(
        f"The weights, with names such as {', '.join(list(state)[:2])}, have no backbone of DeepLab2 that this library "
        f"has; choose weights of {', '.join(_BACKBONES)}."
    )


def _find_backbone(state: Mapping[str, np.ndarray]) -> str | None:
    """Returns the key in `_BACKBONES` of the backbone of these weights; None if they have no such backbone."""
    for title, backbone in _BACKBONES.items():
        blocks = {match[0] for match in map(re.compile(backbone.block_pattern).match, state) if match}
        kernel = state.get(backbone.kernel)
        if kernel is not None and kernel.shape == backbone.shape and len(blocks) == backbone.num_blocks:
            return title
    return None


# The data sets by the number of classes of the semantic head, and the config of ResNet-50 at output stride 32.
CONFIGS = {
    19: ("panoptic_deeplab/cityscapes_deeplab2", "cityscapes"),
    134: ("panoptic_deeplab/coco_deeplab2", "coco"),
}
# The configs of other backbones, at the output stride of the released checkpoints, or at 32 if both are released.
_BACKBONE_CONFIGS = {
    ("cityscapes", "ResNet-50-Beta"): "panoptic_deeplab/cityscapes_resnet50_beta_deeplab2",
    ("cityscapes", "MobileNetV3-Large"): "panoptic_deeplab/cityscapes_mobilenet_v3_large_deeplab2_os16",
    ("cityscapes", "MobileNetV3-Small"): "panoptic_deeplab/cityscapes_mobilenet_v3_small_deeplab2_os16",
    ("coco", "ResNet-50-Beta"): "panoptic_deeplab/coco_resnet50_beta_deeplab2",
}
# Layers whose shape depends on the number of classes.
CLASS_LAYERS = ("semantic_last_layer/*",)


def is_deeplab2(names: Collection[str]) -> bool:
    """Returns whether names are those of DeepLab2's Panoptic-DeepLab."""
    return has_prefixes(names, "encoder/", "semantic_decoder/", "instance_decoder/")


def find_deeplab2_config(state: Mapping[str, np.ndarray]) -> tuple[str | None, str | None]:
    """Returns the names of the config and the data set of a checkpoint; None if its number of classes is unknown."""
    bias = state.get("semantic_last_layer/bias")
    config, data_set = CONFIGS.get(0 if bias is None else len(bias), (None, None))
    return _BACKBONE_CONFIGS.get((data_set or "", _find_backbone(state) or ""), config), data_set


def deeplab2_overrides(state: Mapping[str, np.ndarray]) -> list[str]:
    """Returns the config overrides for what a checkpoint shows: the backbone."""
    return [f"model.backbone.{key}={str(value).lower()}" for key, value in deeplab2_backbone(state).items()]


_RESNET_BLOCKS = r"encoder/_stage[2-5]/_block\d+/_conv2_bn_act/_conv/kernel$"
_MOBILENET_BLOCKS = r"encoder/_blocks/\d+/"
_RESNET = {"name": "resnet50", "max_pool": False}
_MOBILENET = {
    # The defaults, as MobileNetV3 has no such choices, but the config may be one of ResNet.
    "stem": "three_convolutions",
    "max_pool": True,
    "halve_last_stage": False,
    "squeeze_gate": "sigmoid",
    "depthwise_features": True,
}


class _Backbone(NamedTuple):
    """A backbone of DeepLab2, and how to recognize its weights.

    Attributes:
        kernel: Name of a kernel that only this backbone has with this shape.
        shape: Its shape.
        block_pattern: Pattern of the names of its blocks.
        num_blocks: Number of its blocks.
        keys: The keys of the `backbone` section.
    """

    kernel: str
    shape: tuple[int, ...]
    block_pattern: str
    num_blocks: int
    keys: Mapping[str, Any]


# By the title for messages.
_BACKBONES: dict[str, _Backbone] = {
    "ResNet-50": _Backbone(
        kernel="encoder/_stem/_conv/kernel",
        shape=(7, 7, 3, 64),
        block_pattern=_RESNET_BLOCKS,
        num_blocks=16,
        keys={**_RESNET, "stem": "seven_by_seven"},
    ),
    "ResNet-50-Beta": _Backbone(
        kernel="encoder/_stem/_conv3_bn/_conv/kernel",
        shape=(3, 3, 64, 128),
        block_pattern=_RESNET_BLOCKS,
        num_blocks=16,
        keys={**_RESNET, "stem": "three_convolutions"},
    ),
    "MobileNetV3-Large": _Backbone(
        kernel="encoder/_blocks/16/_conv/kernel",
        shape=(1, 1, 160, 960),
        block_pattern=_MOBILENET_BLOCKS,
        num_blocks=17,
        keys={"name": "mobilenet_v3_large", **_MOBILENET},
    ),
    "MobileNetV3-Small": _Backbone(
        kernel="encoder/_blocks/12/_conv/kernel",
        shape=(1, 1, 96, 576),
        block_pattern=_MOBILENET_BLOCKS,
        num_blocks=13,
        keys={"name": "mobilenet_v3_small", **_MOBILENET},
    ),
}


def load_deeplab2(
    system: PanopticDeepLab, state: Mapping[str, np.ndarray], *, keep_initial: Sequence[str] = ()
) -> Assignment:
    """Sets the variables of a Panoptic-DeepLab to DeepLab2's weights.

    Nothing changes unless all weights fit. Settings that the weights do not contain, such as the output stride and the
    epsilon of batch normalization, must be set in the config, see `deeplab2_config`.

    Args:
        system: The system; its variables are created if needed.
        state: The weights, see `read_deeplab2_checkpoint`.
        keep_initial: Patterns with `*` for DeepLab2's names that are not loaded, for example `semantic_last_layer/*`
            for a data set with other classes.

    Returns:
        What was loaded.

    Raises:
        UserError: If names are missing or unexpected, a shape differs, or a pattern matches nothing.
    """
    if not system.built:
        system.create_variables()
    config = system.config

    def to_keras(path: str, array: np.ndarray) -> np.ndarray:
        fuse = re.search(
            r"/(semantic|instance)_decoder/fuse_(\w+)/separable/(depthwise/.*|pointwise/conv/kernel)", path
        )
        if fuse is not None:
            decoder = config.decoder
            channels = {"semantic": decoder.low_level_channels, "instance": decoder.instance_low_level_channels}
            # The low-level features come first here.
            return np.roll(array, channels[fuse[1]][fuse[2]], axis=-2 if array.ndim == 4 else 0)
        if config.void_class and "/semantic_head/predictor/" in path:
            return np.roll(array, -1, axis=-1)  # Void is the last class here.
        return array

    return assign_by_name(
        system,
        state,
        name_of=lambda path: deeplab2_name(path.partition("/")[2], config.backbone),
        to_keras=to_keras,
        keep_initial=keep_initial,
        what="Panoptic-DeepLab",
        config=CONFIGS[19][0],
    )


def deeplab2_name(path: str, backbone: BackboneConfig) -> str | None:
    """Returns DeepLab2's name of a variable of `PanopticDeepLab`.

    Args:
        path: Path of the variable inside the system, such as `semantic_aspp/branch0/conv/kernel`.
        backbone: The backbone of the system.

    Returns:
        The name, such as `semantic_decoder/_aspp/_conv_bn_act/_conv/kernel`; None if DeepLab2 has no such variable.
    """
    part, _, inside = path.partition("/")
    return deeplab2_backbone_name(inside, backbone) if part == "backbone" else _variable_name(path, _LAYERS)


def deeplab2_backbone_name(path: str, backbone: BackboneConfig) -> str | None:
    """Returns DeepLab2's name of a variable of a backbone; its checkpoints of ImageNet have the same names.

    Args:
        path: Path of the variable inside the backbone, such as `res2/block1/conv1/conv/kernel`.
        backbone: The backbone.

    Returns:
        The name, such as `encoder/_stage2/_block1/_conv1_bn_act/_conv/kernel`; None if DeepLab2 has no such variable.
    """
    if backbone.name in _MOBILENET_STAGES:
        return _variable_name(path, _mobilenet_layers(_MOBILENET_STAGES[backbone.name]))
    return _variable_name(path, (*_STEM_LAYERS[backbone.stem], *_RESNET_LAYERS))


def _variable_name(path: str, layers: Sequence[tuple[str, str]]) -> str | None:
    """Returns DeepLab2's name of a variable of one of the `layers`, see `match_layer_name`."""
    for pattern, variable in _VARIABLES:
        found = re.fullmatch(pattern, path)
        if found is not None:
            layer = match_layer_name(found[1], layers)
            return None if layer is None else f"{layer}/{found.expand(variable)}"
    return None


# Patterns of the paths of variables, each with the layer as its first group, and DeepLab2's names of the variables.
_VARIABLES = (
    (r"(.+/depthwise)/conv/kernel", "_depthwise_conv/depthwise_kernel"),
    (r"(.+/squeeze_excite/\w+)/conv/(kernel|bias)", r"\2"),
    (r"(.+/predictor)/(kernel|bias)", r"\2"),
    (r"(.+)/conv/(kernel)", r"_conv/\2"),
    (r"(.+)/norm/(\w+)", r"_batch_norm/\2"),
)
# Patterns of the paths of layers, and DeepLab2's names.
_LAYERS = (
    (r"(semantic|instance)_aspp/branch0", r"\1_decoder/_aspp/_conv_bn_act"),
    (r"(semantic|instance)_aspp/branch(\d)", r"\1_decoder/_aspp/_aspp_conv\2/_conv_bn_act"),
    (r"(semantic|instance)_aspp/pooling_branch", r"\1_decoder/_aspp/_aspp_pool/_conv_bn_act"),
    (r"(semantic|instance)_aspp/project", r"\1_decoder/_aspp/_proj_conv_bn_act"),
    (r"(semantic|instance)_decoder/project_res3", r"\1_decoder/_low_level_conv1"),
    (r"(semantic|instance)_decoder/project_res2", r"\1_decoder/_low_level_conv2"),
    (r"(semantic|instance)_decoder/fuse_res3/separable/(\w+)", r"\1_decoder/_fusion_conv1/_conv1_bn_act/_\2"),
    (r"(semantic|instance)_decoder/fuse_res2/separable/(\w+)", r"\1_decoder/_fusion_conv2/_conv1_bn_act/_\2"),
    (r"semantic_head/fuse/separable/(\w+)", r"semantic_head_without_last_layer/_conv1_bn_act/_\1"),
    (r"semantic_head/predictor", "semantic_last_layer"),
    (r"center_head/fuse/separable/(\w+)", r"instance_center_head_without_last_layer/_conv1_bn_act/_\1"),
    (r"center_head/predictor", "instance_center_head_last_layer"),
    (r"offset_head/fuse/separable/(\w+)", r"instance_regression_head_without_last_layer/_conv1_bn_act/_\1"),
    (r"offset_head/predictor", "instance_regression_head_last_layer"),
)
_STEM_LAYERS = {
    "seven_by_seven": ((r"stem/conv1", "encoder/_stem"),),
    "three_convolutions": (
        (r"stem/(conv[12])", r"encoder/_stem/_\1_bn_act"),
        (r"stem/conv3", "encoder/_stem/_conv3_bn"),
    ),
}
_RESNET_LAYERS = (
    (r"res(\d)/block(\d+)/(conv[12])", r"encoder/_stage\1/_block\2/_\3_bn_act"),
    (r"res(\d)/block(\d+)/conv3", r"encoder/_stage\1/_block\2/_conv3_bn"),
    (r"res(\d)/block(\d+)/shortcut", r"encoder/_stage\1/_block\2/_shortcut"),
)
_MOBILENET_STAGES: dict[str, Stages] = {"mobilenet_v3_large": LARGE, "mobilenet_v3_small": SMALL}
_MOBILENET_BLOCK_LAYERS = {
    "expand": "_conv1_bn_act",
    "depthwise": "_conv2_bn_act",
    "project": "_conv3_bn",
    "squeeze_excite/reduce": "_squeeze_excitation/_se_reduce",
    "squeeze_excite/expand": "_squeeze_excitation/_se_expand",
}


def _mobilenet_layers(stages: Stages) -> list[tuple[str, str]]:
    """Returns the paths of the layers of MobileNetV3, and DeepLab2's names, which count the blocks of all stages."""
    layers = [("stem/conv1", "encoder/_blocks/0")]
    for number, (path, row) in enumerate(list_blocks(stages), start=1):
        if isinstance(row, FinalConvolution):
            layers.append((f"{path}/conv", f"encoder/_blocks/{number}"))
        else:
            layers.extend(
                (f"{path}/{layer}", f"encoder/_blocks/{number}/{name}")
                for layer, name in _MOBILENET_BLOCK_LAYERS.items()
            )
    return layers


def _backbone_source(title: str, keys: Mapping[str, Any]) -> BackboneSource:
    """Makes the source of weights of one backbone, in a checkpoint of ImageNet or of Panoptic-DeepLab."""
    backbone = BackboneConfig.model_validate(keys)
    # Any features can be taken; the other keys change what the weights mean.
    needed = {f"backbone.{key}": value for key, value in keys.items() if key not in ("name", "depthwise_features")}
    colors = dict.fromkeys(("image_mean", "image_std"), (127.5, 127.5, 127.5))
    return BackboneSource(
        backbones=(backbone.name,),
        recognizes=lambda state: _find_backbone(state) == title,
        name_of=lambda path, name: deeplab2_backbone_name(path, backbone),
        to_keras=lambda path, array: array,
        ignored=("[!e]*", "e[!n]*"),  # All that is not below `encoder`.
        settings=lambda name: {**colors, "backbone.padding": "symmetric", **needed},
    )


# By the name of the source, for messages.
DEEPLAB2_SOURCES: dict[str, BackboneSource] = {
    f"DeepLab2's {title}": _backbone_source(title, backbone.keys) for title, backbone in _BACKBONES.items()
}
