"""The bar of a run: how far it is, how long it will still take with its evaluations, and what it does just now."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


class ProgressBar(tqdm):
    """A bar of steps whose time left counts the evaluations to come.

    tqdm's own goes by the pace between two updates, which an evaluation distorts and which knows nothing of the next.

    Args:
        steps: of the run; `done` of them are behind it.
        eval_steps: steps between two evaluations; the last step has one too.
        shown: whether there is a terminal to draw on.
    """

    def __init__(self, steps: int, done: int, eval_steps: int, shown: bool):
        self.eval_steps, self.step_s, self.evaluation_s = eval_steps, 0.0, 0.0
        self.news, self.validating = "", False
        super().__init__(
            total=steps,
            initial=done,
            disable=not (shown and sys.stderr.isatty()),
            unit="step",
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar}| {n}/{total} [{elapsed}<{left}{postfix}]",
        )

    def seconds_left(self) -> float | None:
        """For the steps and evaluations to come at the pace of the last ones; None while no pace is known."""
        if not self.step_s:
            return None
        steps, every = int(self.total or 0), self.eval_steps
        evaluations = steps // every - int(self.n) // every + (steps % every > 0 and self.n < steps)
        return (steps - self.n) * self.step_s + (evaluations + self.validating) * self.evaluation_s

    @property
    def format_dict(self) -> dict[str, Any]:
        left = self.seconds_left()
        return {
            **super().format_dict,
            "left": "?" if left is None else self.format_interval(left),
        }

    def tell(self, news: str) -> None:
        """What to show behind the times, from the next update on."""
        self.news = news
        self.set_postfix_str(news, refresh=False)

    @contextmanager
    def while_validating(self) -> Iterator[None]:
        """The bar says so at once, and notes how long it takes."""
        began, self.validating = time.perf_counter(), True
        self.set_postfix_str(", ".join(filter(None, (self.news, "validating"))))
        try:
            yield
        finally:
            self.validating, self.evaluation_s = False, time.perf_counter() - began
            self.set_postfix_str(self.news, refresh=False)
