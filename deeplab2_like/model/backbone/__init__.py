"""Backbones: from a normalized image to features at strides 2, 4, 8, 16 and 32. `BACKBONES` is the registry."""

from collections.abc import Callable

import keras

from deeplab2_like.errors import UserError, unknown_name
from deeplab2_like.model.backbone.efficientnet_lite import ACTIVATION, FIRST_FILTERS, SCALES, efficientnet_lite_stages
from deeplab2_like.model.backbone.mobilenet_v3 import (
    LARGE,
    SMALL,
    InvertedResidualNetwork,
    MobileNetV3,
    Stages,
    halve_last_stage,
)
from deeplab2_like.model.backbone.resnet import SEVEN_BY_SEVEN, THREE_CONVOLUTIONS, TINY_STEM, BlockKind, ResNet, Stem
from deeplab2_like.model.config import BackboneConfig, Norm

Builder = Callable[..., keras.layers.Layer]  # (config: BackboneConfig, *, norm: Norm) -> backbone

_STEMS: dict[str, Stem] = {"three_convolutions": THREE_CONVOLUTIONS, "seven_by_seven": SEVEN_BY_SEVEN}
# Options that only some backbones have.
_RESNET_FIELDS = ("stem", "max_pool", "stride_in_1x1", "deformable_stages")
_MOBILENET_FIELDS = ("halve_last_stage", "squeeze_gate", "depthwise_features")


def _bottleneck_resnet(
    depths: tuple[int, int, int, int], *, groups: int = 1, group_width: int | None = None
) -> Builder:
    def build(config: BackboneConfig, *, norm: Norm) -> keras.layers.Layer:
        _refuse(config, *_MOBILENET_FIELDS)
        if groups > 1:
            _refuse(config, "deformable_stages")
        if config.deformable_stages and config.padding != "symmetric":
            raise UserError(
                f"Config key 'backbone.padding' is {config.padding}, but deformable convolutions have symmetric "
                "padding; leave out that key or 'backbone.deformable_stages'."
            )
        return ResNet(
            stem=_STEMS[config.stem]._replace(max_pool=config.max_pool),
            block=BlockKind.BOTTLENECK,
            widths=(64, 128, 256, 512),
            depths=depths,
            output_stride=config.output_stride,
            multi_grid=config.multi_grid,
            atrous_conversion=config.atrous_conversion,
            stride_in_1x1=config.stride_in_1x1,
            deformable_stages=config.deformable_stages,
            padding=config.padding,
            norm=norm,
            groups=groups,
            group_width=group_width,
            name="backbone",
        )

    return build


def _resnet_tiny(config: BackboneConfig, *, norm: Norm) -> keras.layers.Layer:
    """About a million parameters, for machines without an accelerator and for tests."""
    _refuse(config, *_RESNET_FIELDS, *_MOBILENET_FIELDS)
    return ResNet(
        stem=TINY_STEM,
        block=BlockKind.BASIC,
        widths=(32, 64, 96, 128),
        depths=(1, 2, 2, 2),
        output_stride=config.output_stride,
        multi_grid=config.multi_grid,
        atrous_conversion=config.atrous_conversion,
        padding=config.padding,
        norm=norm,
        name="backbone",
    )


def _mobilenet_v3(stages: Stages) -> Builder:
    def build(config: BackboneConfig, *, norm: Norm) -> keras.layers.Layer:
        _refuse(config, "multi_grid", *_RESNET_FIELDS)
        return MobileNetV3(
            stages=halve_last_stage(stages) if config.halve_last_stage else stages,
            output_stride=config.output_stride,
            atrous_conversion=config.atrous_conversion,
            squeeze_gate=config.squeeze_gate,
            depthwise_features=config.depthwise_features,
            padding=config.padding,
            norm=norm,
            name="backbone",
        )

    return build


def _efficientnet_lite(width: float, depth: float) -> Builder:
    def build(config: BackboneConfig, *, norm: Norm) -> keras.layers.Layer:
        _refuse(config, "multi_grid", *_RESNET_FIELDS, *_MOBILENET_FIELDS)
        return InvertedResidualNetwork(
            stages=efficientnet_lite_stages(width, depth),
            first_filters=FIRST_FILTERS,
            activation=ACTIVATION,
            output_stride=config.output_stride,
            atrous_conversion=config.atrous_conversion,
            padding=config.padding,
            norm=norm,
            name="backbone",
        )

    return build


def _refuse(config: BackboneConfig, *fields: str) -> None:
    """Raises `UserError` if an option that the backbone does not have is not at its default."""
    for field in fields:
        default = BackboneConfig.model_fields[field].default
        if getattr(config, field) != default:
            raise UserError(
                f"Backbone '{config.name}' has no '{field}' (got {getattr(config, field)!r}); "
                f"leave out the config key 'backbone.{field}', or choose another backbone."
            )


BACKBONES: dict[str, Builder] = {
    "resnet50": _bottleneck_resnet((3, 4, 6, 3)),
    "resnet101": _bottleneck_resnet((3, 4, 23, 3)),
    "resnet152": _bottleneck_resnet((3, 8, 36, 3)),
    "resnext101_32x8d": _bottleneck_resnet((3, 4, 23, 3), groups=32, group_width=8),
    "resnext101_64x4d": _bottleneck_resnet((3, 4, 23, 3), groups=64, group_width=4),
    "resnext152_32x8d": _bottleneck_resnet((3, 8, 36, 3), groups=32, group_width=8),
    "resnet_tiny": _resnet_tiny,
    "mobilenet_v3_large": _mobilenet_v3(LARGE),
    "mobilenet_v3_small": _mobilenet_v3(SMALL),
    **{name: _efficientnet_lite(*scales) for name, scales in SCALES.items()},
}


def build_backbone(config: BackboneConfig, *, norm: Norm) -> keras.layers.Layer:
    """Builds the backbone that a config describes.

    Every backbone is a Keras layer. Calling it with normalized images, float [B, H, W, 3] with H and W multiples of
    32, or with aligned corners one more, returns `{"stem": 1/2, "res2": 1/4, "res3": 1/8, "res4": 1/16, "res5":
    1/output_stride}`, each float [B, h, w, C]; with `output_stride` 8, res4 is at 1/8 too. Sizes are rounded up. It
    has the attributes `strides` and `channels`, `dict[str, int]` by the same names.

    Args:
        config: Name and options of the backbone.
        norm: The normalization after each convolution.

    Raises:
        UserError: If the name is unknown, or an option is set that the backbone does not have.
    """
    if config.name not in BACKBONES:
        raise unknown_name("backbone", config.name, BACKBONES)
    return BACKBONES[config.name](config, norm=norm)


__all__ = ["BACKBONES", "BackboneConfig", "MobileNetV3", "ResNet", "build_backbone"]
