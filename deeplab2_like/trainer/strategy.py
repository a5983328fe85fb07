"""Distribution strategies: the devices and workers of a training."""

import os
import textwrap
from collections.abc import Callable

import tensorflow as tf

from deeplab2_like.errors import UserError, shorten, unknown_name
from deeplab2_like.parsing import parse_json


def _one_device(tpu: str) -> tf.distribute.Strategy:
    return tf.distribute.OneDeviceStrategy("/gpu:0" if tf.config.list_physical_devices("GPU") else "/cpu:0")


# Characters of an environment variable in a message.
_MAX_QUOTED = 300


def _mirrored(tpu: str) -> tf.distribute.Strategy:
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    return tf.distribute.MirroredStrategy([device.name for device in devices])


def _multi_worker(tpu: str) -> tf.distribute.Strategy:
    text = os.environ.get("TF_CONFIG", "")
    try:
        config = parse_json(text)
        workers, index = config["cluster"]["worker"], int(config["task"]["index"])
        if not (isinstance(workers, list) and 0 <= index < len(workers) and config["task"]["type"] == "worker"):
            raise LookupError
    except (ValueError, LookupError, TypeError) as error:
        example = '{"cluster": {"worker": ["host0:12345", "host1:12345"]}, "task": {"type": "worker", "index": 0}}'
        found = shorten(repr(text), _MAX_QUOTED) if text else "not set"
        raise UserError(
            f"Environment variable TF_CONFIG is {found}; strategy 'multi_worker' needs all "
            f"workers in it and the index of this one, such as {example}."
        ) from error
    try:
        return tf.distribute.MultiWorkerMirroredStrategy()
    except RuntimeError as error:
        raise UserError(
            "Strategy 'multi_worker' must be made before anything else runs in the process; start the training in a "
            "process of its own."
        ) from error


def _tpu(tpu: str) -> tf.distribute.Strategy:
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu)
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    except (ValueError, RuntimeError, tf.errors.OpError) as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise UserError(f"TPU '{tpu}' cannot be used ({reason}); set trainer.tpu to its name or address.") from error


# Each takes the name of the TPU; only `tpu` uses it.
STRATEGIES: dict[str, Callable[[str], tf.distribute.Strategy]] = {
    "one_device": _one_device,
    "mirrored": _mirrored,
    "multi_worker": _multi_worker,
    "tpu": _tpu,
}


def make_strategy(name: str, *, tpu: str = "local") -> tf.distribute.Strategy:
    """Builds a distribution strategy.

    Args:
        name: `one_device` (the first GPU, else the CPU), `mirrored` (all GPUs of this machine, or all logical CPUs),
            `multi_worker` (the devices of all processes that the environment variable TF_CONFIG names) or `tpu`.
        tpu: Name or address of the TPU; `local` for that of this machine.

    Raises:
        UserError: If there is no such strategy, or its devices or workers are not available.
    """
    if name not in STRATEGIES:
        raise unknown_name("strategy", name, STRATEGIES)
    return STRATEGIES[name](tpu)


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Returns whether this process is the chief: the worker that writes config, events and checkpoints."""
    return bool(strategy.extended.should_checkpoint)


def worker_of(strategy: tf.distribute.Strategy) -> tuple[int, int]:
    """Returns the index of this worker and the number of all."""
    resolver = strategy.cluster_resolver
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy) or resolver is None:
        return 0, 1
    return int(resolver.task_id), len(resolver.cluster_spec().job_tasks("worker"))
