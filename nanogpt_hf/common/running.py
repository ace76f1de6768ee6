"""How a recipe runs: what it says, and how it answers what goes wrong, without torch or transformers before it needs them."""

import errno
import os
import sys
from collections.abc import Callable
from io import TextIOWrapper

import wrapt

from .errors import UserError
from .first_seconds import leave_interrupts
from .text import printable, without_token


def tell(*lines: str) -> None:
    """Print what a recipe has to say; names in it come from files and folders of anybody's."""
    print(*map(printable, lines), sep="\n", flush=True)


def run_recipe(main: Callable[[], object]) -> None:
    """Run a recipe's main: a user's mistake ends in one sentence and exit status 2, a failure around it in 1.

    A bug keeps its traceback; NANOGPT_HF_DEBUG=1 shows it for the others too.
    """
    leave_interrupts()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a model's Cyrillic prints under any locale
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    wrapt.when_imported("transformers.utils.logging")(lambda logging: logging.disable_progress_bar())
    try:
        main()
    except (UserError, OSError, MemoryError, RuntimeError, KeyboardInterrupt) as error:
        lost = _is_lost_process(error)
        message, status = _answer(error, lost)
        if message is None or os.environ.get("NANOGPT_HF_DEBUG") == "1":
            raise
        if lost or os.environ.get("RANK", "0") == "0":
            print(f"error: {printable(without_token(message))}", file=sys.stderr)
        sys.exit(status)


def _is_lost_process(error: BaseException) -> bool:
    """Whether a collective failed, which it does in all processes once one of them has ended."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or isinstance(error, UserError):
        return False
    import torch

    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def _answer(error: BaseException, lost: bool) -> tuple[str | None, int]:
    """What to say to an error and the exit status; nothing to say to one that is ours."""
    whole = "what was saved before this is whole"
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, KeyboardInterrupt):
        return "interrupted.", 130
    if lost:
        return f"another process of this run has ended, so this one ends too; {whole}.", 1
    if isinstance(error, BrokenPipeError):
        _close_stdout()
        return f"what read the output has ended before it was all written; {whole}.", 141
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.strerror}: make room, and run the same again; {whole}.", 1
    if isinstance(error, OSError):
        return f"{error}; {whole}.", 1
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, MemoryError) or should_reduce_batch_size(error):
        return (
            "out of memory: lower --per_device_train_batch_size (and raise --gradient_accumulation_steps by as much), "
            f"or --per_device_eval_batch_size if it came in evaluation; {whole}.",
            1,
        )
    return None, 1


def _close_stdout() -> None:
    """Nobody reads it any more; Python would complain of that again when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
