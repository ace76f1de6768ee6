"""The training loop: one function, from the first batch to the finished run folder."""

import math
import sys
from pathlib import Path

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..common.errors import UserError
from ..common.files import files_written_whole
from ..common.settings import RunSettings
from ..data.corpora import AnyCorpus
from .checkpoints import Progress, load_checkpoint, prune, save_checkpoint, save_model
from .hardware import settle
from .interruption import Interruption
from .objectives import Objective
from .optimization import learning_rates, make_optimizers, make_schedule
from .reporting import RunLog, not_finite, say
from .run_folder import find_start, identity_of, note_evaluation, open_run_folder
from .stepping import Stepper


def train(
    accelerator: Accelerator,
    settings: RunSettings,
    corpus: AnyCorpus,
    tokenizer: PreTrainedTokenizerFast,
    model: PreTrainedModel,
    objective: Objective,
) -> Progress:
    """Train the model and leave a run folder with the best of it, by validation loss.

    Args:
        settings: resolved, so that they say what the run will do.
        corpus: what run.yaml says of the text.

    Raises:
        UserError: settings, corpus, folder and hardware do not fit together, or the loss was not finite.
        SystemExit: 128 + the signal's number, after SIGTERM or SIGINT, once a checkpoint is written.
    """
    rate_factor = make_schedule(settings)
    identity = identity_of(settings, corpus, tokenizer, model, objective.tokens_per_step)
    progress, checkpoint = find_start(accelerator, settings, identity)

    model, *optimizers = accelerator.prepare(model, *make_optimizers(model, settings))
    optimizers = [optimizer.optimizer for optimizer in optimizers] if not settings.fp16 else optimizers
    if checkpoint is not None:
        load_checkpoint(model, optimizers, checkpoint)
        if accelerator.scaler is not None and progress.scaler:
            accelerator.scaler.load_state_dict(progress.scaler)
    accelerator.wait_for_everyone()  # nobody writes before everybody has looked
    if accelerator.is_main_process:
        open_run_folder(settings, corpus, tokenizer, identity, fresh=checkpoint is None)
    accelerator.wait_for_everyone()
    take_step = Stepper(accelerator, settings, model, optimizers, objective, rate_factor)
    log = RunLog(accelerator, settings, objective.tokens_per_step, progress)

    def evaluate() -> dict[str, float]:
        return keep_if_best(accelerator, settings, tokenizer, model, objective, progress)

    patience = settings.early_stopping_patience or float("inf")
    ended = progress.step >= settings.max_steps or progress.evaluations_since_best >= patience
    with Interruption(settings.max_minutes) as interruption:
        if settings.eval_on_start and progress.step == 0 or ended and progress.best_loss is None:
            log.write(progress.step, **evaluate())
        model.train()
        while not ended:
            log.add(*take_step(progress.step))

            progress.step = step = progress.step + 1
            log_due = step % settings.logging_steps == 0
            if accelerator.num_processes == 1 or log_due:
                interruption.agree(accelerator, log.elapsed_s)
            ended = step == settings.max_steps or interruption.out_of_time
            evaluation_due = step % settings.eval_steps == 0 or ended
            save_due = step % settings.save_steps == 0 or interruption.signal or interruption.checkpoint
            measured = {}
            if log_due or evaluation_due or save_due:
                measured = log.check(step) | learning_rates(settings, rate_factor(step - 1))
            if log_due or evaluation_due:
                log.write(step, **measured, **(evaluate() if evaluation_due else {}))
                ended |= progress.evaluations_since_best >= patience
            if save_due or ended:
                progress.elapsed_s = log.elapsed_s
                log.sync()
                write_checkpoint(accelerator, settings, model, optimizers, tokenizer, progress)
                log.restart_clock()
            if interruption.signal:
                break
            if interruption.checkpoint:
                interruption.checkpoint = False
                say(accelerator, f"checkpoint at step {step}, as asked")
    take_step.release()
    settle(accelerator)
    log.close()
    say_how_it_ended(accelerator, settings, progress, interruption)
    return progress


def say_how_it_ended(
    accelerator: Accelerator, settings: RunSettings, progress: Progress, interruption: Interruption
) -> None:
    """What stopped the run before its last step, if anything did.

    Raises:
        SystemExit: 128 + the signal's number.
    """
    if interruption.signal:
        say(
            accelerator,
            f"stopped at step {progress.step} with a checkpoint; go on with --resume_from_checkpoint last",
        )
        sys.exit(128 + interruption.signal)
    if interruption.out_of_time:
        say(
            accelerator,
            f"--max_minutes {settings.max_minutes} passed at step {progress.step} of {settings.max_steps}",
        )


def keep_if_best(
    accelerator: Accelerator,
    settings: RunSettings,
    tokenizer: PreTrainedTokenizerFast,
    model: nn.Module,
    objective: Objective,
    progress: Progress,
) -> dict[str, float]:
    """Evaluate the whole validation split; the best model so far goes to the top of the run folder.

    Raises:
        UserError: the loss was not finite.
    """
    split = objective.evaluate(model)
    if not math.isfinite(split.loss):
        raise UserError(not_finite("validation loss", progress.step))
    if note_evaluation(progress, split.loss):
        save_best(accelerator, model, tokenizer, Path(settings.output_dir))
    return {"eval_loss": split.loss, "eval_bits_per_char": split.bits_per_char}


def write_checkpoint(
    accelerator: Accelerator,
    settings: RunSettings,
    model: nn.Module,
    optimizers: list,
    tokenizer: PreTrainedTokenizerFast,
    progress: Progress,
) -> None:
    """A checkpoint of this step; of the older ones --save_total_limit decides what stays."""
    progress.scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else {}
    newest = Path(settings.output_dir) / "checkpoints" / f"step-{progress.step}"
    save_checkpoint(accelerator, model, optimizers, tokenizer, progress, newest)
    if accelerator.is_main_process:
        prune(newest, settings.save_total_limit)


def save_best(
    accelerator: Accelerator, model: nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Replace the model at the top of the run folder."""
    if not accelerator.is_main_process:
        return save_model(accelerator, model, tokenizer, folder)
    with files_written_whole(folder) as staging:
        save_model(accelerator, model, tokenizer, staging)
