"""A training in a process of its own, which a test can kill. Not a test; run with the options as JSON.

Prints `step N` after each step. Options:
  model_dir, config   as of `train` and `one_convolution_config`
  devices             number of logical devices
  synchronized        whether to train the system `Synchronized`
  seconds_per_step    time to wait after each step
  die                 at which moment of a save, and from which step on, the process kills itself: `merge` is between
                      writing the values and giving them their name; `list` is after that, before TensorFlow's list of
                      checkpoints names it
"""

import json
import os
import signal
import sys
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import keras
import tensorflow as tf
from one_convolution import ENTRY, OneConvolution, one_convolution_config, one_convolution_registered
from tensorflow.python.checkpoint import checkpoint_management
from tensorflow.python.ops import gen_io_ops

from deeplab2_like.model import SYSTEMS
from deeplab2_like.trainer import train as train_module
from deeplab2_like.trainer.trainer import Trainer


class Synchronized(OneConvolution):
    """With statistics over all replicas, and without dropout, which depends on the devices."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        for layer in self.stages[1:3]:
            self.stages.remove(layer)
        self.stages.insert(1, keras.layers.BatchNormalization(synchronized=True, name="norm"))


def die_while_saving(module: Any, name: str, step: int) -> None:
    """Makes a function kill the process at its first call from a step on."""
    original = getattr(module, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        if steps_done >= step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(module, name, dying)


options = json.loads(sys.argv[1])
if "devices" in options:
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * options["devices"]
    )
steps_done = 0
original_step = Trainer.train_step


def announced_step(self: Trainer, iterator: Any) -> None:
    global steps_done
    steps_done = int(self._step) + 1
    original_step(self, iterator)
    print(f"step {int(self._step)}", file=sys.__stdout__, flush=True)
    time.sleep(options.get("seconds_per_step", 0))


Trainer.train_step = announced_step  # type: ignore[method-assign]
if "die" in options:
    moment, step = options["die"]
    where = {
        "merge": (gen_io_ops, "merge_v2_checkpoints"),
        "list": (checkpoint_management, "update_checkpoint_state_internal"),
    }
    die_while_saving(*where[moment], step)

with one_convolution_registered():
    if options.get("synchronized"):
        SYSTEMS["one_convolution"] = ENTRY._replace(system="__main__:Synchronized")
    train_module.train(one_convolution_config(**options["config"]), options["model_dir"])
print("finished", flush=True)
