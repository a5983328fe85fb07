"""The network of Panoptic FPN (section 3.1): the pyramid and its branches, built from the parts that systems share."""

from collections.abc import Mapping

from deeplab2_like.model.config import backbone_features
from deeplab2_like.model.detection.detector import Detector
from deeplab2_like.model.fpn import FeaturePyramid
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.panoptic_fpn.config import PanopticFPNConfig
from deeplab2_like.model.semantic import SemanticBranch


def build_pyramid(config: PanopticFPNConfig, backbone_strides: Mapping[str, int]) -> FeaturePyramid:
    """Builds the pyramid; with an instance branch it has one more level, p6, for the proposals.

    Args:
        config: The `model` section of a config.
        backbone_strides: Stride of each backbone feature, by its name.

    Raises:
        UserError: If the strides do not double.
    """
    return FeaturePyramid(
        strides=backbone_strides,
        features=tuple(backbone_features(config.fpn.finest_level).values()),
        channels=config.fpn.channels,
        coarser_levels=0 if config.semantic_only else 1,
        norm=config.fpn.norm,
        name="fpn",
    )


def build_semantic_branch(
    config: PanopticFPNConfig, pyramid_strides: Mapping[str, int], *, num_classes: int
) -> SemanticBranch:
    """Builds the semantic branch.

    Args:
        config: The `model` section of a config.
        pyramid_strides: Stride of each pyramid level, by its name.
        num_classes: Number of semantic classes.
    """
    return SemanticBranch(
        num_classes,
        strides={level: pyramid_strides[level] for level in backbone_features(config.fpn.finest_level)},
        channels=config.semantic.channels,
        aggregation=config.semantic.aggregation,
        norm=config.semantic.norm,
        name="semantic_branch",
    )


def build_detector(config: PanopticFPNConfig, pyramid_strides: Mapping[str, int], *, num_classes: int) -> Detector:
    """Builds the instance branch.

    Args:
        config: The `model` section of a config.
        pyramid_strides: Stride of each pyramid level, by its name.
        num_classes: Number of thing classes.
    """
    return Detector(
        config.rpn,
        config.roi,
        num_classes=num_classes,
        strides=pyramid_strides,
        roi_levels=tuple(backbone_features(config.fpn.finest_level)),
        name="detector",
    )


def split_channels(pyramid: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Splits the channels of every level into halves, one for each branch (Table 3d)."""
    half = next(iter(pyramid.values())).shape[-1] // 2
    return (
        {name: level[..., :half] for name, level in pyramid.items()},
        {name: level[..., half:] for name, level in pyramid.items()},
    )
