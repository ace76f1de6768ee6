"""Bits per character: what a language model needs on average to encode one Unicode character of text."""

import math

import datasets
import evaluate

_CITATION = "Graves 2013, Generating Sequences With Recurrent Neural Networks, arXiv:1308.0850"


class BitsPerCharacter(evaluate.Metric):
    """Nats / ln 2 / code points, over all texts together: comparable across tokenizers (Graves 2013).

    predictions: summed negative log-likelihood in nats of each document or window.
    references: the text that each of them covers. Only the totals count, not where the text is cut.
    Returns {"bits_per_character": float}. Raises ValueError if the lengths differ or the references hold no
    text.
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
        n_characters = sum(map(len, references))
        if n_characters == 0:
            raise ValueError("references hold no text; pass the texts whose nats the predictions are")
        return {"bits_per_character": math.fsum(predictions) / math.log(2) / n_characters}
