"""Perplexity per token and per character, from likelihoods that are already measured."""

import math

import datasets
import evaluate

_CITATION = (
    "Jelinek et al. 1977, Perplexity - a measure of the difficulty of speech recognition tasks, "
    "The Journal of the Acoustical Society of America 62(S1)"
)


class Perplexity(evaluate.Metric):
    """exp(nats / tokens) and exp(nats / characters), over all texts together (Jelinek et al. 1977).

    predictions: summed negative log-likelihood in nats of each document or window.
    references: the text that each of them covers. Only the totals count, not where the text is cut.
    token_counts: how many tokens each of those sums runs over.
    Returns {"perplexity": float, "perplexity_per_character": float}; the first compares only models with the
    same tokenizer. Raises ValueError if the lengths differ, or there is no text or no token.
    """

    def _info(self) -> evaluate.MetricInfo:
        columns = {
            "predictions": datasets.Value("float64"),
            "references": datasets.Value("string"),
            "token_counts": datasets.Value("int64"),
        }
        return evaluate.MetricInfo(
            description=__doc__,
            citation=_CITATION,
            inputs_description=self.__doc__,
            features=datasets.Features(columns),
        )

    def _compute(
        self, predictions: list[float], references: list[str], token_counts: list[int]
    ) -> dict[str, float]:
        nats, n_tokens, n_characters = math.fsum(predictions), sum(token_counts), sum(map(len, references))
        if n_characters == 0:
            raise ValueError("references hold no text; pass the texts whose nats the predictions are")
        if n_tokens < 1 or min(token_counts) < 0:
            raise ValueError("token_counts are negative or all 0; pass the tokens of each prediction")
        return {"perplexity": _exp(nats / n_tokens), "perplexity_per_character": _exp(nats / n_characters)}


def _exp(nats: float) -> float:
    # A diverged model has infinite perplexity; math.exp would raise OverflowError.
    return math.inf if nats > 709 else math.exp(nats)
