"""The training loop: one function, from the first batch to the finished run folder."""

import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from .checkpoints import (
    Progress,
    files_written_whole,
    load_checkpoint,
    prune,
    save_checkpoint,
    save_model,
)
from .corpora import Corpus
from .evaluation import evaluate_split, validation_stream
from .interruption import Interruption
from .optimization import make_optimizers, make_schedule, set_learning_rates
from .reporting import RunLog, not_finite, say
from .run_folder import find_start, identity_of, note_evaluation, open_run_folder
from .settings import TrainingSettings
from .token_stream import TokenStream, mix
from .tokenization import encode_documents


def train(
    accelerator: Accelerator,
    settings: TrainingSettings,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    model: PreTrainedModel,
) -> Progress:
    """Train the model on the corpus and leave a run folder with the best of it, by validation loss.

    Raises:
        ValueError: settings, corpus, folder and hardware do not fit together, or the loss was not finite.
        SystemExit: 128 + the signal's number, after SIGTERM or SIGINT, once a checkpoint is written.
    """
    T, folder = settings.n_positions or model.config.max_position_embeddings, Path(settings.output_dir)
    train_stream = TokenStream(encode_documents(tokenizer, corpus.train), T, accelerator.device)
    eval_stream = validation_stream(tokenizer, corpus, T, accelerator.device)
    micro_batch = settings.per_device_train_batch_size
    batch_size = micro_batch * settings.gradient_accumulation_steps * accelerator.num_processes
    rows = np.arange(accelerator.process_index, batch_size, accelerator.num_processes)
    rate_factor = make_schedule(settings)
    identity = identity_of(settings, corpus, tokenizer, model, tokens_per_step=batch_size * T)
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
    compile_model(accelerator, settings, model, train_stream)
    log = RunLog(accelerator, settings, batch_size * T, progress)

    def evaluate() -> dict[str, float]:
        split = evaluate_split(
            model, eval_stream, corpus.validation, settings.per_device_eval_batch_size, accelerator
        )
        if not math.isfinite(split.loss):
            raise ValueError(not_finite("validation loss", progress.step))
        if note_evaluation(progress, split.loss):
            save_best(accelerator, model, tokenizer, folder)
        return {"eval_loss": split.loss, "eval_bits_per_char": split.bits_per_char}

    patience = settings.early_stopping_patience or float("inf")
    ended = progress.step >= settings.max_steps or progress.evaluations_since_best >= patience
    with Interruption(settings.max_minutes) as interruption:
        if settings.eval_on_start and progress.step == 0 or ended and progress.best_loss is None:
            log.write(progress.step, **evaluate())
        model.train()
        while not ended:
            set_learning_rates(optimizers, rate_factor(progress.step))
            torch.manual_seed(step_seed(settings.seed, progress.step, accelerator.process_index))
            try:
                micro_batches = [
                    train_stream.batch(settings.seed, progress.step, batch_size, rows[i : i + micro_batch])
                    for i in range(0, len(rows), micro_batch)
                ]
                loss = accumulate_gradients(accelerator, model, micro_batches)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                micro_batch = smaller_batch(accelerator, settings, micro_batch)
                model.zero_grad()
                continue
            grad_norm = accelerator.clip_grad_norm_(
                model.parameters(), settings.max_grad_norm or float("inf")
            )
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()
            log.add(loss, grad_norm)

            progress.step = step = progress.step + 1
            if accelerator.num_processes == 1 or step % settings.logging_steps == 0:
                interruption.agree(accelerator, log.elapsed_s)
            ended = step == settings.max_steps or interruption.out_of_time
            evaluation_due = step % settings.eval_steps == 0 or ended
            stop_or_save = interruption.signal or interruption.checkpoint or step % settings.save_steps == 0
            if step % settings.logging_steps == 0 or evaluation_due or stop_or_save:
                measured = log.check(step) | {"learning_rate": settings.learning_rate * rate_factor(step - 1)}
            if step % settings.logging_steps == 0 or evaluation_due:
                log.write(step, **measured, **(evaluate() if evaluation_due else {}))
                ended |= progress.evaluations_since_best >= patience
            if stop_or_save or ended:
                progress.elapsed_s = log.elapsed_s
                progress.scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else {}
                log.sync()
                newest = folder / "checkpoints" / f"step-{step}"
                save_checkpoint(accelerator, model, optimizers, tokenizer, progress, newest)
                if accelerator.is_main_process:
                    prune(newest, settings.save_total_limit)
                log.restart_clock()
            if interruption.signal:
                log.close()
                say(
                    accelerator,
                    f"stopped at step {step} with a checkpoint; go on with --resume_from_checkpoint last",
                )
                sys.exit(128 + interruption.signal)
            if interruption.checkpoint:
                interruption.checkpoint = False
                say(accelerator, f"checkpoint at step {step}, as asked")
    if interruption.out_of_time:
        say(
            accelerator,
            f"--max_minutes {settings.max_minutes} passed at step {progress.step} of {settings.max_steps}",
        )
    log.close()
    return progress


def accumulate_gradients(
    accelerator: Accelerator,
    model: torch.nn.Module,
    micro_batches: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """Add up the gradients of the mean loss over all tokens of all micro-batches of all processes.

    Dividing by the global token count once is what makes the sum right for micro-batches of unequal length:
    a mean of means is not the mean.

    Args:
        micro_batches: inputs and next tokens, each B T; -100 is no token.

    Returns:
        This process's part of the loss in nats a token, on the device; the parts of all processes sum to it.
    """
    tokens = accelerator.reduce(sum((y != -100).sum() for _, y in micro_batches), reduction="sum")
    total = torch.zeros((), device=accelerator.device)
    for number, (x, y) in enumerate(micro_batches, start=1):
        last = number == len(micro_batches)
        with nullcontext() if last else accelerator.no_sync(model):
            loss = model(input_ids=x, shift_labels=y, num_items_in_batch=tokens, use_cache=False).loss
            accelerator.backward(loss * accelerator.num_processes)  # data parallelism averages over processes
        total += loss.detach()
    return total


def step_seed(seed: int, step: int, process_index: int) -> int:
    """Seed of the random numbers (dropout) of one step of one process; nothing of them needs to be stored."""
    return int(mix(mix(mix(seed) ^ np.uint64(step)) ^ np.uint64(process_index)) >> np.uint64(1))


def smaller_batch(accelerator: Accelerator, settings: TrainingSettings, micro_batch: int) -> int:
    """Half the micro-batch, which doubles the accumulation: the global batch and its mathematics stay.

    Raises:
        ValueError: --auto_find_batch_size is not set, or there is nothing left to halve.
    """
    if accelerator.num_processes > 1 or not settings.auto_find_batch_size or micro_batch == 1:
        raise ValueError(
            f"out of memory with {micro_batch} sequences at once: lower --per_device_train_batch_size and raise "
            "--gradient_accumulation_steps by as much, or try --gradient_checkpointing; on one device "
            "--auto_find_batch_size does it."
        )
    say(accelerator, f"out of memory with {micro_batch} sequences at once: going on with {micro_batch // 2}")
    return micro_batch // 2


def compile_model(
    accelerator: Accelerator, settings: TrainingSettings, model: torch.nn.Module, stream: TokenStream
) -> None:
    """Compile the model in place where it pays; where compiling fails, say so once and stay eager."""
    wanted = settings.torch_compile
    if not (accelerator.device.type == "cuda" if wanted is None else wanted):
        return
    module = accelerator.unwrap_model(model)
    batch = stream.batch(settings.seed, 0, settings.per_device_train_batch_size, slice(None))
    try:
        module.compile(backend=settings.torch_compile_backend)
        accumulate_gradients(accelerator, model, [batch])
    except Exception as error:
        module._compiled_call_impl = None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        say(accelerator, f"torch.compile failed ({reason[:160]}): training goes on without it")
    model.zero_grad()


def save_best(accelerator: Accelerator, model, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Replace the model at the top of the run folder."""
    if not accelerator.is_main_process:
        return save_model(accelerator, model, tokenizer, folder)
    with files_written_whole(folder) as staging:
        save_model(accelerator, model, tokenizer, staging)
