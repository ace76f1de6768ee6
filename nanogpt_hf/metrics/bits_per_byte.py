"""Bits per byte: what a language model needs on average to encode one UTF-8 byte of text."""

import math

import datasets
import evaluate

_CITATION = "Gao et al. 2020, The Pile: An 800GB Dataset of Diverse Text, arXiv:2101.00027"


class BitsPerByte(evaluate.Metric):
    """Nats / ln 2 / UTF-8 bytes, over all texts together: comparable across tokenizers (Gao et al. 2020).

    predictions: summed negative log-likelihood in nats of each document or window.
    references: the text that each of them covers. Only the totals count, not where the text is cut.
    Returns {"bits_per_byte": float}. Raises ValueError if the lengths differ or the references hold no text.
    """

    def _info(self) -> evaluate.MetricInfo:
        columns = {"predictions": datasets.Value("float64"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=__doc__,
            citation=_CITATION,
            inputs_description=self.__doc__,
            features=datasets.Features(columns),
        )

    def _compute(self, predictions: list[float], references: list[str]) -> dict[str, float]:
        n_bytes = sum(len(text.encode("utf-8")) for text in references)
        if n_bytes == 0:
            raise ValueError("references hold no text; pass the texts whose nats the predictions are")
        return {"bits_per_byte": math.fsum(predictions) / math.log(2) / n_bytes}
