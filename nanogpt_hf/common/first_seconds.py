"""Ctrl-C while a recipe still imports its libraries, which takes seconds: answered in a sentence, as it is later.

Imported before them. Nothing has been written yet, so that the process may end at once: an exception would pass through
code of others, which shows it, or takes it for an error of the import.
"""

import os
import signal
import sys
import threading
from pathlib import Path

from .recipes import recipes


def _end(number: int, frame: object) -> None:
    os.write(2, b"error: interrupted.\n")
    os._exit(128 + number)


def answer_interrupts() -> None:
    """From now on, if this process is a recipe's and Ctrl-C has no other meaning in it."""
    script = Path(getattr(sys.modules.get("__main__"), "__file__", None) or sys.argv[0] or ".").resolve()
    ours = (*recipes().values(), Path(__file__).parents[1] / "__main__.py")
    is_ours = script in [path.resolve() for path in ours] or script.stem == "nanogpt"
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_ours and usual and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _end)


def leave_interrupts() -> None:
    """From now on it is KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
