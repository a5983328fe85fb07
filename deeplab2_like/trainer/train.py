"""Training from start to end: reads from top to bottom, for any system and any `tf.distribute` strategy."""

import contextlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import orbit
import tensorflow as tf

from deeplab2_like.checkpoint import (
    check_model_folder,
    keep_best,
    list_checkpoints,
    load_what_fits,
    make_checkpoint,
    make_checkpoint_manager,
    newest_whole_checkpoint,
    prepare_model_folder,
    restore,
)
from deeplab2_like.configs import Config
from deeplab2_like.data import pipeline, tfrecord
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.evaluation.report import write_events
from deeplab2_like.files import cannot_write
from deeplab2_like.model import PanopticSystem, build_system
from deeplab2_like.progress import TrainingProgress
from deeplab2_like.trainer import failures
from deeplab2_like.trainer.average import WeightAverage
from deeplab2_like.trainer.optimizer import freeze, learning_rate_multipliers, make_optimizer, make_schedule
from deeplab2_like.trainer.stopping import StopSignal, StopTraining
from deeplab2_like.trainer.strategy import is_chief, make_strategy, worker_of
from deeplab2_like.trainer.summaries import StepProfiler, Summaries
from deeplab2_like.trainer.trainer import NonFiniteError, Trainer, make_step_counter
from deeplab2_like.trainer.validation import Validation


def train(
    config: Config,
    model_dir: str | os.PathLike[str],
    *,
    init_from: str | os.PathLike[str] | None = None,
    profile: int = 0,
) -> PanopticSystem:
    """Trains the system of a config, or resumes where an earlier run in the same model folder ended.

    On SIGTERM it finishes the step, saves a checkpoint, says how to resume and ends the process with exit status 0.

    Args:
        config: What to train, on which records, how long.
        model_dir: Folder for checkpoints, config and TensorBoard events; made if absent. Several workers need to see
            the same folder.
        init_from: A model folder, or a checkpoint's path without ending, to start from with all weights that fit by
            name and shape; without effect when resuming.
        profile: Number of steps to record with TensorFlow's profiler, some steps after the start.

    Returns:
        The trained system, with the averaged weights if `trainer.ema_decay` is set.

    Raises:
        UserError: If the records, the config and the model folder do not fit together, a loss is not finite, the
            memory does not suffice, or another worker is lost.
        SystemExit: After SIGTERM.
    """
    settings = config.trainer
    # First of all, as several workers must find each other before TensorFlow computes anything.
    strategy = make_strategy(settings.strategy, tpu=settings.tpu)
    dataset_info = DatasetInfo.load(config.data.record_folder)
    files = tfrecord.list_shards(config.data.record_folder, config.data.train_split)
    validation_files = _list_validation_files(config)
    check_model_folder(model_dir, config, dataset_info)
    _check_batch_size(settings.batch_size, strategy.num_replicas_in_sync)

    state = _make_state(config, dataset_info, strategy)
    system, step = state.system, state.step
    _restore_or_initialize(state, strategy, model_dir, init_from)
    if int(step) >= settings.steps:
        print(f"Model folder '{model_dir}' is already trained to step {int(step)}.")
        _use_average(state)
        return system

    dataset = _distribute_batches(config, files, system, strategy, start_step=int(step))
    with contextlib.ExitStack() as stack:
        if is_chief(strategy):
            # Only now, as a start that fails must not claim the folder.
            prepare_model_folder(model_dir, config, dataset_info)
            saving_dir, events_dir = Path(model_dir), Path(model_dir) / "train"
        else:
            # All workers have to save, of which one counts.
            saving_dir, events_dir = Path(stack.enter_context(tempfile.TemporaryDirectory())), None
        manager = make_checkpoint_manager(
            state.checkpoint,
            saving_dir,
            step=step,
            every=settings.checkpoint_every,
            keep=settings.keep_checkpoints,
        )
        summaries = stack.enter_context(Summaries(events_dir))
        profiler = stack.enter_context(StepProfiler(events_dir, profile))
        stop = stack.enter_context(StopSignal(strategy))
        progress = TrainingProgress(start_step=int(step), steps=settings.steps, is_shown=is_chief(strategy))

        def after_step() -> None:
            progress.advance()
            profiler.advance()
            if int(step) < settings.steps:
                stop.raise_if_agreed()

        trainer = Trainer(
            dataset,
            system=system,
            optimizer=state.optimizer,
            strategy=strategy,
            weight_decay=settings.optimizer.weight_decay,
            clip_norm=settings.optimizer.clip_norm,
            clip_value=settings.optimizer.clip_value,
            accumulate_steps=settings.accumulate_steps,
            average=state.average,
            step=step,
            images_per_step=settings.batch_size * settings.accumulate_steps,
            after_step=after_step,
        )
        actions: list[Callable[[Mapping[str, Any]], None]] = [
            progress.report,
            lambda values: summaries.numbers(values, step=int(step)),
        ]
        if is_chief(strategy) and validation_files:
            validation = Validation(system, validation_files, average=state.average, is_stopped=lambda: stop.noted)
            actions += _validation_actions(config, validation, saving_dir, state, manager, summaries, progress)
        intervals = [settings.log_every, settings.checkpoint_every, settings.pictures_every, settings.evaluate_every]
        with progress, _quiet(), tfrecord.user_errors(), _clear_errors(config, model_dir, files, system, strategy):
            controller = orbit.Controller(
                trainer=trainer,
                strategy=strategy,
                global_step=step,
                # A loop ends wherever something is due, also if the first one starts in between.
                steps_per_loop=lambda now: min(every - int(now) % every for every in intervals if every),
                checkpoint_manager=manager,
                train_actions=actions,
            )
            try:
                controller.train(settings.steps)
            except StopTraining:
                trainer.train_loop_end()  # Checks that all is finite, before it is saved.
                manager.save(int(step), check_interval=False)
    if int(step) < settings.steps:
        print(
            f"Stopped by SIGTERM after step {int(step)} of {settings.steps}, which is saved; run the same command "
            f"again to resume from '{model_dir}'.",
            flush=True,
        )
        raise SystemExit(0)
    _use_average(state)
    return system


class _State(NamedTuple):
    """Everything that training changes."""

    system: PanopticSystem
    optimizer: keras.optimizers.Optimizer
    average: WeightAverage | None
    step: tf.Variable
    checkpoint: tf.train.Checkpoint


def _make_state(config: Config, dataset_info: DatasetInfo, strategy: tf.distribute.Strategy) -> _State:
    """Builds system and optimiser, and all their variables, as a checkpoint restores only what is there."""
    settings = config.trainer
    keras.utils.set_random_seed(settings.seed)
    with strategy.scope(), _dtype_policy(settings.precision):
        system = build_system(config, dataset_info)
        factors = learning_rate_multipliers(system, settings.optimizer.multipliers)
        freeze(system, factors)
        variables = system.trainable_variables
        if not variables:
            raise UserError("trainer.optimizer.multipliers freezes the whole network; leave a part to train.")
        schedule = make_schedule(
            settings.schedule.name,
            peak=settings.learning_rate,
            steps=settings.steps,
            power=settings.schedule.power,
            boundaries=settings.schedule.boundaries,
            decay_factor=settings.schedule.decay_factor,
            warmup_steps=settings.schedule.warmup_steps,
            warmup_start=settings.schedule.warmup_start,
        )
        optimizer = make_optimizer(
            settings.optimizer.name,
            learning_rate=schedule,
            momentum=settings.optimizer.momentum,
            variables=variables,
            multipliers=[factors[variable.path] for variable in variables],
            scale_loss=settings.precision == "mixed_float16",
        )
        average = None if settings.ema_decay is None else WeightAverage(system, settings.ema_decay)
    step = make_step_counter()
    averages = None if average is None else average.variables
    checkpoint = make_checkpoint(system, optimizer, average=averages, step=step)
    return _State(system, optimizer, average, step, checkpoint)


def _restore_or_initialize(
    state: _State,
    strategy: tf.distribute.Strategy,
    model_dir: str | os.PathLike[str],
    init_from: str | os.PathLike[str] | None,
) -> None:
    """Restores the newest whole checkpoint of the model folder, or else takes from another training what fits."""
    with strategy.scope():
        if paths := list_checkpoints(model_dir):
            restore(state.checkpoint, newest_whole_checkpoint(paths))
            if init_from is not None:
                print(f"Resuming from step {int(state.step)} of '{model_dir}'; '{init_from}' is not used.")
        elif init_from is not None:
            load_what_fits(state.system, init_from)
            if state.average is not None:
                state.average.copy_from_system()


def _use_average(state: _State) -> None:
    if state.average is not None:
        state.average.copy_to_system()


def _check_batch_size(batch_size: int, devices: int) -> None:
    if batch_size % devices:
        raise UserError(
            f"trainer.batch_size is {batch_size}, which {devices} devices cannot share evenly; use a multiple of the "
            "number of devices."
        )


def _list_validation_files(config: Config) -> list[str]:
    """Returns the files of the validation split; none if there is no such split and none is asked for."""
    if config.trainer.pictures_every is None and config.trainer.evaluate_every is None:
        return []
    try:
        return tfrecord.list_shards(config.data.record_folder, config.data.val_split)
    except UserError as error:
        if config.trainer.evaluate_every is None:
            return []
        raise UserError(f"{error} Key trainer.evaluate_every needs it; leave that key out to do without.") from error


def _make_batches(
    config: Config, files: Sequence[str], system: PanopticSystem, *, with_label: bool = False, **options: Any
) -> tf.data.Dataset:
    """Makes the data set of training batches; `options` say which, see `pipeline.make_train_dataset`."""

    def make_targets(panoptic: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"panoptic": panoptic, **system.make_targets(panoptic)}

    red, green, blue = (round(value) for value in system.image_mean)
    return pipeline.make_train_dataset(
        files,
        make_targets=make_targets if with_label else system.make_targets,
        dataset_info=system.dataset_info,
        crop_size=config.data.crop_size,
        scale_range=config.data.scale_range,
        flip=config.data.flip,
        dihedral=config.data.dihedral,
        color_jitter=config.data.color_jitter,
        pad_value=(red, green, blue),
        seed=config.trainer.seed,
        **options,
    )


def _distribute_batches(
    config: Config,
    files: Sequence[str],
    system: PanopticSystem,
    strategy: tf.distribute.Strategy,
    *,
    start_step: int,
) -> Any:
    """Gives each worker its replicas' parts of each batch: the batches are the same for any number of devices."""

    def make_dataset(context: tf.distribute.InputContext) -> tf.data.Dataset:
        share = strategy.num_replicas_in_sync // context.num_input_pipelines
        first = context.input_pipeline_id * share
        dataset = _make_batches(
            config,
            files,
            system,
            batch_size=config.trainer.batch_size,
            start_step=start_step * config.trainer.accumulate_steps,
            num_parts=strategy.num_replicas_in_sync,
            parts=range(first, first + share),
        )
        # Names are strings, which not every accelerator takes.
        return dataset.map(lambda batch: {"image": batch["image"], "targets": batch["targets"]})

    return strategy.distribute_datasets_from_function(make_dataset)


def _validation_actions(
    config: Config,
    validation: Validation,
    model_dir: Path,
    state: _State,
    manager: tf.train.CheckpointManager,
    summaries: Summaries,
    progress: TrainingProgress,
) -> list[Callable[[Mapping[str, Any]], None]]:
    """What is done with validation images at the end of a loop, where it is due."""
    settings = config.trainer

    def draw(values: Mapping[str, Any]) -> None:
        step = int(state.step)
        if settings.pictures_every and (step % settings.pictures_every == 0 or step == settings.log_every):
            summaries.pictures(validation.draw(), step=step)

    def evaluate(values: Mapping[str, Any]) -> None:
        step = int(state.step)
        if not settings.evaluate_every or (step % settings.evaluate_every and step < settings.steps):
            return
        # What took so long to reach is safe first.
        manager.save(step, check_interval=False)
        metrics = validation.evaluate()
        if metrics is None:
            return
        write_events(model_dir / config.data.val_split, metrics, step=step)
        quality = metrics["panoptic"]["all"]["pq"]
        with validation.evaluated_weights():
            is_best = keep_best(model_dir, state.system, step=step, pq=quality)
        progress.note(
            f"step {step}/{settings.steps}  PQ {quality:.2f} on split '{config.data.val_split}'"
            f"{', the best so far' if is_best else ''}"
        )

    return [draw, evaluate]


@contextlib.contextmanager
def _clear_errors(
    config: Config,
    model_dir: str | os.PathLike[str],
    files: Sequence[str],
    system: PanopticSystem,
    strategy: tf.distribute.Strategy,
) -> Iterator[None]:
    """Turns what stops a training into a sentence that says what to do."""
    settings = config.trainer
    try:
        yield
    except NonFiniteError as error:
        # As a batch follows from seed and step, none was kept.
        batch = next(
            iter(
                _make_batches(
                    config,
                    files,
                    system,
                    with_label=True,
                    batch_size=settings.batch_size * settings.accumulate_steps,
                    start_step=error.step - 1,
                )
            )
        )
        folder = Path(model_dir) / f"non_finite_step_{error.step}" if is_chief(strategy) else None
        raise failures.non_finite(error, batch, folder) from None
    except tf.errors.ResourceExhaustedError as error:
        if "No space left" in error.message:  # A full disk is the same error to TensorFlow.
            raise cannot_write(model_dir, error) from error
        raise failures.out_of_memory(
            batch_size=settings.batch_size, crop_size=config.data.crop_size, precision=settings.precision
        ) from error
    except (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.DeadlineExceededError) as error:
        if worker_of(strategy)[1] == 1:
            raise
        raise failures.lost_worker() from error


@contextlib.contextmanager
def _dtype_policy(name: str) -> Iterator[None]:
    """Layers made inside compute in this precision; what the process makes later does not."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbit prints a line per loop, which the progress display says better, and sets the process's summary step."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            yield
        finally:
            tf.summary.experimental.set_step(None)
