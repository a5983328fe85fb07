"""Training from start to end: reads from top to bottom, for any system and any `tf.distribute` strategy."""

import contextlib
import functools
import io
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import keras
import orbit
import tensorflow as tf

from deeplab2_like.checkpoint import (
    CONFIG_FILE,
    check_model_folder,
    clean_model_folder,
    list_checkpoints,
    load_what_fits,
    make_checkpoint,
    make_checkpoint_manager,
    newest_whole_checkpoint,
    prepare_model_folder,
    restore,
)
from deeplab2_like.configs import Config, load_config
from deeplab2_like.data import pipeline
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.record_errors import report_bad_records
from deeplab2_like.data.shards import list_shards
from deeplab2_like.errors import UserError
from deeplab2_like.files import cannot_write
from deeplab2_like.model import PanopticSystem, build_system
from deeplab2_like.progress import LenientOutput, TrainingProgress
from deeplab2_like.trainer import failures
from deeplab2_like.trainer.average import WeightAverage
from deeplab2_like.trainer.optimizer import freeze, learning_rate_multipliers, make_optimizer, make_schedule
from deeplab2_like.trainer.run_lock import run_lock
from deeplab2_like.trainer.stopping import StopSignal, StopTraining, exit_status
from deeplab2_like.trainer.strategy import is_chief, make_strategy, worker_of
from deeplab2_like.trainer.summaries import StepProfiler, Summaries
from deeplab2_like.trainer.trainer import NonFiniteError, Trainer, make_step_counter
from deeplab2_like.trainer.validation import Validation, read_evaluated_step


def train(
    config: Config,
    model_dir: str | os.PathLike[str],
    *,
    init_from: str | os.PathLike[str] | None = None,
    profile: int = 0,
) -> PanopticSystem:
    """Trains the system of a config, or resumes where an earlier run in the same model folder ended.

    On SIGINT (Ctrl-C), SIGTERM and SIGHUP it finishes the step, saves a checkpoint, says how to resume and ends the
    process with the exit status 128 + the number of the signal, as a shell reports a process that the signal has
    ended. A signal that was ignored before stays ignored. An evaluation that was cut short is made up for at the next
    start.

    Args:
        config: What to train, on which records, how long.
        model_dir: Folder for checkpoints, config and TensorBoard events, of one training at a time; made if missing.
            Several workers need to see the same folder.
        init_from: A model folder, or a checkpoint's path without ending, to start from with all weights that fit by
            name and shape; without effect when resuming.
        profile: Number of steps to record with TensorFlow's profiler, some steps after the start.

    Returns:
        The trained system, with the averaged weights if `trainer.ema_decay` is set.

    Raises:
        UserError: If the records, the config and the model folder do not fit together, another training runs in the
            folder, a loss is not finite, the memory does not suffice, or another worker is lost.
        SystemExit: After one of these signals.
    """
    # Early, as several workers must find each other before TensorFlow computes anything.
    strategy = make_strategy(config.trainer.strategy, tpu=config.trainer.tpu)
    if not is_chief(strategy):
        return _train(config, model_dir, strategy, init_from=init_from, profile=profile)
    with run_lock(model_dir):
        clean_model_folder(model_dir)
        return _train(config, model_dir, strategy, init_from=init_from, profile=profile)


def _train(
    config: Config,
    model_dir: str | os.PathLike[str],
    strategy: tf.distribute.Strategy,
    *,
    init_from: str | os.PathLike[str] | None,
    profile: int,
) -> PanopticSystem:
    """The rest of `train`, with the model folder locked by the chief."""
    settings = config.trainer
    dataset_info = DatasetInfo.load(config.data.record_folder)
    files = list_shards(config.data.record_folder, config.data.train_split)
    validation_files = _list_validation_files(config)
    check_model_folder(model_dir, config, dataset_info)
    _check_batch_size(settings.batch_size, strategy.num_replicas_in_sync)
    # Before the workers meet: after that, the chief may write it while others still read.
    evaluated_step = read_evaluated_step(model_dir, config.data.val_split)

    state = _make_state(config, dataset_info, strategy)
    system, step = state.system, state.step
    _restore_or_initialize(state, config, strategy, model_dir, init_from)
    start_step = int(step)
    is_evaluation_missing = _is_evaluation_due(config, start_step) and evaluated_step != start_step
    if start_step >= settings.steps:
        print(f"Model folder '{model_dir}' is already trained to step {start_step}.")
        if is_evaluation_missing and is_chief(strategy):
            _evaluate_finished(config, state, strategy, validation_files, model_dir)
        _use_average(state)
        return system

    dataset = _distribute_batches(config, files, system, strategy, start_step=start_step)
    stopped_by: signal.Signals | None = None
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
        profiler = stack.enter_context(StepProfiler(events_dir, profile, steps_left=settings.steps - start_step))
        stop = stack.enter_context(StopSignal(strategy))
        progress = TrainingProgress(start_step=start_step, steps=settings.steps, is_shown=is_chief(strategy))
        validation = None
        if is_chief(strategy) and validation_files:
            validation = _make_validation(config, state, validation_files, model_dir, stop)

        def after_step() -> None:
            progress.advance()
            profiler.advance()
            if int(step) < settings.steps:
                stop.raise_if_any(stop.noted)

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
            reports_after=lambda now: now % settings.log_every == 0 or now >= settings.steps,
        )

        # What is done at the end of a loop, in this order, with the values that the trainer reports if any are due.
        def save(values: Mapping[str, Any]) -> None:
            # Before anything that takes long; an evaluated step is always one that can be resumed from.
            is_certain = _is_evaluation_due(config, int(step)) or int(step) >= settings.steps
            manager.save(int(step), check_interval=not is_certain)

        def report(values: Mapping[str, Any]) -> None:
            if values:
                progress.report(values)
                summaries.numbers(values, step=int(step))

        def draw(values: Mapping[str, Any]) -> None:
            if validation is not None and _are_pictures_due(config, int(step)):
                summaries.pictures(validation.draw(), step=int(step))

        def evaluate(values: Mapping[str, Any]) -> None:
            if not _is_evaluation_due(config, int(step)):
                return
            cut_short_by = None
            if validation is not None:
                found = validation.evaluate_and_keep(int(step))
                if found is None:
                    cut_short_by = stop.noted
                else:
                    progress.note(f"step {int(step)}/{settings.steps}  {found}")
            stop.raise_if_any(cut_short_by)

        intervals = [settings.log_every, settings.checkpoint_every, settings.pictures_every, settings.evaluate_every]
        user_errors = report_bad_records([*files, *validation_files])
        with progress, _quiet(), user_errors, _clear_errors(config, model_dir, files, system, strategy):
            controller = orbit.Controller(
                trainer=trainer,
                strategy=strategy,
                global_step=step,
                # A loop ends wherever something is due, also if the first one starts in between.
                steps_per_loop=lambda now: min(every - int(now) % every for every in intervals if every),
                checkpoint_manager=manager,
                train_actions=[save, report, draw, evaluate],
            )
            try:
                if is_evaluation_missing:
                    evaluate({})
                controller.train(settings.steps)
            except StopTraining as request:
                stopped_by = request.signal
                trainer.check_values()
                if int(step) > start_step:
                    manager.save(int(step), check_interval=False)
    if stopped_by is not None:
        _exit_stopped(stopped_by, int(step), settings.steps, model_dir)
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
    config: Config,
    strategy: tf.distribute.Strategy,
    model_dir: str | os.PathLike[str],
    init_from: str | os.PathLike[str] | None,
) -> None:
    """Restores the newest whole checkpoint of the model folder, or else takes from another training what fits."""
    with strategy.scope():
        if paths := list_checkpoints(model_dir):
            _check_changes(state.system, config, Path(model_dir))
            restore(state.checkpoint, newest_whole_checkpoint(paths))
            if init_from is not None:
                print(f"Resuming from step {int(state.step)} of '{model_dir}'; '{init_from}' is not used.")
        elif init_from is not None:
            load_what_fits(state.system, init_from)
            if state.average is not None:
                state.average.copy_from_system()
        elif frozen := [part for part, factor in config.trainer.optimizer.multipliers.items() if factor == 0]:
            print(
                f"Warning: trainer.optimizer.multipliers freezes {', '.join(frozen)} with random weights; give "
                "trained ones with --init-from.",
                file=sys.stderr,
            )


def _check_changes(system: PanopticSystem, config: Config, folder: Path) -> None:
    """Refuses changes of the trainer's config that need variables which the checkpoints of a folder do not have.

    Raises:
        UserError: If there is one.
    """
    if not (folder / CONFIG_FILE).is_file():
        return
    before, now = load_config(folder / CONFIG_FILE).trainer, config.trainer
    factors_before = learning_rate_multipliers(system, before.optimizer.multipliers)
    factors = learning_rate_multipliers(system, now.optimizer.multipliers)
    refused = {
        "optimizer.name": before.optimizer.name != now.optimizer.name,
        "optimizer.momentum": now.optimizer.name == "sgd" and not before.optimizer.momentum and now.optimizer.momentum,
        "optimizer.multipliers": any(factors[path] and not factors_before[path] for path in factors),
        "ema_decay": before.ema_decay is None and now.ema_decay is not None,
        "precision": before.precision != "mixed_float16" and now.precision == "mixed_float16",
    }
    for key, is_refused in refused.items():
        if is_refused:
            values = [functools.reduce(getattr, key.split("."), settings) for settings in (before, now)]
            raise UserError(
                f"Model folder '{folder}' holds a run with trainer.{key} {values[0]!r}, whose checkpoints lack what "
                f"{values[1]!r} needs; set that key back, or use another --model-dir with --init-from '{folder}'."
            )


def _use_average(state: _State) -> None:
    if state.average is not None:
        state.average.copy_to_system()


def _exit_stopped(stopped_by: signal.Signals, step: int, steps: int, model_dir: str | os.PathLike[str]) -> NoReturn:
    """Ends the process after a signal."""
    print(
        f"Stopped by {stopped_by.name} after step {step} of {steps}, which is saved; run the same command again to "
        f"resume from '{model_dir}'.",
        file=LenientOutput(sys.stdout),
        flush=True,
    )
    raise SystemExit(exit_status(stopped_by))


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
        return list_shards(config.data.record_folder, config.data.val_split)
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
        config=config.data,
        make_targets=make_targets if with_label else system.make_targets,
        dataset_info=system.dataset_info,
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


def _is_evaluation_due(config: Config, step: int) -> bool:
    every = config.trainer.evaluate_every
    return every is not None and step > 0 and (step % every == 0 or step >= config.trainer.steps)


def _are_pictures_due(config: Config, step: int) -> bool:
    every = config.trainer.pictures_every
    return every is not None and (step % every == 0 or step == config.trainer.log_every)


def _make_validation(
    config: Config, state: _State, files: Sequence[str], model_dir: str | os.PathLike[str], stop: StopSignal
) -> Validation:
    return Validation(
        state.system,
        files,
        average=state.average,
        model_dir=model_dir,
        split=config.data.val_split,
        is_stopped=lambda: stop.noted is not None,
    )


def _evaluate_finished(
    config: Config,
    state: _State,
    strategy: tf.distribute.Strategy,
    files: Sequence[str],
    model_dir: str | os.PathLike[str],
) -> None:
    """Makes up for the evaluation after the last step; to be called by the chief alone."""
    step, steps = int(state.step), config.trainer.steps
    with StopSignal(strategy) as stop, report_bad_records(files):
        found = _make_validation(config, state, files, model_dir, stop).evaluate_and_keep(step)
    if stop.noted is not None and found is None:
        _exit_stopped(stop.noted, step, steps, model_dir)
    print(f"step {step}/{steps}  {found}")


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
        try:
            batches = _make_batches(
                config,
                files,
                system,
                with_label=True,
                batch_size=settings.batch_size * settings.accumulate_steps,
                start_step=error.step - 1,
            )
            batch = next(iter(batches))
        except (UserError, tf.errors.OpError, StopIteration):  # The records have changed, say; the loss matters more.
            batch = None
        folder = Path(model_dir) / f"non_finite_step_{error.step}" if is_chief(strategy) else None
        has_checkpoint = bool(list_checkpoints(model_dir))
        raise failures.non_finite(error, batch, folder, has_checkpoint=has_checkpoint) from None
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
