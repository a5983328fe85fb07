"""The contract that all systems share: what the pipeline, the trainer, the evaluation and the export rely on."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import keras
from keras import ops

from deeplab2_like.configs.schema import StrictModel
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.model.layers import Tensor, pad_to_multiple


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
    """What a network said about one view of a batch of images: another scale, a mirror image, another model.

    Attributes:
        outputs: The raw outputs.
        image_size: Height and width of the view, multiples of `size_multiple`, ints or int32 scalars.
        mirrored: Whether left and right were swapped.
    """

    outputs: Mapping[str, Tensor]
    image_size: tuple[Any, Any]
    mirrored: bool


class PanopticSystem(keras.Model):
    """Base class of the systems.

    A system turns images into panoptic maps. Only the panoptic map crosses its border; targets and raw outputs are
    private dictionaries. See `DatasetInfo` for the meaning of a panoptic map.

    Attributes:
        config_class: The system's part of the config; `from_model_config` turns it into keyword arguments.
        dataset_info: What the values of the panoptic map mean.
        oracle_parts: Names of the parts of a prediction that `postprocess_with_truth` can replace.
        loss_weights: Factor of each loss term in the sum that is minimised, by the names of `compute_losses`.

    Args:
        dataset_info: What the values of the panoptic map mean.
        image_mean: Mean of red, green and blue, in 0..255.
        image_std: Standard deviation of red, green and blue.
        size_multiple: Images are padded to a multiple of this many pixels before the network sees them.
    """

    config_class: ClassVar[type[StrictModel]]
    oracle_parts: ClassVar[tuple[str, ...]] = ()
    loss_weights: Mapping[str, float]

    def __init__(
        self,
        *,
        dataset_info: DatasetInfo,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        size_multiple: int,
        name: str | None = None,
    ) -> None:
        # Images are 0..255: bfloat16 could not tell neighbouring values apart, so inputs are not cast.
        super().__init__(name=name, autocast=False)
        self.dataset_info = dataset_info
        self.image_mean = tuple(image_mean)
        self.image_std = tuple(image_std)
        self.size_multiple = size_multiple

    @classmethod
    def from_model_config(cls, config: Any, dataset_info: DatasetInfo) -> Self:
        """Builds the system from the `model` section of a config, whose fields are the arguments of the class."""
        return cls(dataset_info=dataset_info, **{key: getattr(config, key) for key in type(config).model_fields})

    @staticmethod
    def check_room_for_instances(info: DatasetInfo, what: str, number: int) -> None:
        """Checks that the label divisor of a data set can tell so many instances of a class apart.

        Args:
            info: Facts of the data set.
            what: The config keys that say the number, for the message.
            number: Instances.

        Raises:
            UserError: If it cannot.
        """
        if number >= info.label_divisor:
            raise UserError(
                f"{what} is {number}, but label_divisor {info.label_divisor} of data set '{info.name}' has room for "
                f"{info.label_divisor - 1} instances; lower it."
            )

    def make_targets(self, panoptic: Tensor) -> dict[str, Tensor]:
        """Turns a label into what the losses compare with; runs inside `tf.data`.

        Args:
            panoptic: int32 [H, W] panoptic map, static size.

        Returns:
            Tensors of static shape, private to the system.
        """
        raise NotImplementedError

    def compute_losses(self, targets: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> dict[str, Loss]:
        """Compares raw outputs with batched targets.

        Args:
            targets: What `make_targets` returned, with a leading batch axis.
            outputs: What calling the system returned.

        Returns:
            The loss terms by name, all in float32, in the order in which they are shown.
        """
        raise NotImplementedError

    def postprocess(self, outputs: Mapping[str, Tensor], image_size: tuple[Any, Any]) -> dict[str, Tensor]:
        """Turns raw outputs into panoptic maps.

        Args:
            outputs: What calling the system returned.
            image_size: Height and width of the images before padding, ints or int32 scalars.

        Returns:
            `panoptic`: int32 [B, H, W].
            `segment_id`: int32 [B, K], the panoptic value of each segment in the map.
            `segment_class`: int32 [B, K], its class id.
            `segment_score`: float32 [B, K], its score, above zero for segments that are there.
            K is fixed; unused rows are zero in all three.
        """
        raise NotImplementedError

    def instances(self, outputs: Mapping[str, Tensor], image_size: tuple[Any, Any]) -> dict[str, Tensor] | None:
        """Overlapping instances with scores, for AP; None if the panoptic segments are all there is.

        Args:
            outputs: What calling the system returned.
            image_size: Height and width of the images before padding, ints or int32 scalars.

        Returns:
            `masks`: bool [B, N, H, W]. `boxes`: float32 [B, N, 4]. `classes`: int32 [B, N]. `scores`: float32 [B, N],
            zero for unused rows.
        """
        del outputs, image_size
        return None

    def semantic_map(self, outputs: Mapping[str, Tensor], image_size: tuple[Any, Any]) -> Tensor | None:
        """The class of every pixel before it is told what is whose, for mIoU; None if that is of the panoptic map.

        Args:
            outputs: What calling the system returned.
            image_size: Height and width of the images before padding, ints or int32 scalars.

        Returns:
            int32 [B, H, W], class ids.
        """
        del outputs, image_size
        return None

    def postprocess_targets(self, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Post-processes what a perfect network would predict, at full resolution, for a batch of targets.

        The panoptic map must be the label again: this ties targets and post-processing together.
        """
        raise NotImplementedError

    def postprocess_with_truth(
        self,
        outputs: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        image_size: tuple[Any, Any],
        parts: Sequence[str],
    ) -> dict[str, Tensor]:
        """Post-processes raw outputs of which some parts are replaced by the ground truth, for upper bounds.

        Args:
            outputs: What calling the system returned.
            targets: What `make_targets` returned for the whole images, with a leading batch axis.
            image_size: Height and width of the images before padding.
            parts: Some of `oracle_parts`; with none of them the result is that of `postprocess`.

        Returns:
            The dictionary of `postprocess`.
        """
        raise NotImplementedError

    def merge_views(self, views: Sequence[View], image_size: tuple[Any, Any]) -> dict[str, Tensor]:
        """Averages the raw outputs of several views of the same images.

        Args:
            views: At least one.
            image_size: Height and width of the images, multiples of `size_multiple`, ints or int32 scalars.

        Returns:
            Raw outputs of the images at `image_size`.

        Raises:
            UserError: If the system does not define this.
        """
        del views, image_size
        raise UserError(
            f"System '{self.name}' does not define how the outputs of several views are averaged; evaluate it without "
            "mirroring, scales and ensembles."
        )

    def prepare_images(self, images: Tensor) -> Tensor:
        """Normalises and pads images; the padding is the mean colour.

        Args:
            images: uint8 or float [B, H, W, 3], red, green and blue in 0..255.

        Returns:
            float [B, H', W', 3] in the compute type, H' and W' multiples of `size_multiple`.
        """
        images = ops.cast(images, "float32")
        images = (images - ops.array(self.image_mean, "float32")) / ops.array(self.image_std, "float32")
        return ops.cast(pad_to_multiple(images, self.size_multiple), self.compute_dtype)

    def thing_class_ids(self, positions: Tensor) -> Tensor:
        """Class ids of things, int32 [...], from their positions among the thing classes, int32 [...]."""
        return ops.take(ops.array(self.dataset_info.thing_classes, "int32"), positions)

    def infer(self, images: Tensor, *, with_instances: bool = False) -> dict[str, Tensor]:
        """From images to panoptic maps: what evaluation and export run.

        Args:
            images: uint8 [B, H, W, 3], red, green and blue, any size.
            with_instances: Whether to add what metrics need besides the map: what `instances` returns, if anything, as
                `instance_masks` and so on, and what `semantic_map` returns, if anything, as `semantic`.

        Returns:
            The dictionary of `postprocess`.
        """
        return self.finish(self(images, training=False), tuple(ops.shape(images)[1:3]), with_instances=with_instances)

    def finish(
        self, outputs: Mapping[str, Tensor], image_size: tuple[Any, Any], *, with_instances: bool = False
    ) -> dict[str, Tensor]:
        """The second half of `infer`: from raw outputs to panoptic maps.

        Args:
            outputs: What calling the system, or `merge_views`, returned.
            image_size: Height and width of the images before padding, ints or int32 scalars.
            with_instances: See `infer`.

        Returns:
            The dictionary of `infer`.
        """
        found = self.postprocess(outputs, image_size)
        if not with_instances:
            return found
        instances = self.instances(outputs, image_size) or {}
        semantic = self.semantic_map(outputs, image_size)
        found |= {f"instance_{name}": value for name, value in instances.items()}
        return found if semantic is None else found | {"semantic": semantic}

    def build(self, input_shape: Any = None) -> None:
        """Leaves it to the layers, when they are called: Keras would trace the whole network first."""

    def create_variables(self) -> "PanopticSystem":
        """Creates all variables by running the network once on an empty image; returns the system itself."""
        side = self.size_multiple
        self(ops.zeros((1, side, side, 3), "uint8"), training=False)
        return self
