"""Where the computation runs."""

import tensorflow as tf

from deeplab2_like.errors import unknown_name

STRATEGIES = ("one_device", "mirrored")


def make_strategy(name: str) -> tf.distribute.Strategy:
    """Builds a distribution strategy.

    Args:
        name: `one_device` (the first GPU, else the CPU) or `mirrored` (all GPUs of this machine, or all logical CPUs).

    Raises:
        UserError: If there is no such strategy.
    """
    if name == "one_device":
        return tf.distribute.OneDeviceStrategy("/gpu:0" if tf.config.list_physical_devices("GPU") else "/cpu:0")
    if name == "mirrored":
        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        return tf.distribute.MirroredStrategy([device.name for device in devices])
    raise unknown_name("strategy", name, STRATEGIES)
