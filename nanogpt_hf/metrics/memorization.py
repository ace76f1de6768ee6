"""Memorization: what of a language model's samples is copied verbatim from its training text."""

from typing import Any

import datasets
import evaluate
import numpy as np
from pydivsufsort import divsufsort, kasai

_CITATION = (
    "Lee et al. 2022, Deduplicating Training Data Makes Language Models Better, ACL, arXiv:2107.06499; "
    "Manber and Myers 1993, Suffix Arrays: A New Method for On-Line String Searches, SIAM J. Comput. 22(5); "
    "Kasai et al. 2001, Linear-Time Longest-Common-Prefix Computation in Suffix Arrays, CPM"
)


class Memorization(evaluate.Metric):
    """The longest verbatim overlap of samples with the training text, and how much of them occurs in it.

    predictions: sampled texts. references: training texts, as many as there are. window: characters.
    Returns a dict, with lengths and offsets in characters (code points):
        longest_overlap: length of the longest stretch of one sample that occurs in one reference, or 0
        longest_overlap_text: that stretch; the earliest one in the samples if several are as long
        sample_index, sample_offset: where it is first in the samples, None if there is none
        reference_index, reference_offset: where it is first in the references, None if there is none
        memorized_share: share of the samples' windows of `window` characters that occur in a reference (after
            Lee et al. 2022, who count tokens); 0.0 where no sample is that long
    Raises ValueError if the references hold no text, window < 1, or a text comes bare and not in a list.

    Exact, by a suffix array of samples and references together (Manber and Myers 1993) and its longest common
    prefixes (Kasai et al. 2001), in O(N log N) time and about 50 bytes of memory a character.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation=_CITATION,
            inputs_description=self.__doc__,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def compute(
        self,
        *,
        predictions: list[str] | None = None,
        references: list[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Compare all predictions with all references, which evaluate's own compute would pair one to one."""
        if isinstance(predictions, str) or isinstance(references, str):
            raise ValueError("predictions and references are lists of texts; put a single text into a list")
        references = [] if references is None else list(references)
        return super().compute(predictions=predictions, training_texts=references, **kwargs)

    def _compute(self, predictions: list[str], training_texts: list[str], window: int = 20) -> dict[str, Any]:
        if not any(training_texts):
            raise ValueError("references hold no text; pass the texts that the model was trained on")
        if window < 1:
            raise ValueError(f"window is {window}; it must be at least 1 character")

        texts = [*predictions, *training_texts]
        lengths = np.array([len(text) for text in texts])
        points = np.frombuffer("".join(texts).encode("utf-32-le"), "<u4") + np.uint32(1)
        points = np.insert(points, np.cumsum(lengths), 0)  # 0 ends every text
        ends = np.flatnonzero(points == 0)
        room = np.repeat(ends, lengths + 1) - np.arange(len(points))  # characters left in the same text

        suffixes = divsufsort(points)
        # How many characters each suffix shares with the next one in order, the ends of texts excluded.
        common = np.minimum(kasai(points, suffixes), room[suffixes])[:-1]
        sampled = suffixes < (lengths[: len(predictions)] + 1).sum()

        def occurring(length: int) -> Any:
            """Positions in the samples whose next `length` characters occur in a reference."""
            # Suffixes of one group begin with the same `length` characters.
            group = np.concatenate([[0], np.cumsum(common < length)])
            in_reference = np.zeros(group[-1] + 1, dtype=bool)
            in_reference[group[~sampled]] = True
            return suffixes[sampled & in_reference[group]]

        n_windows = sum(max(len(sample) - window + 1, 0) for sample in predictions)
        longest = int(common.max(where=sampled[:-1] != sampled[1:], initial=0))
        quote, sample, sample_offset, reference, reference_offset = "", None, None, None, None
        if longest:
            start = occurring(longest).min()
            sample = int(np.searchsorted(ends, start))
            sample_offset = int(start - ends[sample] + lengths[sample])
            quote = predictions[sample][sample_offset : sample_offset + longest]
            reference = next(index for index, text in enumerate(training_texts) if quote in text)
            reference_offset = training_texts[reference].find(quote)
        return {
            "longest_overlap": longest,
            "longest_overlap_text": quote,
            "sample_index": sample,
            "sample_offset": sample_offset,
            "reference_index": reference,
            "reference_offset": reference_offset,
            "memorized_share": len(occurring(window)) / n_windows if n_windows else 0.0,
        }
