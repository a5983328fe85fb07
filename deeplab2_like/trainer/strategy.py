"""Where the computation runs."""

from collections.abc import Callable

import tensorflow as tf

from deeplab2_like.errors import unknown_name


def _one_device() -> tf.distribute.Strategy:
    return tf.distribute.OneDeviceStrategy("/gpu:0" if tf.config.list_physical_devices("GPU") else "/cpu:0")


def _mirrored() -> tf.distribute.Strategy:
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    return tf.distribute.MirroredStrategy([device.name for device in devices])


STRATEGIES: dict[str, Callable[[], tf.distribute.Strategy]] = {"one_device": _one_device, "mirrored": _mirrored}


def make_strategy(name: str) -> tf.distribute.Strategy:
    """Builds a distribution strategy.

    Args:
        name: `one_device` (the first GPU, else the CPU) or `mirrored` (all GPUs of this machine, or all logical CPUs).

    Raises:
        UserError: If there is no such strategy.
    """
    if name not in STRATEGIES:
        raise unknown_name("strategy", name, STRATEGIES)
    return STRATEGIES[name]()
