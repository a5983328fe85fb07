"""Random choices that an image keeps on any number of devices: they depend on the seed and the image alone."""

import keras
from keras import ops

from deeplab2_like.model.layers import Tensor


def image_seeds(seed: Tensor, batch: int | Tensor, numbers: Tensor | None) -> Tensor:
    """Makes a seed for each image of a batch from the seed of a step.

    Args:
        seed: int32 or uint32 [2] of `keras.random.SeedGenerator.next`, the same on all replicas.
        batch: Number of images of this replica, B.
        numbers: int32 [B], the numbers of the images, which differ on all replicas; None for the positions in the batch
            of a single replica.

    Returns:
        int32 [B, 2].
    """
    seed = ops.cast(seed, "int32")
    first = seed[0] + (ops.arange(batch, dtype="int32") if numbers is None else ops.cast(numbers, "int32"))
    return ops.stack([first, ops.zeros_like(first) + seed[1]], axis=-1)


def random_uniform(seed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Makes random numbers that depend on the seed and the position alone, the same on every backend.

    `keras.random` takes numbers or generators as seeds, not tensors, which a training step needs. This is the finalizer
    of the MurmurHash3 function, with the seed mixed in twice.

    Args:
        seed: int32 [2], or [B, 2] for independent numbers in each image.
        shape: Sizes, known or not.

    Returns:
        float32 of that shape, or [B, *shape], at least 0 and below 1.
    """
    number = 1
    for size in shape:
        number = number * size

    def mix(x: Tensor) -> Tensor:
        # Multiplication wraps around; the mask clears the sign bits that the shift of a negative number repeats.
        for shift, factor in ((16, -2048144789), (13, -1028477387), (16, 1)):
            x = ops.bitwise_xor(x, ops.bitwise_and(ops.right_shift(x, shift), 2 ** (32 - shift) - 1)) * factor
        return x

    seed = ops.cast(seed, "int32")
    positions = ops.arange(number, dtype="int32")
    bits = mix(mix(positions + mix(seed[..., :1])) + mix(seed[..., 1:] + 1))  # [..., number]
    bits = ops.bitwise_and(ops.right_shift(bits, 8), 2**24 - 1)
    return ops.reshape(ops.cast(bits, "float32") / 2.0**24, (*ops.shape(seed)[:-1], *shape))


class ImageDropout(keras.layers.Layer):
    """Dropout that drops the same values of an image on any number of devices.

    Args:
        rate: Share of the values to drop, in [0, 1).

    Input and output shape: float [B, ...]. In training, `numbers`, int32 [B], are the numbers of the images, see
    `image_seeds`.
    """

    def __init__(self, rate: float, *, name: str | None = None) -> None:
        super().__init__(name=name)
        self.rate = rate
        self.seed_generator = keras.random.SeedGenerator() if rate > 0 else None

    def call(self, inputs: Tensor, numbers: Tensor | None = None, training: bool = False) -> Tensor:
        """Drops values in training."""
        if self.seed_generator is None or not training:
            return inputs
        seeds = image_seeds(self.seed_generator.next(), ops.shape(inputs)[0], numbers)
        is_kept = random_uniform(seeds, tuple(ops.shape(inputs)[1:])) >= self.rate
        return ops.where(is_kept, inputs / (1 - self.rate), 0.0)
