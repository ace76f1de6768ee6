"""Compare models on what is held out of a corpus, or all of it, in units that do not depend on the tokenizer; or all runs.

    python recipes/compare.py runs/*                                          # what the runs have recorded
    python recipes/compare.py --model runs/tiny_shakespeare-char runs/tiny_shakespeare-bpe
    python recipes/compare.py --model runs/tiny_shakespeare-bpe openai-community/gpt2 --stride 32 --samples 8
    python recipes/compare.py --model runs/my_adapter --corpus my_text.txt --output_dir runs/comparison
    python recipes/compare.py --model runs/tiny_pushkin-char runs/tiny_pushkin-verse --corpus tiny_pushkin --verse onegin
    accelerate launch --multi_gpu recipes/compare.py --model runs/gpt2 --corpus my_text.txt

Run folders alone give a table of them, sorted by validation loss, with the settings in which they differ. A --model is
a run folder, any causal language model's folder, a peft adapter or a Hub id, each with its own tokenizer, and is measured
anew. The first token is predicted too, from the end-of-text token, as lm-eval does: every byte is paid for. --output_dir
gets the table (results.md), the same and more as results.json, and surprisal.html: a page that colours each character by
what it costs the models. --verse has them write stanzas on first lines that are not tuned on, and scans metre and rhyme:
one more table, with the real stanzas as a row, and verse.html, where stresses, feet and rhymes are marked.
"""

import os
from collections.abc import Sequence

from nanogpt_hf.common.cli import parse
from nanogpt_hf.common.comparison_settings import FILES, ComparisonSettings
from nanogpt_hf.common.paths import check_folder, check_model_name, check_unused
from nanogpt_hf.common.running import run_recipe
from nanogpt_hf.data.sources import check_corpora


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(ComparisonSettings, __doc__, argv, positional="runs")
    for name in settings.model:
        check_model_name(name)
    for name in settings.runs:
        if not os.path.exists(name):
            check_folder(name)
    check_corpora(settings.corpus, settings.validation_file)
    if settings.output_dir and not settings.overwrite_output_dir:
        check_unused(settings.output_dir, FILES)
    if settings.runs:
        from nanogpt_hf.analysis.run_table import list_runs  # with torch, which takes seconds

        list_runs(settings.runs)
    else:
        from nanogpt_hf.analysis.report import measure_models

        measure_models(settings)


if __name__ == "__main__":
    run_recipe(main)
