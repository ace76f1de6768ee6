"""The training loop: one function, from the first batch to the finished run folder."""

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..common.errors import UserError
from ..common.settings import RunSettings
from ..data.corpora import AnyCorpus
from .best_model import Show, find_repair, repair_best, replace_best, show_best, show_nothing
from .checkpoints import Progress, load_checkpoint, prune, save_checkpoint
from .commands import going_on
from .gpus import flops_per_token
from .hardware import settle
from .heartbeat import Heartbeat
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
    show: Show = show_nothing,
    base: Mapping[str, str] = MappingProxyType({}),
) -> Progress:
    """Train the model and leave a run folder with the best of it, by validation loss.

    Args:
        settings: resolved, so that they say what the run will do.
        corpus: what run.yaml says of the text.
        base: digests of the weights that an adapter is trained on, which must stay the same.
        show: writes card, loss curve and samples whenever the model at the top of the folder changes.

    Raises:
        UserError: settings, corpus, folder and hardware do not fit together, or the loss was not finite.
        SystemExit: 128 + the signal's number, after SIGTERM, SIGINT or SIGHUP, once a checkpoint is written.
    """
    rate_factor = make_schedule(settings)
    folder = Path(settings.folder())
    identity = identity_of(settings, corpus, tokenizer, model, objective.tokens_per_step, base)
    progress, checkpoint = find_start(accelerator, settings, identity)
    repair = find_repair(folder, checkpoint, progress) if checkpoint is not None else None

    flops, short_flops = (
        flops_per_token(model, context, objective.passes)
        for context in (settings.n_positions, objective.short.length)
    )
    model, *optimizers = accelerator.prepare(model, *make_optimizers(model, settings))
    optimizers = [optimizer.optimizer for optimizer in optimizers] if not settings.fp16 else optimizers
    if checkpoint is not None:
        load_checkpoint(model, optimizers, checkpoint)
        if accelerator.scaler is not None and progress.scaler:
            accelerator.scaler.load_state_dict(progress.scaler)
    accelerator.wait_for_everyone()  # nobody writes before everybody has looked
    if accelerator.is_main_process:
        say(accelerator, *open_run_folder(settings, corpus, tokenizer, identity, progress, checkpoint))
    accelerator.wait_for_everyone()
    take_step = Stepper(accelerator, settings, model, optimizers, objective, rate_factor, progress.step)
    log = RunLog(
        accelerator,
        settings,
        objective.tokens_per_step,
        progress,
        lambda step: short_flops if step <= objective.short.steps else flops,
    )
    if repair is not None and accelerator.is_main_process:
        say(accelerator, *repair_best(repair, progress, folder, show))

    def evaluate() -> dict[str, float]:
        with log.bar.while_validating():
            return evaluate_and_note(settings, model, objective, progress)

    def keep_best() -> None:
        log.sync(progress)
        replace_best(accelerator, model, tokenizer, progress, folder, show)
        log.restart_clock()

    def save() -> None:
        log.sync(progress)
        write_checkpoint(accelerator, settings, model, optimizers, tokenizer, progress)
        log.restart_clock()

    patience = settings.early_stopping_patience or float("inf")
    ended = progress.step >= settings.max_steps or progress.evaluations_since_best >= patience
    with Heartbeat(accelerator), Interruption(settings.max_minutes) as interruption:
        if settings.eval_on_start and progress.step == 0 or ended and progress.best_loss is None:
            log.write(progress.step, **evaluate())
            keep_best()
            if ended:
                save()
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
                measured |= objective.measured()
            if log_due or evaluation_due:
                log.write(step, **measured, **(evaluate() if evaluation_due else {}))
                ended |= progress.evaluations_since_best >= patience
            if progress.best_step == step or save_due and progress.best_step is None:
                keep_best()
            elif evaluation_due and accelerator.is_main_process:
                show_best(folder, show, last=False)  # the curve goes on, for who watches
                log.restart_clock()
            if save_due or ended:
                save()
            if interruption.signal:
                if accelerator.is_main_process:
                    show_best(folder, show)
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
            f"stopped at step {progress.step} with a checkpoint",
            f"go on with      {going_on(Path(settings.folder()))}",
        )
        sys.exit(128 + interruption.signal)
    if interruption.out_of_time:
        say(
            accelerator,
            f"--max_minutes {settings.max_minutes} passed at step {progress.step} of {settings.max_steps}",
            f"go on with      {going_on(Path(settings.folder()))} --max_minutes {2 * settings.max_minutes:g}",
        )


def evaluate_and_note(
    settings: RunSettings, model: nn.Module, objective: Objective, progress: Progress
) -> dict[str, float]:
    """Evaluate the whole validation split, and note in `progress` whether that was the best so far.

    Raises:
        UserError: the loss was not finite.
    """
    split = objective.evaluate(model)
    if not math.isfinite(split.loss):
        raise UserError(not_finite("validation loss", progress.step, settings.output_dir))
    note_evaluation(progress, split.loss)
    if progress.step <= objective.short.steps:  # it reads windows that training has not shown yet
        progress.evaluations_since_best = 0
    return {"eval_loss": split.loss, "eval_bits_per_char": split.bits_per_char, **split.more}


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
    newest = Path(settings.folder()) / "checkpoints" / f"step-{progress.step}"
    save_checkpoint(accelerator, model, optimizers, tokenizer, progress, newest)
    if accelerator.is_main_process:
        prune(newest, settings.save_total_limit)
