"""Signals and the clock, turned into decisions that every process takes at the same step.

Before and after training, Ctrl-C is answered by common/first_seconds.py and common/running.py.
"""

import os
import signal
import stat
import sys
import threading
from contextlib import suppress
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

from .reporting import nobody_reads

HANGUP = getattr(signal, "SIGHUP", None)  # the terminal was closed; Windows has neither this nor SIGUSR1
STOPPING = (signal.SIGTERM, signal.SIGINT, HANGUP)
CHECKPOINTING = getattr(signal, "SIGUSR1", None)
LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # set by accelerate launch and by torchrun


class Interruption:
    """A context in which SIGTERM, SIGINT and SIGHUP ask for a clean stop and SIGUSR1 for a checkpoint.

    A second SIGTERM or SIGINT ends the process at once. SIGHUP stays ignored where it was (nohup). The end of
    the launcher counts as a SIGTERM: accelerate launch (1.15.0) does not pass on the one that it gets, and its
    process would go on training, unseen.

    A signal that comes to one process is only noted until all processes `agree`: one that acted on it alone
    would leave the others waiting.

    Attributes:
        signal: the stopping signal that all know of, 0 before one has come.
        checkpoint: whether a checkpoint was asked for before the last `agree`.
        out_of_time: whether max_minutes had passed at the last `agree`.
    """

    def __init__(self, max_minutes: float | None):
        self.max_minutes = max_minutes
        self.signal, self.checkpoint, self.out_of_time = 0, False, False
        self._noted, self._wants_checkpoint = 0, False
        self._before: dict[int, Any] = {}
        self._launcher = os.getppid() if any(name in os.environ for name in LAUNCHERS) else None

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in (*STOPPING, CHECKPOINTING):
                if number is None or number == HANGUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == CHECKPOINTING:
            self._wants_checkpoint = True
        elif number == HANGUP:  # it may come twice, from the kernel and from the shell
            self._noted = self._noted or number
            for stream in (sys.stdout, sys.stderr):
                if stat.S_ISCHR(os.fstat(stream.fileno()).st_mode):  # the terminal, which is there no longer
                    nobody_reads(stream)
        elif self._noted:
            _answer(number, "ended at once; what was saved before is whole")
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        else:
            self._noted = number
            more = "" if self._launcher else "; Ctrl-C once more ends at once, without"
            _answer(number, f"stopping, with a checkpoint{more}")

    def agree(self, accelerator: Accelerator, elapsed_s: float) -> None:
        """Take the decisions of any process for all of them. One process decides without communication."""
        if self._launcher is not None and os.getppid() != self._launcher:
            self._noted = self._noted or signal.SIGTERM
        late = self.max_minutes is not None and elapsed_s > 60 * self.max_minutes
        flags = [int(self._noted), int(self._wants_checkpoint), int(late)]
        self._wants_checkpoint = False
        if accelerator.num_processes > 1:
            asked = accelerator.gather(torch.tensor([flags], device=accelerator.device))
            flags = asked.amax(dim=0).tolist()
        self.signal, self.checkpoint, self.out_of_time = flags[0], bool(flags[1]), bool(flags[2])


def _answer(number: int, words: str) -> None:
    """Tell who pressed Ctrl-C that it was heard, which an evaluation would keep from showing for long."""
    if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
        with suppress(OSError):  # nobody reads it
            os.write(2, f"\n{words}\n".encode())
