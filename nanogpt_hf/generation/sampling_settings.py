"""The settings of sampling, for recipes, the prompt in a terminal and the page. Nothing here imports torch."""

import secrets
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from ..common.fields import Settings, setting

SEEDS = 2**32


@dataclass(frozen=True)
class SamplingSettings(Settings):
    """Sampling"""

    max_new_tokens: int = setting(500, "length of a text, in tokens", ge=1)
    temperature: float = setting(0.8, "0: always the likeliest token; 1: as the model has learned", ge=0)
    top_k: int | None = setting(None, "choose among the k likeliest tokens only", ge=1)
    top_p: float | None = setting(
        None, "choose among the likeliest tokens that hold this share of probability", ge=0, le=1
    )
    stop: list[str] = setting([], "end before the first of these strings")
    int8: bool = setting(False, "weights in 8 bits, on a CPU: large models write faster, and a little worse")
    seed: int | None = setting(
        None,
        "the same seed gives the same text on the same device; default: another each time",
        ge=0,
        lt=SEEDS,
    )

    def seeded(self) -> Self:
        """The same with a seed, drawn where there is none, so that the text can be had again."""
        return self if self.seed is not None else replace(self, seed=secrets.randbelow(SEEDS))

    def options(self) -> dict[str, Any]:
        """What `stream_text` takes of these settings, and of nothing that is added to them."""
        values = asdict(self)
        return {item.name: values[item.name] for item in fields(SamplingSettings)}
