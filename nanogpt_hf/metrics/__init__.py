"""Metrics for language models and their samples, each one a self-contained `evaluate` module.

`load("memorization")` here, or by path `evaluate.load("nanogpt_hf/metrics/memorization.py")`; neither needs a
network.
"""

import difflib
import pkgutil
from typing import Any


def load(name: str) -> Any:
    """The metric called `name`, an `evaluate.Metric` that keeps its inputs in memory.

    Nothing is written to the Hugging Face cache, which may be read-only; `evaluate.load` by path copies the
    module there. Raises ValueError, naming the nearest match, where no metric has that name.
    """
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0)[0]
        raise ValueError(f"unknown metric {name!r}: the nearest of {', '.join(names)} is {nearest!r}")

    # Here and not above: evaluate and what it imports take a second or more.
    import tempfile

    from evaluate.loading import import_main_class

    # evaluate insists on making a folder, which a metric in memory then never uses.
    with tempfile.TemporaryDirectory() as folder:
        return import_main_class(f"{__name__}.{name}")(cache_dir=folder, keep_in_memory=True)
