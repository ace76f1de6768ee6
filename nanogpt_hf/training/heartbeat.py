"""A run of several processes ends soon after one of them has died or hangs.

NCCL waits for such a process, ten minutes by default; less would end those too that wait while the first one writes a
large checkpoint. The launcher sees only that a process has ended, and the others do not hear its SIGTERM while they wait.
"""

import os
import sys
import threading
from contextlib import suppress

from accelerate import Accelerator
from torch.distributed import DistError, TCPStore

BEAT_SECONDS = 1.0
PATIENCE = 20  # beats; the launcher kills, after 30 s, those who did not hear it


class Heartbeat:
    """A context in which this process ends, with a sentence, once another one has been silent for PATIENCE beats.

    Each process notes its beats in the store in which they have found each other, and goes on to the next beat when all
    have noted this one. It does so in a thread, whatever the process is at: evaluating, compiling or writing for long.
    Another thread counts, since a store whose own process is stopped never answers.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._silent, self._over = 0, threading.Event()
        work = [self._beat, self._count] if accelerator.num_processes > 1 else []
        self._threads = [threading.Thread(target=function, daemon=True) for function in work]

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None:
            self._accelerator.wait_for_everyone()  # who still works would miss this one's beats
        self._over.set()
        for thread in self._threads:
            thread.join(2 * BEAT_SECONDS)

    def _beat(self) -> None:
        rank, size = self._accelerator.process_index, self._accelerator.num_processes
        beat = 0
        with suppress(DistError):  # the store is gone
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = TCPStore(address, port, is_master=False, wait_for_workers=False)
            while not self._over.wait(BEAT_SECONDS):
                store.set(f"beat {beat} of {rank}", "")
                if store.check([f"beat {beat} of {other}" for other in range(size)]):
                    store.delete_key(f"beat {beat - 1} of {rank}")
                    beat += 1
                    self._silent = 0

    def _count(self) -> None:
        # Not by the clock: a run that is stopped as a whole (Ctrl-Z) and goes on has missed one beat.
        while not self._over.wait(BEAT_SECONDS):
            self._silent += 1
            if self._silent > PATIENCE:
                print(
                    f"error: another process of this run has been silent for {PATIENCE * BEAT_SECONDS:g} seconds, so this "
                    "one ends too; what was saved before this is whole.",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)
