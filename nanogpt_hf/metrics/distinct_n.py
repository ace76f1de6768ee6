"""Distinct-n: how varied generated text is, as the share of its n-grams that are distinct."""

from collections.abc import Iterable
from typing import Any

import datasets
import evaluate

_CITATION = (
    "Li et al. 2016, A Diversity-Promoting Objective Function for Neural Conversation Models, NAACL, "
    "arXiv:1510.03055"
)


def count_ngrams(texts: Iterable[str], n: int = 2, unit: str = "word") -> tuple[int, int]:
    """How many distinct n-grams texts hold together, and how many in all; no n-gram spans two texts."""
    distinct: set[tuple[str, ...]] = set()
    total = 0
    for text in texts:
        units = text.split() if unit == "word" else text
        distinct.update(zip(*(units[start:] for start in range(n)), strict=False))
        total += max(len(units) - n + 1, 0)
    return len(distinct), total


class DistinctN(evaluate.Metric):
    """Distinct n-grams / all n-grams, over all texts together; no n-gram spans two texts (Li et al. 2016).

    predictions: texts. It falls with their total length: compare samples of one size only.
    n: words or characters in an n-gram. unit: "word" (split at whitespace) or "character".
    Returns {"distinct_n": float} in (0, 1]. Li et al. divide by the number of words instead of n-grams.
    Raises ValueError if n < 1, the unit is unknown, no text is long enough for one n-gram, or a text comes
    bare and not in a list.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation=_CITATION,
            inputs_description=self.__doc__,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def compute(self, *, predictions: list[str] | None = None, **kwargs: Any) -> dict[str, float]:
        """Refuse a bare text, which evaluate would take for a list of one-character texts."""
        if isinstance(predictions, str):
            raise ValueError("predictions is a single text; put it into a list")
        return super().compute(predictions=predictions, **kwargs)

    def _compute(self, predictions: list[str], n: int = 2, unit: str = "word") -> dict[str, float]:
        if n < 1:
            raise ValueError(f"n is {n}; an n-gram has at least 1 {unit}")
        if unit not in ("word", "character"):
            raise ValueError(f"unit is {unit!r}; it must be 'word' or 'character'")
        distinct, total = count_ngrams(predictions, n, unit)
        if total == 0:
            raise ValueError(f"no text in predictions holds {n} {unit}s, so there is no {n}-gram to count")
        return {"distinct_n": distinct / total}
