"""Training from start to end: reads from top to bottom, for any system and any `tf.distribute` strategy."""

import contextlib
import os

import orbit

from deeplab2_like.checkpoint_files import find_initial_checkpoint, list_checkpoints
from deeplab2_like.configs import Config
from deeplab2_like.model import PanopticSystem
from deeplab2_like.model_folder import clean_model_folder
from deeplab2_like.trainer.actions import TrainingActions, make_validation
from deeplab2_like.trainer.batches import distribute_batches
from deeplab2_like.trainer.guards import orbit_silenced, training_guards
from deeplab2_like.trainer.run import Run, make_run, restore_or_initialize
from deeplab2_like.trainer.run_lock import run_lock
from deeplab2_like.trainer.stopping import StopTraining
from deeplab2_like.trainer.strategy import is_chief, make_strategy
from deeplab2_like.trainer.trainer import Trainer
from deeplab2_like.trainer.validation import read_evaluated_step


def train(
    config: Config,
    model_dir: str | os.PathLike[str],
    *,
    init_from: str | os.PathLike[str] | None = None,
    profile: int = 0,
) -> PanopticSystem:
    """Trains the system of a config, or resumes where an earlier run in the same model folder ended.

    On SIGINT (Ctrl-C), SIGTERM and SIGHUP it finishes the step, saves a checkpoint, prints how to resume and exits with
    status 128 + the number of the signal, as shells do. A signal that was ignored before stays ignored. An evaluation
    that was interrupted runs again at the next start.

    Args:
        config: What to train, on which records, how long.
        model_dir: Folder for checkpoints, config and TensorBoard events, of one training at a time; made if missing.
            Several workers need to see the same folder.
        init_from: A model folder, or a checkpoint's path without ending, to start from with all weights that fit by
            name and shape; or a file with the weights of the backbone. It takes the place of `model.backbone.weights`,
            and has no effect when resuming.
        profile: Number of steps to record with TensorFlow's profiler, after the first few steps.

    Returns:
        The trained system, with the averaged weights if `trainer.ema_decay` is set.

    Raises:
        UserError: If the records, the config and the model folder do not fit together, another training runs in the
            folder, a loss is not finite, the memory does not suffice, or another worker is lost.
        SystemExit: After one of these signals.
    """
    # Several workers must find each other before TensorFlow computes anything.
    strategy = make_strategy(config.trainer.strategy, tpu=config.trainer.tpu)
    with run_lock(model_dir) if is_chief(strategy) else contextlib.nullcontext():
        if is_chief(strategy):
            clean_model_folder(model_dir)
        # Read before the workers synchronize: later the chief may write it while others still read.
        evaluated_step = read_evaluated_step(model_dir, config.data.val_split)
        if init_from is not None and not list_checkpoints(model_dir):
            init_from = find_initial_checkpoint(init_from)  # Before the network is built, so that an error comes early.
        run = make_run(config, model_dir, strategy)
        restore_or_initialize(run, init_from)
        is_evaluation_missing = run.is_evaluation_due and evaluated_step != int(run.step)
        if run.is_finished:
            print(f"Model folder '{model_dir}' is already trained to step {int(run.step)}.")
            if is_evaluation_missing and run.is_chief:
                _evaluate_finished(run)
        else:
            _run_steps(run, profile=profile, evaluate_first=is_evaluation_missing)
        run.use_average()
        return run.system


def _run_steps(run: Run, *, profile: int, evaluate_first: bool) -> None:
    """Runs the steps that are left; `evaluate_first` catches up on an evaluation that was interrupted."""
    dataset = distribute_batches(run, start_step=int(run.step))
    with training_guards(run) as stop, TrainingActions(run, stop, profile=profile) as actions, orbit_silenced():
        trainer = Trainer(
            dataset,
            run.config.trainer,
            system=run.system,
            optimizer=run.optimizer,
            strategy=run.strategy,
            average=run.average,
            step=run.step,
            after_step=actions.after_step,
            is_report_due=actions.is_report_due,
        )
        controller = orbit.Controller(
            trainer=trainer,
            strategy=run.strategy,
            global_step=run.step,
            # Each loop ends at the next step with an action, also the first one after a resume.
            steps_per_loop=actions.num_steps_of_loop,
            checkpoint_manager=actions.manager,
            train_actions=actions.actions,
        )
        try:
            if evaluate_first:
                actions.evaluate({})
            controller.train(run.config.trainer.steps)
        except StopTraining:
            trainer.check_values()
            actions.save_before_stop()
            raise


def _evaluate_finished(run: Run) -> None:
    """Catches up on the evaluation after the last step; only the chief calls it."""
    with training_guards(run) as stop:
        quality = make_validation(run, stop).evaluate_and_keep(int(run.step))
        if quality is None and stop.noted is not None:
            raise StopTraining(stop.noted)
    print(f"step {int(run.step)}/{run.config.trainer.steps}  {quality}")
