"""One training step of a system on one device and on two logical ones, in a process of its own. Not a test.

Arguments, as JSON: the configs by a name of each, as lists of name and overrides. Prints, for each, as JSON: the number
of weights; the largest difference between the weights after the step on one device and on two; and the largest change
of a weight in the step.
"""

import json
import os
import sys
import tempfile
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import keras
import numpy as np
import tensorflow as tf

from deeplab2_like.configs import Config, load_config
from deeplab2_like.trainer.batches import distribute_batches
from deeplab2_like.trainer.run import make_run
from deeplab2_like.trainer.strategy import make_strategy
from deeplab2_like.trainer.trainer import Trainer

Weights = dict[str, np.ndarray]


def weights_around_a_step(config: Config, strategy: tf.distribute.Strategy, model_dir: str) -> tuple[Weights, Weights]:
    """Returns the weights before and after a step, by path."""
    run = make_run(config, model_dir, strategy)
    before = {weight.path: weight.numpy() for weight in run.system.weights}
    dataset = distribute_batches(run, start_step=0)
    trainer = Trainer(
        dataset, config.trainer, system=run.system, optimizer=run.optimizer, strategy=strategy, step=run.step
    )
    trainer.train(tf.constant(1))
    return before, {weight.path: weight.numpy() for weight in run.system.weights}


def largest_difference(first: Weights, second: Weights) -> float:
    assert first.keys() == second.keys()
    return max(float(np.abs(first[path] - second[path]).max()) for path in first)


tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
# Tracing the steps would take most of the time. Other tests compare the traced step of Panoptic-DeepLab.
warnings.filterwarnings("ignore", message="Even though the `tf.config.experimental_run_functions_eagerly`")
tf.config.run_functions_eagerly(True)
# A second strategy of the same devices would use the same keys for its exchanges.
one_device, two_devices = make_strategy("one_device"), make_strategy("mirrored")
assert two_devices.num_replicas_in_sync == 2
found = {}
with tempfile.TemporaryDirectory() as folder:
    for name, (config_name, overrides) in json.loads(sys.argv[1]).items():
        config = load_config(config_name, overrides)
        start, one = weights_around_a_step(config, one_device, folder)
        start_of_two, two = weights_around_a_step(config, two_devices, folder)
        assert largest_difference(start, start_of_two) == 0
        found[name] = {
            "weights": len(one),
            "difference": largest_difference(one, two),
            "change": largest_difference(start, one),
        }
        keras.utils.clear_session()
print(json.dumps(found))
