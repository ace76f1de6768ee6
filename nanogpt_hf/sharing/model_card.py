"""The model card: what was trained on what, how well, and how to load it. During a run runs/showing.py writes it.

Everything that it quotes, a sample above all, stays a quotation: it can neither end its block nor reach the metadata.
"""

import json
import re
import shlex
from math import isfinite, prod
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from ..common.errors import UserError
from ..common.text import printable, without_token
from ..training.checkpoints import read_progress
from ..training.reporting import OF_REWARDS, evaluated_at, loss_unit, read_metrics
from ..verse.stanzas import prompt_of

# Settings that say where a run was and with whom it is shared, not what was trained.
NOT_IN_A_CARD = (
    "corpus validation_file model_name_or_path tokenizer output_dir overwrite_output_dir resume_from_checkpoint report_to push_to_hub "
    "hub_model_id hub_private_repo hub_format dry_run"
).split()
# What the card reads of a run.yaml.
FORM_OF_A_RUN = {
    "model_name_or_path": str,
    "tokenizer": str,
    "record": {
        "tokenizer_hub_id": str,
        "corpus": {
            **dict.fromkeys(("name", "source", "sha256", "license", "notice"), str),
            "language": (str, list),
            "characters": int,
        },
        "base": dict.fromkeys(("model_type", "license", "source", "hub_id"), str),
        "versions": dict,
        "history": list,
        "command": str,
        "identity": dict,
    },
}
LOADING = {
    "plain": 'from transformers import pipeline\n\ngenerate = pipeline("text-generation", {name})\n',
    "nanogpt": (
        "from transformers import pipeline\n\n"
        'generate = pipeline("text-generation", {name}, trust_remote_code=True)\n'
        "# with nanogpt_hf installed, `import nanogpt_hf` takes the place of trust_remote_code=True\n"
    ),
    "adapter": (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline\n\n"
        "tokenizer = AutoTokenizer.from_pretrained({name})\n"
        "model = AutoModelForCausalLM.from_pretrained({base}{trust}){where}\n{resize}"
        "model = PeftModel.from_pretrained(model, {name})\n"
        "model.generation_config = GenerationConfig.from_pretrained({name})\n"
        'generate = pipeline("text-generation", model, tokenizer=tokenizer)\n'
    ),
}
LLAMA_CPP = """llama-completion -m {file} -no-cnv -p {prompt}    # llama.cpp
ollama create {name} -f Modelfile && ollama run {name} {prompt}    # Ollama
lms import {file}    # LM Studio, whose completions then show it"""
JAVASCRIPT = """import { pipeline } from '@huggingface/transformers'; // version 4

const generate = await pipeline('text-generation', NAME, { dtype: 'fp32' }); // or 'q8', a quarter of the size
console.log((await generate(PROMPT, { max_new_tokens: LENGTH }))[0].generated_text);"""


def make_card(
    run: Path,
    model: Path | None = None,
    shown: Path | None = None,
    weights: Path | None = None,
    format: str | None = None,
    name: str | None = None,
    title: str | None = None,
) -> ModelCard:
    """The card of a model, from what its run has left; what is not there is left out.

    Args:
        run: the run folder.
        model: where the model lies as the run has written it; by default the run folder.
        shown: where its loss curve and samples lie; by default with it.
        weights: where the weights lie that the card goes with; by default with the model.
        format: of these weights; by default nanogpt, or adapter where there is one.
        name: what the card's lines load, a Hub id; by default the folder that the card lies in.
        title: by default the name, or that of the run folder.

    Raises:
        UserError: run.yaml cannot be read.
    """
    model = model or run
    shown, weights = shown or model, weights or model
    title = title or name or run.resolve().name
    settings = read_run(run / "run.yaml")
    record = settings.pop("record", None) or {}
    corpus = record.get("corpus") or {}
    base, base_facts = settings.get("model_name_or_path"), record.get("base") or {}
    base_name = base and (base if base_facts.get("hub_id") == base else Path(base).name)
    config = (
        json.loads((model / "config.json").read_text(encoding="utf-8"))
        if (model / "config.json").exists()
        else {}
    )
    rows = read_metrics(run / "metrics.jsonl")
    best = _best(model, rows)
    corpus_name = name_of(corpus) if corpus else None
    is_adapter = (model / "adapter_config.json").exists()
    format = format or ("adapter" if is_adapter else config.get("model_type", "nanogpt"))
    samples, samples_before = read_samples(shown / "samples.txt"), read_samples(run / "samples_before.txt")
    prompt = first_words(samples, settings)

    data = ModelCardData(
        language=corpus.get("language"),
        library_name={"adapter": "peft", "gguf": "gguf"}.get(format, "transformers"),
        pipeline_tag="text-generation",
        tags=["nanogpt_hf", *([config["architecture"]] if "architecture" in config else [])],
        datasets=re.findall(r"^([\w.-]+/[\w.-]+)@[0-9a-f]{40}$", corpus.get("source") or "") or None,
        base_model=base_facts.get("hub_id"),
        model_name=printable(title),
        eval_results=_results(corpus_name, best) if corpus and "eval_loss" in best else None,
        **_license(base_facts.get("license") or corpus.get("license")),
    )
    body = [
        f"# {_plain_words(title.split('/')[-1])}",
        _opening_words(format, config, model if format == "gguf" else weights, corpus_name, base_name),
    ]
    on_base = _base_fields(base_name, base_facts, settings) if format == "adapter" else {}
    body += ["## Use", _loading_block(weights, name or ".", format, prompt, on_base)]
    if format == "onnx":
        body += [
            "In a browser, or in Node.js:",
            _fenced(_javascript_lines(name or title, weights, prompt), "js"),
        ]
    if base_facts:
        body += ["## Base", _base_words(base_name, base_facts)]
    if corpus:
        body += ["## Corpus", _corpus_words(corpus)]
    if best:
        body += ["## Result", _result_words(best, rows)]
        if (shown / "loss_curve.png").exists():
            body += ["![loss over the steps](loss_curve.png)"]
    if settings:
        body += ["## Settings", _fenced(_settings_words(settings, base_name, record), "yaml")]
    if record.get("command"):
        body += ["The command that made it:", _fenced(_commands_words(record), "bash")]
    if record.get("versions"):
        body += ["With " + ", ".join(_code(f"{k} {v}") for k, v in record["versions"].items()) + "."]
    if samples_before:
        body += ["## Samples", _side_by_side("before, the base", samples_before, "after", samples)]
    elif samples:
        body += ["## Samples", _fenced(samples, "text")]
    return ModelCard(without_token(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n"))


def _best(model: Path, rows: list[dict]) -> dict:
    """The line of metrics.jsonl of the step that a model is of; without eval_loss where it was never evaluated."""
    try:
        progress = read_progress(model)
    except UserError:  # of an earlier version, or not of a run: the best one
        evaluated = [row for row in rows if isfinite(row.get("eval_loss", float("nan")))]
        return min(evaluated, key=lambda row: row["eval_loss"], default={})
    if progress.best_step is None:
        return {"step": progress.step}
    return evaluated_at(rows, progress.best_step) or {
        "step": progress.best_step,
        "eval_loss": progress.best_loss,
    }


def read_samples(path: Path) -> str:
    """The beginning of what a run wrote, safe to show; empty where there is nothing."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return printable(text)[:4000].strip("\n")


def read_run(path: Path) -> dict:
    """The settings and the record of a run.yaml; empty where there is none. Raises UserError where it cannot be read."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values or {}, dict):
        raise UserError(f"{path} must hold `setting: value` lines.")
    values = values or {}
    corpus = values["record"].get("corpus") if isinstance(values.get("record"), dict) else None
    if not _fits(values, FORM_OF_A_RUN) or (corpus and not {"name", "source", "sha256"} <= {*corpus}):
        raise UserError(f"{path} has a record that no run has written: delete it to share the model without.")
    return values


def _fits(value: Any, form: Any) -> bool:
    """Whether a value is of a type, or a dict whose values are of theirs; what is not there, or None, fits."""
    if value is None:
        return True
    if not isinstance(form, dict):
        return isinstance(value, form) and not (isinstance(value, bool) and form is int)
    return isinstance(value, dict) and all(_fits(value.get(name), part) for name, part in form.items())


def _license(corpus_license: str | None) -> dict:
    """The card's fields; the Hub knows "other" and "unknown", but not the public domain."""
    if corpus_license == "public domain":
        link = "https://creativecommons.org/publicdomain/mark/1.0/"
        return {"license": "other", "license_name": "public-domain", "license_link": link}
    return {"license": corpus_license or "unknown"}


def _results(corpus_name: str, best: dict) -> list[EvalResult]:
    measured = {
        ("validation", "loss", f"loss, {loss_unit(best)}"): best.get("eval_loss"),
        ("validation", "bits_per_character", "bits per character"): best.get("eval_bits_per_char"),
        ("train", "loss", f"loss of one batch, {loss_unit(best)}"): _train_loss(best),
    }
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=re.sub(r"[^\w.-]+", "-", corpus_name).strip("-") or "corpus",
            dataset_name=printable(corpus_name),
            dataset_split=split,
            metric_type=metric,
            metric_name=label,
            metric_value=round(value, 4),
        )
        for (split, metric, label), value in measured.items()
        if value is not None
    ]


def _train_loss(best: dict) -> float | None:
    """None of a run on rewards: what is minimised there is no measure of them."""
    loss = best.get("train_loss", float("nan"))
    return loss if isfinite(loss) and loss_unit(best) != OF_REWARDS else None


def count_parameters(folder: Path) -> int:
    """Parameters in the weight files of a folder, without reading them."""
    sizes = []
    for path in (path for path in folder.glob("*.safetensors") if "model" in path.name):
        with safe_open(path, "pt") as file:
            sizes += [prod(file.get_slice(key).get_shape()) for key in file.keys()]
    return sum(sizes)


def _opening_words(format: str, config: dict, folder: Path, corpus_name: str | None, base: str | None) -> str:
    kind = "An adapter (LoRA)" if format == "adapter" else "A GPT"
    words = f"{kind} of {count_parameters(folder) / 1e6:.2f}M parameters"
    if "architecture" in config:
        words += (
            f", architecture {_code(config['architecture'])}: {config['n_layer']} layers, {config['n_head']} heads, "
            f"width {config['n_embd']}, context {config['n_positions']} tokens"
        )
    if corpus_name:
        words += f"; {f'fine-tuned from {_code(base)}' if base else 'trained from scratch'} on {_code(corpus_name)}"
    return words + "."


def _base_fields(base: str, facts: dict, settings: dict) -> dict[str, str]:
    """How an adapter's card loads its base: by the Hub's name where it has one, else by that of its folder."""
    return {
        "base": json.dumps(facts.get("hub_id") or base, ensure_ascii=False),
        "where": "" if facts.get("hub_id") else "  # the folder of the base",
        "trust": ", trust_remote_code=True" if facts.get("model_type") == "nanogpt" else "",
        "resize": "model.resize_token_embeddings(len(tokenizer))\n"
        if settings.get("extend_vocabulary")
        else "",
    }


def _base_words(name: str, facts: dict) -> str:
    words = {
        "licence": facts.get("license"),
        "source": facts.get("source"),
        "on the Hub": facts.get("hub_id"),
    }
    lines = [
        f"- {_code(name)}",
        *(f"- {what}: {_code(said)}" for what, said in words.items() if said and said != name),
    ]
    if facts.get("hub_id") not in (None, name):
        lines.append("- trained on the weights of that source; on the Hub's own the loss is a little other")
    return "\n".join(lines)


def _loading_block(target: Path, name: str, format: str, prompt: str, on_base: dict[str, str]) -> str:
    if format == "gguf":
        file = next(target.glob("*.gguf")).name
        short = file.rpartition("-")[0].lower()
        prompt = shlex.quote(printable(prompt).strip() or "Once")
        return _fenced(LLAMA_CPP.format(file=file, name=short, prompt=prompt), "bash")
    here = "# in this folder\n" if name == "." else ""
    lines = here + LOADING[format if format in LOADING else "plain"].format(
        name=json.dumps(name, ensure_ascii=False), **on_base
    )
    lines += f'print(generate({json.dumps(prompt, ensure_ascii=False)})[0]["generated_text"])'
    return _fenced(lines, "python")


def _javascript_lines(name: str, folder: Path, prompt: str) -> str:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    context = (
        config.get("n_positions") or config["max_position_embeddings"]
    )  # which transformers.js would pass
    words = {"NAME": name, "PROMPT": prompt, "LENGTH": context // 2}
    return re.sub(
        "NAME|PROMPT|LENGTH", lambda match: json.dumps(words[match[0]], ensure_ascii=False), JAVASCRIPT
    )


def first_words(samples: str, settings: dict) -> str:
    """A prompt: how the first sample begins; for a model that was tuned on stanzas, as one begins."""
    line = next((line for line in samples.split("\n") if line.strip()), "\n")
    return prompt_of(line) if "drill_steps" in settings else line[:20]


def _corpus_words(corpus: dict) -> str:
    lines = [f"- source: {_code(corpus['source'])}", f"- SHA-256 of the text: {_code(corpus['sha256'])}"]
    if "characters" in corpus:
        lines.append(f"- {corpus['characters']:,} characters")
    if corpus.get("license"):
        lines.append(f"- licence: {_code(corpus['license'])}")
    if corpus.get("notice"):
        lines.append(f"- note: {_plain_words(corpus['notice'])}")
    return "\n".join(lines)


def _settings_words(settings: dict, base: str | None, record: dict) -> str:
    """The settings that had an effect, and how many tokens a step took on all devices."""
    shown = {k: v for k, v in settings.items() if k not in NOT_IN_A_CARD and v not in (None, [], "")}
    if settings.get("optim") != "muon":
        shown = {name: value for name, value in shown.items() if not name.startswith("muon_")}
    name = settings.get("tokenizer") or ""
    if name != record.get("tokenizer_hub_id"):
        name = Path(name).name
    shown = {"tokenizer": base or name} | shown
    if "tokens_per_step" in (identity := record.get("identity") or {}):
        shown["tokens_per_step"] = identity["tokens_per_step"]
    return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True).strip()


def _commands_words(record: dict) -> str:
    """The commands of a run, one that it went on with after the step from which it did."""
    history = [entry for entry in record.get("history") or [] if isinstance(entry, dict)]
    later = [f"# from step {entry.get('step')}:\n{entry.get('command')}" for entry in history]
    return "\n".join([record["command"], *later])


def _result_words(best: dict, rows: list[dict]) -> str:
    if "eval_loss" not in best:
        return f"The model of step {best['step']:,}, before the first validation."
    words = f"Validation loss {best['eval_loss']:.4f} {loss_unit(best)}"
    if "eval_bits_per_char" in best:
        words += f" ({best['eval_bits_per_char']:.4f} bits per character)"
    last = max([best["step"], *(row["step"] for row in rows)])
    on = "texts on held-out first lines" if loss_unit(best) == OF_REWARDS else "the whole validation split"
    words += f" at step {best['step']:,} of {last:,}, over {on}"
    first = rows[0] if rows else best
    if first["step"] == 0 and best["step"] > 0 and "eval_bits_per_char" in first:
        words += f"; before the first step {first['eval_loss']:.4f} ({first['eval_bits_per_char']:.4f})"
    train_loss = _train_loss(best)
    return words + (
        f"; training loss of that step's batch {train_loss:.4f}." if train_loss is not None else "."
    )


def name_of(corpus: dict) -> str:
    """A dataset's id on the Hub; of a path only its last part, which tells nothing about the machine it was on."""
    name = corpus["name"]
    return name if corpus["source"].startswith(f"{name.partition(':')[0]}@") else Path(name).name


def _code(text: str) -> str:
    """A code span that its content cannot end."""
    text = " ".join(printable(text).split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks} {text} {ticks}" if "`" in text else f"`{text}`"


def _fenced(text: str, language: str) -> str:
    """A code block that its content cannot end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{printable(text)}\n{fence}"


def _side_by_side(left: str, before: str, right: str, after: str) -> str:
    """A table of two texts whose content cannot leave its cell."""
    cells = ("<br>".join(map(_plain_words, text.split("\n"))) for text in (before, after))
    return f"| {left} | {right} |\n| --- | --- |\n| {' | '.join(cells)} |"


def _plain_words(text: str) -> str:
    """One line in which nothing is mark-up."""
    return re.sub(r"([\\`*_{}\[\]<>#|!&~])", r"\\\1", " ".join(printable(text).split()))
