"""What the interpreter that all processes of the tests are forked from does once: it imports everything, and has a run.

The first run of a process takes half as long again as its second.
"""

import gc
import io
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch.nn.parallel  # noqa: F401
from accelerate.state import AcceleratorState
from processes import run_here, training_words, write_corpus
from tqdm import tqdm

with (
    tempfile.TemporaryDirectory() as folder,
    redirect_stdout(io.StringIO()),
    redirect_stderr(io.StringIO()) as said,
):
    interval, tqdm.monitor_interval = tqdm.monitor_interval, 0  # of its threads, which would not be forked
    corpus = write_corpus(Path(folder))
    words = training_words(Path(folder) / "run", corpus, "--max_steps", "2")
    assert run_here("pretrain_char.py", *words) == 0, said.getvalue()
    tqdm.monitor_interval = interval
AcceleratorState._reset_state(reset_partial_state=True)
gc.collect()
gc.freeze()  # or each process would go through all of it, and copy it, for its own little garbage
