"""Training batches of a run, distributed over its devices."""

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from deeplab2_like.data import pipeline
from deeplab2_like.trainer.run import Run


def make_batches(run: Run, *, with_label: bool = False, **options: Any) -> tf.data.Dataset:
    """Makes the data set of training batches.

    Args:
        run: The training.
        with_label: Whether to add the panoptic map to the targets.
        **options: Further arguments of `pipeline.make_train_dataset`.
    """
    system = run.system

    def make_targets(panoptic: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"panoptic": panoptic, **system.make_targets(panoptic)}

    red, green, blue = (round(value) for value in system.config.image_mean)
    return pipeline.make_train_dataset(
        run.files,
        config=run.config.data,
        make_targets=make_targets if with_label else system.make_targets,
        dataset_info=system.dataset_info,
        pad_value=(red, green, blue),
        seed=run.config.trainer.seed,
        **options,
    )


def distribute_batches(run: Run, *, start_step: int) -> Any:
    """Makes the distributed data set of training batches; each worker reads only the parts of its replicas.

    The batches are the same for any number of devices.

    Args:
        run: The training.
        start_step: Number of training steps done.

    Returns:
        A `tf.distribute.DistributedDataset` of `image` and `targets`, see `pipeline.make_train_dataset`; the targets
        have the numbers of the examples, `number`, int32 [B], see `PanopticSystem.call`.
    """
    settings, num_replicas = run.config.trainer, run.strategy.num_replicas_in_sync

    def make_dataset(context: tf.distribute.InputContext) -> tf.data.Dataset:
        share = num_replicas // context.num_input_pipelines
        first = context.input_pipeline_id * share
        dataset = make_batches(
            run,
            batch_size=settings.batch_size,
            start_step=start_step * settings.accumulate_steps,
            num_parts=num_replicas,
            parts=range(first, first + share),
        )
        return dataset.map(_for_network)

    return run.strategy.distribute_datasets_from_function(make_dataset)


def load_batch(run: Run, step: int) -> Mapping[str, Any] | None:
    """Loads the batch of a step again, which seed and step determine; None if the records have changed."""
    settings = run.config.trainer
    batch_size = settings.batch_size * settings.accumulate_steps
    try:
        return next(iter(make_batches(run, with_label=True, batch_size=batch_size, start_step=step - 1)))
    except (ValueError, tf.errors.OpError, StopIteration):
        return None


def _for_network(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the numbers of the examples to the targets; leaves out the image names, as accelerators have no strings."""
    number = tf.cast(batch["number"] % 2**31, tf.int32)
    return {"image": batch["image"], "targets": {**batch["targets"], "number": number}}
