"""The contract that all systems share: the pipeline, the trainer, the evaluation and the export rely on it."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import keras
from keras import ops

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.model.config import SystemConfig
from deeplab2_like.model.geometry import Geometry, Size
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.resampling import pad_to_multiple


class Loss(NamedTuple):
    """One loss term of this replica's part of the batch.

    The trainer divides the sum of `total` over all replicas by the sum of `normalizer` over all replicas.

    Attributes:
        total: float32 scalar, a sum over pixels or objects.
        normalizer: float32 scalar, what the sum is divided by (a count, or a sum of weights); zero if nothing counts.
    """

    total: Tensor
    normalizer: Tensor


class View(NamedTuple):
    """The raw outputs for one view of a batch of images: another scale, a mirror image, or another model.

    Attributes:
        system: The system that was called.
        outputs: Its raw outputs.
        scale: The `scale` with which it was called.
        mirrored: Whether left and right of the images were swapped.
    """

    system: "PanopticSystem"
    outputs: Mapping[str, Tensor]
    scale: float = 1.0
    mirrored: bool = False


class PanopticSystem(keras.Model):
    """Base class of the systems: a Keras model that turns images into panoptic maps.

    Other code sees only panoptic maps, segments and instances; targets and raw outputs are private dictionaries of the
    system. See `DatasetInfo` for the meaning of a panoptic map.

    Args:
        config: The `model` section of a config, of type `config_class`.
        dataset_info: The meaning of the values of the panoptic map.
        name: Name of the Keras model; by default the name of the folder of the system.

    Attributes:
        config_class: Type of `config`.
        oracle_parts: Names of the parts of a prediction that `postprocess_with_truth` can replace.
        size_multiple: Images are padded to a multiple of this many pixels before the network sees them.
        parts_in_paper: Names of the parts in `describe` whose multiply-adds the paper counts, if it leaves out others.
        loss_weights: Factor of each loss term in the sum that is minimized, by the names of `compute_losses`.
        stride: Network pixels per value of the dense raw outputs, such as semantic logits.
        aligned_corners: Whether resizing aligns the corner pixels, see `resampling`; then the sides of padded images
            are one pixel more than a multiple of `size_multiple`.
    """

    config_class: ClassVar[type[SystemConfig]]
    oracle_parts: ClassVar[tuple[str, ...]] = ()
    size_multiple: ClassVar[int] = 32
    parts_in_paper: ClassVar[tuple[str, ...]] = ()
    loss_weights: Mapping[str, float]
    stride: int
    aligned_corners: bool = False

    def __init__(self, config: Any, dataset_info: DatasetInfo, *, name: str | None = None) -> None:
        # Images are 0..255: bfloat16 could not tell neighboring values apart, so inputs are not cast.
        super().__init__(name=name or type(self).__module__.split(".")[-2], autocast=False)
        self.config = config
        self.dataset_info = dataset_info

    def get_config(self) -> dict[str, Any]:
        """Returns the argument of `from_config` that builds an equal system; Keras needs it to save a model."""
        return {
            "config": self.config.model_dump(mode="json"),
            "dataset_info": self.dataset_info.to_dict(),
            "dtype_policy": self.dtype_policy.name,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Self:
        """Builds a system from the result of `get_config`, with freshly initialized variables."""
        del custom_objects
        with dtype_policy(config["dtype_policy"]):
            settings = cls.config_class.model_validate(config["config"])
            return cls(settings, DatasetInfo.from_dict(config["dataset_info"]), name=config["name"])

    def check_instance_limit(self, key: str, limit: int) -> None:
        """Checks that the label divisor of the data set leaves room for the instances of an image.

        Args:
            key: The config key of the limit, for the message.
            limit: Largest number of instances.

        Raises:
            UserError: If the limit is not below the label divisor.
        """
        info = self.dataset_info
        if limit >= info.label_divisor:
            raise UserError(
                f"{key} is {limit}, but label_divisor {info.label_divisor} of data set '{info.name}' has room for "
                f"{info.label_divisor - 1} instances; lower it."
            )

    def call(
        self, images: Tensor, targets: Any = None, training: bool = False, scale: float = 1.0
    ) -> dict[str, Tensor]:
        """Runs the network.

        Args:
            images: uint8 or float [B, H, W, 3], red, green and blue in 0..255, any size.
            targets: Result of `make_targets`, with a leading batch axis; some systems need it in training. The trainer
                adds `number`, int32 [B], the number of each example of the training. Random choices for an image depend
                on it, so that they are the same on any number of devices; without it, on the position in the batch.
            training: Whether normalizations use the statistics of the batch, dropout is active, and the raw outputs are
                those of training.
            scale: Factor of the size at which the network sees the images, for averages over several scales.

        Returns:
            The raw outputs, private to the system; its class describes them.
        """
        raise NotImplementedError

    def make_targets(self, panoptic: Tensor) -> dict[str, Tensor]:
        """Turns a label into targets of the losses; runs inside `tf.data`.

        Args:
            panoptic: int32 [H, W] panoptic map, static size.

        Returns:
            Tensors of static shape, private to the system.
        """
        raise NotImplementedError

    def compute_losses(self, targets: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> dict[str, Loss]:
        """Compares raw outputs with batched targets.

        Args:
            targets: Result of `make_targets`, with a leading batch axis.
            outputs: Raw outputs of the system.

        Returns:
            The loss terms by name, all in float32, in the order in which they are shown.
        """
        raise NotImplementedError

    def postprocess(self, outputs: Mapping[str, Tensor], image_size: Size) -> dict[str, Tensor]:
        """Turns raw outputs into panoptic maps.

        Args:
            outputs: Raw outputs of the system.
            image_size: Height and width of the images before padding, ints or int32 scalars.

        Returns:
            `panoptic`: int32 [B, H, W].
            `segment_id`: int32 [B, K], the panoptic value of each segment in the map.
            `segment_class`: int32 [B, K], its class id.
            `segment_score`: float32 [B, K], its score, above zero for segments that are there.
            K is fixed; unused rows are zero in all three.
        """
        raise NotImplementedError

    def instances(self, outputs: Mapping[str, Tensor], image_size: Size) -> dict[str, Tensor] | None:
        """Returns overlapping instances with scores, for AP; None if the system predicts panoptic segments only.

        Args:
            outputs: Raw outputs of the system.
            image_size: Height and width of the images before padding, ints or int32 scalars.

        Returns:
            `masks`: bool [B, N, H, W]. `boxes`: float32 [B, N, 4]. `classes`: int32 [B, N]. `scores`: float32 [B, N],
            zero for unused rows.
        """
        del outputs, image_size
        return None

    @property
    def semantic_classes(self) -> tuple[int, ...]:
        """Class ids that the semantic head predicts, over which mIoU is averaged; by default all classes."""
        return tuple(range(self.dataset_info.num_classes))

    def semantic_map(self, outputs: Mapping[str, Tensor], image_size: Size) -> Tensor:
        """Returns the prediction of the semantic head, for mIoU, without the rules that make the panoptic map.

        By default it is the best channel of the raw output `semantic_logits`, [B, h, w, C], one for each class.

        Args:
            outputs: Raw outputs of the system.
            image_size: Height and width of the images before padding, ints or int32 scalars.

        Returns:
            int32 [B, H, W], some of `semantic_classes`, or the ignore label where none of them is predicted.
        """
        return self.geometry(outputs, image_size).argmax(outputs["semantic_logits"], stride=self.stride)

    def geometry(self, outputs: Mapping[str, Tensor], image_size: Size) -> Geometry:
        """Returns the sizes of images and of their raw outputs.

        Args:
            outputs: Raw outputs of the system.
            image_size: Height and width of the images before padding, ints or int32 scalars.
        """
        return Geometry.of(outputs, image_size, aligned_corners=self.aligned_corners)

    def true_semantic_map(self, targets: Mapping[str, Tensor]) -> Tensor:
        """Returns the `semantic_map` of a perfect network.

        Args:
            targets: Result of `make_targets`, with a leading batch axis; `semantic` holds the class ids.

        Returns:
            int32 [B, H, W], the true class, or the ignore label for void and for classes that the head cannot predict.
        """
        info = self.dataset_info
        predicted = [c if c in self.semantic_classes else info.ignore_label for c in range(info.num_classes)]
        class_ids = ops.minimum(targets["semantic"], info.num_classes)  # Void is the row after the classes.
        return ops.take(ops.array([*predicted, info.ignore_label], "int32"), class_ids)

    def postprocess_targets(self, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Post-processes the outputs of a perfect network, at full resolution, for a batch of targets.

        Args:
            targets: Result of `make_targets`, with a leading batch axis.

        Returns:
            The dictionary of `postprocess`; the panoptic map equals the label, which shows that targets and
            post-processing fit together.
        """
        raise NotImplementedError

    def postprocess_with_truth(
        self,
        outputs: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        image_size: Size,
        parts: Sequence[str],
    ) -> dict[str, Tensor]:
        """Post-processes raw outputs of which some parts are replaced by the ground truth, for upper bounds.

        Args:
            outputs: Raw outputs of the system.
            targets: Result of `make_targets` for the whole images, with a leading batch axis.
            image_size: Height and width of the images before padding.
            parts: Some of `oracle_parts`; with none of them the result is that of `postprocess`.

        Returns:
            The dictionary of `postprocess`.
        """
        raise NotImplementedError

    def semantic_map_with_truth(
        self,
        outputs: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        image_size: Size,
        parts: Sequence[str],
    ) -> Tensor:
        """Returns the `semantic_map` that belongs to `postprocess_with_truth`, with the same arguments.

        It is the true one if the part `semantic` or all parts are true.
        """
        if "semantic" in parts or set(parts) == set(self.oracle_parts):
            return self.true_semantic_map(targets)
        return self.semantic_map(outputs, image_size)

    def merge_views(self, views: Sequence[View], image_size: Size) -> dict[str, Tensor]:
        """Merges the raw outputs of several views of the same images.

        Args:
            views: At least one.
            image_size: Height and width of the images before padding, ints or int32 scalars.

        Returns:
            Raw outputs for `postprocess`, `instances` and `semantic_map`.

        Raises:
            UserError: If the system does not define this.
        """
        del views, image_size
        raise UserError(
            f"System '{self.name}' does not define how the outputs of several views are averaged; evaluate it without "
            "mirroring, scales and ensembles."
        )

    def prepare_images(self, images: Tensor, *, min_size: tuple[int, int] = (1, 1)) -> Tensor:
        """Normalizes and pads images; the padding has the mean color.

        Args:
            images: uint8 or float [B, H, W, 3], red, green and blue in 0..255.
            min_size: Smallest height and width of the padded images.

        Returns:
            float [B, H', W', 3] in the compute dtype, H' and W' multiples of `size_multiple`, or 1 more than one with
            `aligned_corners`.
        """
        images = ops.cast(images, "float32")
        images = (images - ops.array(self.config.image_mean, "float32")) / ops.array(self.config.image_std, "float32")
        remainder = 1 if self.aligned_corners else 0
        padded = pad_to_multiple(images, self.size_multiple, remainder=remainder, min_size=min_size)
        return ops.cast(padded, self.compute_dtype)

    def infer(self, images: Tensor, *, with_instances: bool = False) -> dict[str, Tensor]:
        """Turns images into panoptic maps, for evaluation and export.

        Args:
            images: uint8 [B, H, W, 3], red, green and blue, any size.
            with_instances: Whether to add the result of `semantic_map`, as `semantic`, and those of `instances`, as
                `instance_masks` and so on, where the system defines them; metrics need them.

        Returns:
            The dictionary of `postprocess`.
        """
        return self.finish(self(images, training=False), tuple(ops.shape(images)[1:3]), with_instances=with_instances)

    def finish(
        self, outputs: Mapping[str, Tensor], image_size: Size, *, with_instances: bool = False
    ) -> dict[str, Tensor]:
        """Turns raw outputs into panoptic maps: the second half of `infer`.

        Args:
            outputs: Raw outputs of the system or of `merge_views`.
            image_size: Height and width of the images before padding, ints or int32 scalars.
            with_instances: See `infer`.

        Returns:
            The dictionary of `infer`.
        """
        results = self.postprocess(outputs, image_size)
        if not with_instances:
            return results
        instances = self.instances(outputs, image_size) or {}
        results |= {f"instance_{name}": value for name, value in instances.items()}
        return results | {"semantic": self.semantic_map(outputs, image_size)}

    def build(self, input_shape: Any = None) -> None:
        """Does nothing: layers build themselves when called, and Keras would trace the whole network first."""

    def create_variables(self) -> Self:
        """Creates all variables by running the network once on an empty image; returns the system itself."""
        side = self.size_multiple
        self(ops.zeros((1, side, side, 3), "uint8"), training=False)
        return self

    def get_build_config(self) -> dict[str, Any]:
        """Returns the input shape; Keras needs it to save a model."""
        return {"input_shape": (None, None, None, 3)}

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Creates all variables, before Keras loads their values."""
        del config
        self.create_variables()


@contextlib.contextmanager
def dtype_policy(name: str) -> Iterator[None]:
    """Sets Keras' dtype policy for the layers made inside the block, such as `mixed_bfloat16`."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)
