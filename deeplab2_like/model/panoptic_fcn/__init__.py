"""Fully convolutional networks for panoptic segmentation (Li et al., CVPR 2021): a kernel for each thing and stuff.

On every level of a feature pyramid, a position head tells where objects have their centres and where the regions of
stuff are, and a kernel head gives each position a kernel. Kernels at the centres stand for things; those of a region,
averaged, for stuff. Kernels of several levels that stand for the same are fused. Multiplied with one encoded feature of
high resolution, each gives a mask, things and stuff alike, without boxes and without non-maximum suppression.

Read in this order: the config below, `targets.py`, `network.py`, `losses.py`, `postprocess.py`; then, in
`deeplab2_like/model`, what other systems share: `deformable.py`, `fpn.py`, `semantic_fpn.py`, `merge.py`.

Where the paper leaves a choice, and where this differs from the released code:

- Pixels without a label, and those of crowds, teach nothing. In the released code they are negative examples.
- A kernel that is fused joins the best one that it is like among those that stay. In the released code it goes if any
  better one is like it, and is lost if that one goes, too: of three kernels in a chain only the first is left.
- The kernel of a region is the mean over the region, as the paper says. The released code divides by the size of the
  whole map, so that a kernel depends on the size of the image and the padding.
- `reference_behavior` brings back these three, for released weights.
- An object that fills no position of a level is predicted from the position of its centre; there, it is left out.
- At most twice `loss.max_instances` pairs of object and level of an image are trained on.
- Deformable convolutions start as plain ones; there, their offsets start at random.
- The score of a stuff segment is the mean probability of its mask, read at the resolution of the feature.
- Images are padded to a multiple of 32 with the mean colour. They are seen at their own size unless
  `postprocess.resize` is set; then they are made smaller without antialiasing.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pydantic
from keras import ops

from deeplab2_like.configs.schema import StrictModel
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.model.backbone import build_backbone
from deeplab2_like.model.base import Loss, PanopticSystem
from deeplab2_like.model.boxes import take_rows
from deeplab2_like.model.config import (
    BackboneConfig,
    FpnConfig,
    Norm,
    ResizeConfig,
    are_consecutive_levels,
    backbone_features,
)
from deeplab2_like.model.fpn import FeaturePyramid
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.merge import best_class, upsampling_matrices
from deeplab2_like.model.panoptic_fcn.losses import dice_loss, first_of, focal_loss, pick_kernels, pool_regions
from deeplab2_like.model.panoptic_fcn.network import FeatureEncoder, KernelHead, PositionHead
from deeplab2_like.model.panoptic_fcn.postprocess import (
    Things,
    all_masks,
    boxes_of,
    claim_masks,
    find_centers,
    find_regions,
    fuse_things,
    measure_masks,
)
from deeplab2_like.model.panoptic_fcn.targets import four_samples, is_of_size, level_shares, make_targets
from deeplab2_like.model.seen_size import read_at_cells, seen_images, seen_scale
from deeplab2_like.model.segments import look_up, merge, region_scores, segment_outputs
from deeplab2_like.model.semantic import SemanticClasses

_SIZE_MULTIPLE = 32


class HeadConfig(StrictModel):
    """The two heads on the pyramid (section 3.1)."""

    channels: int = pydantic.Field(256, ge=1, description="Of the convolutions; also the numbers of a kernel.")
    convolutions: int = pydantic.Field(3, ge=1, description="In each head, before its last one (Table 1).")
    deformable: bool = pydantic.Field(True, description="Deformable convolutions in the position head (Table 1).")
    kernel_coordinates: bool = pydantic.Field(True, description="Tell the kernel head each position (Table 2).")
    norm: Norm = Norm(kind="group", epsilon=1e-5)


class EncoderConfig(StrictModel):
    """The feature encoder (section 3.3)."""

    feature: Literal["finest", "sum", "semantic_fpn"] = pydantic.Field(
        "semantic_fpn", description="What it is made from: the finest level, the sum of levels, Semantic FPN (Table 5)."
    )
    semantic_channels: int = pydantic.Field(256, ge=1, description="Of Semantic FPN.")
    channels: int = pydantic.Field(64, ge=1, description="Of the encoded feature (Table 4).")
    convolutions: int = pydantic.Field(3, ge=1)
    coordinates: bool = pydantic.Field(True, description="Tell it each position (Table 2).")
    deformable: bool = pydantic.Field(False, description="Deformable convolutions (Table 8).")
    norm: Norm = pydantic.Field(Norm(kind="group", epsilon=1e-5), description="In Semantic FPN.")


class LossConfig(StrictModel):
    """Losses and the targets that they compare with (section 3.4, appendix A.1)."""

    position_weight: float = pydantic.Field(1.0, ge=0, description="The paper's lambda_pos.")
    segmentation_weight: float = pydantic.Field(3.0, ge=0, description="The paper's lambda_seg.")
    focal_alpha: float = pydantic.Field(0.25, ge=0, le=1)
    focal_gamma: float = pydantic.Field(2.0, ge=1)
    weighted: bool = pydantic.Field(True, description="Weighted dice loss; else one kernel, at the centre (Table 6).")
    kernels: int = pydantic.Field(7, ge=1, description="Kernels of each object in the weighted dice loss (Table 6).")
    center: Literal["mass", "box"] = pydantic.Field("mass", description="What the centre is that of (Table 14).")
    min_overlap: float = pydantic.Field(0.7, gt=0, lt=1, description="Of boxes shifted by a Gaussian's radius.")
    max_instances: int = pydantic.Field(100, ge=1, description="Most instances of a training example; the largest.")


class PostprocessConfig(StrictModel):
    """From maps to the panoptic map (sections 3.2 and 3.4, appendix A.2)."""

    candidates: int = pydantic.Field(50, ge=1, description="Most centres of each level.")
    score_threshold: float = pydantic.Field(0.05, ge=0, le=1, description="Weaker things are dropped.")
    region_threshold: float = pydantic.Field(0.05, ge=0, le=1, description="Weaker stuff of a level is dropped.")
    similarity: float = pydantic.Field(0.9, ge=-1, le=1, description="Cosine from which kernels are fused (Table 3).")
    class_aware: bool = pydantic.Field(True, description="Fuse kernels of one class only (Table 3).")
    kernels: int = pydantic.Field(100, ge=1, description="Most things per image.")
    mask_threshold: float = pydantic.Field(0.4, gt=0, lt=1, description="Probability above which a pixel is inside.")
    map_score_threshold: float = pydantic.Field(0.2, ge=0, le=1, description="Weaker things are not in the map.")
    overlap_threshold: float = pydantic.Field(
        0.5, ge=0, le=1, description="A thing of which a larger share is covered by better ones is dropped."
    )
    stuff_area_limit: int = pydantic.Field(4096, ge=0, description="Smaller stuff segments become void, in pixels.")
    resize: ResizeConfig | None = pydantic.Field(
        None, description="Size at which images are seen outside of training; null, their own."
    )


class PanopticFCNConfig(StrictModel):
    """The `model` section of a config."""

    backbone: BackboneConfig = BackboneConfig(output_stride=32, stem="seven_by_seven")
    norm: Norm = Norm()
    image_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    image_std: tuple[pydantic.PositiveFloat, pydantic.PositiveFloat, pydantic.PositiveFloat] = (58.395, 57.12, 57.375)
    fpn: FpnConfig = FpnConfig()
    size_ranges: dict[str, tuple[float, float]] = pydantic.Field(
        {"p3": (1, 64), "p4": (32, 128), "p5": (64, 256), "p6": (128, 512), "p7": (256, 2048)},
        description="For each level of the two heads, between which sides its objects lie, in pixels (section 4.1).",
    )
    head: HeadConfig = HeadConfig()
    encoder: EncoderConfig = EncoderConfig()
    loss: LossConfig = LossConfig()
    postprocess: PostprocessConfig = PostprocessConfig()
    reference_behavior: bool = pydantic.Field(False, description="Do as the released code does, for its weights.")

    @pydantic.field_validator("size_ranges")
    @classmethod
    def _levels_in_order(cls, value: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        if not are_consecutive_levels(list(value)):
            raise ValueError("its keys must be levels one after the other, fine to coarse, such as p3, p4, p5")
        reached = float("inf")
        for level, (low, high) in value.items():
            if not 0 <= low < high:
                raise ValueError(f"the range of {level} must be a smaller and a larger number of pixels")
            if low > reached:
                raise ValueError(f"the range of {level} must begin at {reached:g} or below, where the one before ends")
            reached = high
        return value

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "PanopticFCNConfig":
        if next(iter(self.size_ranges)) < self.fpn.finest_level:
            raise ValueError(f"size_ranges begins with {next(iter(self.size_ranges))}, finer than fpn.finest_level")
        return self


class PanopticFCN(PanopticSystem):
    """Panoptic FCN behind the contract of `PanopticSystem`.

    Raw outputs, all float32: for each level of the heads `center_<level>` [B, h, w, T], logits of the thing classes'
    centres, `region_<level>` [B, h, w, S], logits of stuff and "other", and `kernel_<level>` [B, h, w, K]; `feature`
    [B, h, w, E], the encoded feature at the stride of the pyramid's finest level; and `seen_size` int32 [2] if
    `postprocess.resize` is set and this is no training.

    Args:
        dataset_info: What the values of the panoptic map mean.
        backbone: Which backbone; its output stride must be 32.
        norm: The normalisation of the backbone.
        image_mean: Mean of red, green and blue, in 0..255.
        image_std: Standard deviation of red, green and blue.
        fpn: Channels of the pyramid.
        size_ranges: The levels of the heads, and between which sides their objects lie.
        head: Position head and kernel head.
        encoder: Feature encoder.
        loss: Weights and targets.
        postprocess: Thresholds.
        reference_behavior: Whether to do as the released code does where this differs on purpose.

    Raises:
        UserError: If the backbone has another output stride, the data set has no things or no stuff, or
            `postprocess.kernels` or `loss.max_instances` things cannot be told apart with its label divisor.
    """

    config_class = PanopticFCNConfig
    oracle_parts = ("positions", "classes", "masks")

    def __init__(
        self,
        *,
        dataset_info: DatasetInfo,
        backbone: BackboneConfig,
        norm: Norm,
        image_mean: tuple[float, float, float],
        image_std: tuple[float, float, float],
        fpn: FpnConfig,
        size_ranges: Mapping[str, tuple[float, float]],
        head: HeadConfig,
        encoder: EncoderConfig,
        loss: LossConfig,
        postprocess: PostprocessConfig,
        reference_behavior: bool,
    ) -> None:
        super().__init__(
            dataset_info=dataset_info,
            image_mean=image_mean,
            image_std=image_std,
            size_multiple=_SIZE_MULTIPLE,
            name="panoptic_fcn",
        )
        self._check(dataset_info, max(postprocess.kernels, loss.max_instances))
        self.size_ranges = dict(size_ranges)
        self.loss_config = loss
        self.postprocess_config = postprocess
        self.reference_behavior = reference_behavior
        self.classes = SemanticClasses.of(dataset_info, things="other", paint_things=False)
        self.loss_weights = {
            "center": loss.position_weight,
            "region": loss.position_weight,
            "thing_mask": loss.segmentation_weight,
            "stuff_mask": loss.segmentation_weight,
        }

        self.backbone = build_backbone(backbone, norm=norm)
        features = backbone_features(fpn.finest_level)
        coarsest = int(list(size_ranges)[-1].removeprefix("p"))
        self.fpn = FeaturePyramid(
            strides=self.backbone.strides,
            features=tuple(features.values()),
            channels=fpn.channels,
            coarser_levels=max(coarsest - 5, 0),
            coarser="convolve",
            norm=fpn.norm,
            name="fpn",
        )
        self.stride = self.fpn.strides[fpn.finest_level]
        self.level_strides = {level: self.fpn.strides[level] for level in size_ranges}
        self.position_head = PositionHead(
            num_things=len(dataset_info.thing_classes),
            num_regions=len(self.classes.class_id),
            channels=head.channels,
            convolutions=head.convolutions,
            deformable=head.deformable,
            norm=head.norm,
            name="position_head",
        )
        self.kernel_head = KernelHead(
            channels=head.channels,
            convolutions=head.convolutions,
            coordinates=head.kernel_coordinates,
            weights=encoder.channels,
            norm=head.norm,
            name="kernel_head",
        )
        self.encoder = FeatureEncoder(
            strides={level: self.fpn.strides[level] for level in features},
            feature=encoder.feature,
            semantic_channels=encoder.semantic_channels,
            channels=encoder.channels,
            convolutions=encoder.convolutions,
            coordinates=encoder.coordinates,
            deformable=encoder.deformable,
            norm=encoder.norm,
            name="encoder",
        )

    @staticmethod
    def _check(info: DatasetInfo, things: int) -> None:
        if not info.thing_classes:
            raise UserError(
                f"Data set '{info.name}' has no things, so there are no centres for Panoptic FCN to find; train "
                "Semantic FPN, with a config such as panoptic_fpn/semantic_fpn_coco_resnet50."
            )
        PanopticSystem.check_room_for_instances(info, "model.postprocess.kernels or model.loss.max_instances", things)
        if not info.stuff_classes:
            raise UserError(
                f"Data set '{info.name}' has no stuff, so nothing tells Panoptic FCN where no object is; make the "
                "background a class, with `convert coco-instances --background NAME` for example."
            )

    # --- targets -----------------------------------------------------------------------------------------------------

    def make_targets(self, panoptic: Tensor) -> dict[str, Tensor]:
        """See `deeplab2_like.model.panoptic_fcn.targets.make_targets`."""
        return make_targets(
            panoptic,
            dataset_info=self.dataset_info,
            level_strides=self.level_strides,
            size_ranges=self.size_ranges,
            stride=self.stride,
            size_multiple=self.size_multiple,
            max_instances=self.loss_config.max_instances,
            center=self.loss_config.center,
            min_overlap=self.loss_config.min_overlap,
        )

    # --- network -----------------------------------------------------------------------------------------------------

    def call(self, images: Tensor, targets: Any = None, training: bool = False) -> dict[str, Tensor]:
        """Runs the network.

        Args:
            images: uint8 or float [B, H, W, 3], 0..255, any size.
            targets: Not used.
            training: Whether statistics of normalisations are those of the batch.

        Returns:
            The raw outputs, see the class.
        """
        del targets
        images, sizes = seen_images(images, None if training else self.postprocess_config.resize)
        pyramid = self.fpn(self.backbone(self.prepare_images(images), training=training), training=training)
        levels = {level: pyramid[level] for level in self.level_strides}
        centers, regions = self.position_head(levels, training=training)
        kernels = self.kernel_head(levels, training=training)
        return {
            **{f"center_{level}": values for level, values in centers.items()},
            **{f"region_{level}": values for level, values in regions.items()},
            **{f"kernel_{level}": values for level, values in kernels.items()},
            "feature": self.encoder(pyramid, training=training),
            **sizes,
        }

    # --- losses ------------------------------------------------------------------------------------------------------

    def compute_losses(self, targets: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> dict[str, Loss]:
        """Compares raw outputs with targets (section 3.4).

        Args:
            targets: What `make_targets` returned, batched.
            outputs: What calling the system returned.

        Returns:
            `center` and `thing_mask`, per pair of object and level; `region`, per image, each level's mean over its
            positions; `stuff_mask`, per pair of class and level.
        """
        instances = self._samples(targets["instance_map"], -1)
        semantic = self._samples(self.classes.of_class_map(targets["semantic"]), len(self.classes.class_id))
        is_thing_known = self._is_counted(instances == -1)
        is_stuff_known = self._is_counted(semantic == len(self.classes.class_id))
        centers, regions = 0.0, 0.0
        things: dict[str, list[Tensor]] = {"kernels": [], "share": [], "label": [], "used": []}
        stuff: dict[str, list[Tensor]] = {"weights": [], "used": []}
        for level, stride in self.level_strides.items():
            center_logits, kernels = outputs[f"center_{level}"], outputs[f"kernel_{level}"]
            size = tuple(kernels.shape[1:3])
            shares_of_instances, shares_of_semantic = level_shares(instances, size), level_shares(semantic, size)
            region_targets = self._region_targets(shares_of_semantic)  # [B, h, w, S]
            heat = targets[f"heat_{level}"]
            # The centre of an object counts, however much around it is unknown.
            has_center = ops.cast(ops.any(heat >= 1.0, axis=-1), "float32")
            centers = centers + focal_loss(
                center_logits,
                heat,
                ops.maximum(self._level_weight(shares_of_instances, unknown=-1), has_center),
                alpha=self.loss_config.focal_alpha,
                gamma=self.loss_config.focal_gamma,
            )
            region = focal_loss(
                outputs[f"region_{level}"],
                region_targets,
                self._level_weight(shares_of_semantic, unknown=len(self.classes.class_id)),
                alpha=self.loss_config.focal_alpha,
                gamma=self.loss_config.focal_gamma,
            )
            regions = regions + region / (size[0] * size[1])

            limit = ops.array([size[0] - 1, size[1] - 1], "int32")
            picked, share = pick_kernels(
                kernels,
                center_logits,
                instances=shares_of_instances,
                classes=targets["classes"],
                positions=ops.minimum(ops.cast(targets["centers"] / stride, "int32"), limit),
                number=self.loss_config.kernels,
                weighted=self.loss_config.weighted,
            )
            # A level of a few positions has fewer kernels to pick.
            missing = (self.loss_config.kernels if self.loss_config.weighted else 1) - share.shape[-1]
            things["kernels"].append(ops.pad(picked, [[0, 0], [0, 0], [0, missing], [0, 0]]))
            things["share"].append(ops.pad(share, [[0, 0], [0, 0], [0, missing]]))
            is_on_level = is_of_size(targets["boxes"], *self.size_ranges[level]) & targets["valid"]
            things["used"].append(is_on_level)
            things["label"].append(ops.cumsum(ops.ones_like(targets["classes"]), axis=1))

            masks = ops.cast(region_targets > 0, "float32")
            pooled = pool_regions(kernels, masks, over_map=self.reference_behavior)
            stuff["weights"].append(self.kernel_head.embed_stuff(pooled)[:, :, None])  # [B, S, 1, E]
            stuff["used"].append(ops.any(masks > 0, axis=(1, 2)))

        pairs = {name: ops.concatenate(values, axis=1) for name, values in things.items()}  # [B, L * M, ...]
        num_objects = ops.sum(ops.cast(pairs["used"], "float32"))
        kept, used = first_of(
            {name: pairs[name] for name in ("kernels", "share", "label")},
            pairs["used"],
            2 * self.loss_config.max_instances,
        )
        weights = self.kernel_head.embed_things(kept["kernels"])  # [B, P, k, E]
        labels = ops.where(used, kept["label"], -2)  # A label that no pixel has.
        dice = ops.sum(
            dice_loss(outputs["feature"], weights, labels, instances, is_thing_known) * kept["share"], axis=-1
        )
        used = ops.cast(used, "float32")

        levels, num_regions = len(self.level_strides), len(self.classes.class_id)
        is_stuff = ops.cast(ops.concatenate(stuff["used"], axis=1), "float32")  # [B, L * S]
        region_labels = ops.zeros_like(is_stuff, "int32") + ops.tile(ops.arange(num_regions), [levels])
        stuff_weights = ops.concatenate(stuff["weights"], axis=1)
        stuff_dice = dice_loss(outputs["feature"], stuff_weights, region_labels, semantic, is_stuff_known)[..., 0]
        return {
            "center": Loss(centers, num_objects),
            "region": Loss(regions, ops.cast(ops.shape(instances)[0], "float32")),
            "thing_mask": Loss(ops.sum(dice * used), ops.sum(used)),
            "stuff_mask": Loss(ops.sum(stuff_dice * is_stuff), ops.sum(is_stuff)),
        }

    def _samples(self, labels: Tensor, padding: int) -> Tensor:
        """Four samples of each cell of the feature, int32 [B, h, w, 4], of a label map without padding."""
        height, width = labels.shape[1:3]
        margins = [[0, 0], [0, -height % self.size_multiple], [0, -width % self.size_multiple]]
        return four_samples(ops.pad(labels, margins, constant_values=padding), self.stride)

    def _is_counted(self, unknown: Tensor) -> Tensor:
        """1 for cells of which most is known, float32 [B, h, w], from bool [B, h, w, 4]."""
        if self.reference_behavior:
            return ops.ones_like(unknown[..., 0], "float32")
        return ops.cast(ops.sum(ops.cast(unknown, "float32"), axis=-1) < 2, "float32")

    def _level_weight(self, shares: Sequence[tuple[Tensor, Tensor]], *, unknown: int) -> Tensor:
        """1 for positions of a level of which most is known, float32 [B, h, w], from what `level_shares` returned."""
        if self.reference_behavior:
            return ops.ones_like(shares[0][0], "float32")
        share: Tensor = 0.0
        for label, part in shares:
            share = share + ops.cast(label == unknown, "float32") * part
        return ops.cast(share < 0.5, "float32")

    def _region_targets(self, shares: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """How much of each position of a level belongs to each class, if half or more; float32 [B, h, w, S]."""
        share: Tensor = 0.0
        for label, part in shares:
            share = share + ops.one_hot(label, len(self.classes.class_id), dtype="float32") * part[..., None]
        return ops.where(share >= 0.5, ops.minimum(share, 1.0), 0.0)

    # --- post-processing ---------------------------------------------------------------------------------------------

    def postprocess(self, outputs: Mapping[str, Tensor], image_size: tuple[Any, Any]) -> dict[str, Tensor]:
        """See `PanopticSystem.postprocess`: rows 0 to N - 1 are things by score, row N + c is class c."""
        return self._merge(outputs, self._things(outputs), *self._stuff(outputs), image_size)

    def instances(self, outputs: Mapping[str, Tensor], image_size: tuple[Any, Any]) -> dict[str, Tensor]:
        """See `PanopticSystem.instances`: all things, also those that the panoptic map leaves out."""
        things, _ = self._ranked(outputs, self._things(outputs))
        masks = all_masks(
            outputs["feature"],
            things.weights,
            *self._enlarging_matrices(outputs, image_size),
            threshold=self.postprocess_config.mask_threshold,
        )
        return {
            "masks": masks,
            "boxes": boxes_of(masks),
            "classes": self.thing_class_ids(things.classes),
            "scores": things.scores,
        }

    def _things(self, outputs: Mapping[str, Tensor]) -> Things:
        """Things at the peaks of all levels, fused."""
        config = self.postprocess_config
        found = [
            find_centers(
                outputs[f"center_{level}"],
                outputs[f"kernel_{level}"],
                # Objects of the coarsest levels are large, and so are their peaks.
                window=3 if stride <= 32 else 5,
                threshold=config.score_threshold,
                number=config.candidates,
            )
            for level, stride in self.level_strides.items()
        ]
        kernels, scores, classes = (ops.concatenate(values, axis=1) for values in zip(*found, strict=True))
        things, _ = Things(self.kernel_head.embed_things(kernels), scores, classes).best(scores.shape[1])
        weights, scores = fuse_things(
            *things,
            similarity=config.similarity,
            class_aware=config.class_aware,
            reference_behavior=self.reference_behavior,
        )
        return Things(weights, scores, things.classes)

    def _stuff(self, outputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The weights of each class of regions, float32 [B, S, E], and which are there, bool [B, S]."""
        found = [
            find_regions(outputs[f"region_{level}"], threshold=self.postprocess_config.region_threshold)
            for level in self.level_strides
        ]
        return self._stuff_of(outputs, [regions for regions, _ in found], [counts for _, counts in found])

    def _stuff_of(
        self, outputs: Mapping[str, Tensor], regions: Sequence[Tensor], counts: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """What `_stuff` returns, from the regions on each level and which of them count."""
        total: Tensor = 0.0
        number: Tensor = 0.0
        for level, level_regions, is_counted in zip(self.level_strides, regions, counts, strict=True):
            pooled = pool_regions(outputs[f"kernel_{level}"], level_regions, over_map=self.reference_behavior)
            share = ops.cast(is_counted, "float32")[..., None]  # [B, S, 1]
            total, number = total + share * self.kernel_head.embed_stuff(pooled), number + share
        return total / ops.maximum(number, 1.0), number[..., 0] > 0

    def _ranked(self, outputs: Mapping[str, Tensor], things: Things) -> tuple[Things, Tensor]:
        """The best things by score and by how sure their masks are, and in which lines of cells these have a part."""
        config = self.postprocess_config
        certainty, lines = measure_masks(outputs["feature"], things.weights, threshold=config.mask_threshold)
        scores = things.scores * certainty
        scores = ops.where(scores >= config.score_threshold, scores, 0.0)
        things, index = things._replace(scores=scores).best(config.kernels)
        return things, take_rows(lines, index)

    def _merge(
        self,
        outputs: Mapping[str, Tensor],
        things: Things,
        stuff_weights: Tensor,
        is_there: Tensor,
        image_size: tuple[Any, Any],
    ) -> dict[str, Tensor]:
        """Makes masks of weights, and one map of masks."""
        config, feature = self.postprocess_config, outputs["feature"]
        things, lines = self._ranked(outputs, things)
        owner = claim_masks(
            (things.scores >= config.map_score_threshold) & (things.scores > 0),
            things.weights,
            lines,
            feature,
            *self._enlarging_matrices(outputs, image_size),
            threshold=config.mask_threshold,
            overlap_threshold=config.overlap_threshold,
        )
        logits = ops.einsum("bhwe,bse->bhws", feature, stuff_weights)
        probability = ops.where(is_there[:, None, None], ops.sigmoid(logits), 0.0)  # [B, h, w, S]
        seen_size = outputs.get("seen_size")
        merged = merge(
            best_class(probability, image_size, stride=self.stride, seen_size=seen_size),
            owner,
            self.thing_class_ids(things.classes),
            class_of_semantic=self.classes.painted_class,
            num_classes=self.dataset_info.num_classes,
            stuff_area_limit=config.stuff_area_limit,
            label_divisor=self.dataset_info.label_divisor,
            void=self.dataset_info.void,
        )
        of_regions = region_scores(probability, merged, self.classes.of_class, stride=self.stride, seen_size=seen_size)
        return segment_outputs(merged, things.scores, of_regions)

    def _enlarging_matrices(self, outputs: Mapping[str, Tensor], image_size: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
        """From the cells of the feature to the pixels of the map, along the rows and along the columns."""
        cells = tuple(ops.shape(outputs["feature"])[1:3])
        return upsampling_matrices(cells, outputs.get("seen_size"), image_size, stride=self.stride)

    # --- upper bounds ------------------------------------------------------------------------------------------------

    def postprocess_targets(self, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `PanopticSystem.postprocess_targets`."""
        return self._merge_true_masks(targets, targets["classes"], None)

    def postprocess_with_truth(
        self,
        outputs: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        image_size: tuple[Any, Any],
        parts: Sequence[str],
    ) -> dict[str, Tensor]:
        """See `PanopticSystem.postprocess_with_truth` (Table 9).

        `positions`: the kernels of each object are those at its true centre, those of each region those of the true
        region; their classes are predicted there. `classes`: these classes are true, too. `masks`: what the kernels
        would give is replaced by the true masks.

        Raises:
            UserError: If there are other parts, but not `positions`.
        """
        if not parts:
            return self.postprocess(outputs, image_size)
        if "positions" not in parts:
            raise UserError(
                f"Oracle part '{parts[0]}' of panoptic_fcn belongs to true positions; "
                f"ask for --oracle positions {' '.join(parts)}."
            )
        things = self._true_things(outputs, targets, image_size)
        regions = self._true_regions(outputs, targets, image_size)
        class_of_region = self._predicted_classes(outputs, regions)
        if "classes" in parts:
            things = things._replace(classes=targets["classes"])
            class_of_region = ops.zeros_like(class_of_region) + ops.arange(class_of_region.shape[1])
        if "masks" in parts:
            return self._merge_true_masks(targets, things.classes, class_of_region)
        weights, is_there = self._stuff_of(outputs, regions, [ops.any(each > 0, axis=(1, 2)) for each in regions])
        # Regions that are taken for one class become one.
        joins = ops.one_hot(class_of_region, class_of_region.shape[1], dtype="float32")  # [B, true, predicted]
        joins = joins * ops.cast(is_there, "float32")[..., None]
        number = ops.sum(joins, axis=1)  # [B, predicted]
        joined = ops.einsum("btp,bte->bpe", joins, weights) / ops.maximum(number, 1.0)[..., None]
        return self._merge(outputs, things, joined, number > 0, image_size)

    def _true_things(
        self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], image_size: tuple[Any, Any]
    ) -> Things:
        """For each true object the mean weights at its centre, on the levels it is on, and the class found there."""
        scale = seen_scale(outputs.get("seen_size"), image_size)
        boxes = targets["boxes"] * ops.concatenate([scale, scale])
        valid = targets["valid"]
        is_on_level = [is_of_size(boxes, *limits) & valid for limits in self.size_ranges.values()]
        # What is smaller or larger than all ranges counts on all levels.
        is_on_any = functools.reduce(ops.logical_or, is_on_level)
        weights, classes, number = 0.0, 0.0, 0.0
        for (level, stride), is_on in zip(self.level_strides.items(), is_on_level, strict=True):
            kernels, logits = outputs[f"kernel_{level}"], outputs[f"center_{level}"]
            batch, height, width = ops.shape(kernels)[:3]
            position = ops.cast(targets["centers"] * scale / stride, "int32")  # [B, M, 2]
            y, x = ops.minimum(position[..., 0], height - 1), ops.minimum(position[..., 1], width - 1)
            at_center = y * width + x
            share = ops.cast(is_on | (valid & ~is_on_any), "float32")[..., None]  # [B, M, 1]
            picked = take_rows(ops.reshape(kernels, (batch, height * width, kernels.shape[-1])), at_center)
            found = take_rows(ops.reshape(logits, (batch, height * width, logits.shape[-1])), at_center)
            weights = weights + share * self.kernel_head.embed_things(picked)
            classes = classes + share * ops.sigmoid(found)
            number = number + share
        return Things(
            weights / ops.maximum(number, 1.0),
            ops.cast(valid, "float32"),
            ops.cast(ops.argmax(classes, axis=-1), "int32"),
        )

    def _true_regions(
        self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], image_size: tuple[Any, Any]
    ) -> list[Tensor]:
        """The true region of each class on each level, float32 [B, h, w, S] of zeros and ones."""
        num_regions = len(self.classes.class_id)
        semantic = self.classes.of_class_map(targets["semantic"])
        regions = []
        for level, stride in self.level_strides.items():
            cells = tuple(ops.shape(outputs[f"region_{level}"])[1:3])
            label = read_at_cells(semantic, cells, outputs.get("seen_size"), image_size, stride=stride)
            regions.append(ops.one_hot(label, num_regions, dtype="float32"))
        return regions

    def _predicted_classes(self, outputs: Mapping[str, Tensor], regions: Sequence[Tensor]) -> Tensor:
        """The class that the network sees in each true region, int32 [B, S]."""
        total = 0.0
        for level, true in zip(self.level_strides, regions, strict=True):
            total = total + ops.einsum("bhwt,bhwp->btp", true, ops.sigmoid(outputs[f"region_{level}"]))
        return ops.cast(ops.argmax(total, axis=-1), "int32")

    def _merge_true_masks(
        self, targets: Mapping[str, Tensor], thing_classes: Tensor, class_of_region: Tensor | None
    ) -> dict[str, Tensor]:
        """One map of the true masks, of given classes: int32 [B, M] of things, int32 [B, S] of regions."""
        # Rows count from 1 in the instance map; masks of the truth do not overlap.
        instance_map, number = targets["instance_map"], targets["valid"].shape[1]
        owner = ops.where(instance_map > 0, instance_map - 1, number)
        semantic = self.classes.of_class_map(targets["semantic"])
        if class_of_region is not None:
            void = ops.full_like(class_of_region[:, :1], len(self.classes.class_id))
            semantic = look_up(ops.concatenate([class_of_region, void], axis=1), semantic)
        merged = merge(
            semantic,
            owner,
            self.thing_class_ids(thing_classes),
            class_of_semantic=(*self.classes.painted_class, -1),
            num_classes=self.dataset_info.num_classes,
            stuff_area_limit=self.postprocess_config.stuff_area_limit,
            label_divisor=self.dataset_info.label_divisor,
            void=self.dataset_info.void,
        )
        scores = ops.cast(targets["valid"], "float32")
        return segment_outputs(merged, scores, ops.ones_like(merged.kept[:, number:], "float32"))
