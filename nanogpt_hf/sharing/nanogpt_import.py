"""A checkpoint of nanoGPT (https://github.com/karpathy/nanoGPT) as a run folder of ours.

Its files are pickles. Of ckpt.pt torch builds tensors and plain values, nothing else; meta.pkl, the vocabulary of
characters, is read here, opcode by opcode.
"""

import os
import pickletools
import re
from pathlib import Path
from typing import Any

import torch

from ..common.errors import UserError
from ..common.files import files_written_whole
from ..common.text import first_line
from ..data.tokenization import load_tokenizer, train_char_tokenizer
from ..model import NanoGPTConfig, NanoGPTForCausalLM
from ..model.loading import check_vocabulary, suppress_padding
from .export import export
from .model_card import make_card

GPT2_TOKENIZER = "openai-community/gpt2"
NEVER = -30.0  # logit of a token that nanoGPT did not have: e^-30 of 1e-13 beside any that it had
_ARGUMENTS = "n_layer n_head n_embd block_size vocab_size"


def import_nanogpt(
    out_dir: str | os.PathLike,
    target: str | os.PathLike,
    text: str | os.PathLike | None = None,
    tokenizer: str = GPT2_TOKENIZER,
) -> NanoGPTForCausalLM:
    """Write nanoGPT's ckpt.pt as a GPT-2 of ours, with its tokenizer and a card.

    Args:
        out_dir: nanoGPT's out_dir, with ckpt.pt in it.
        target: folder to write into.
        text: the text that a model of characters was trained on; by default its characters are looked up in meta.pkl,
            where nanoGPT's prepare.py leaves it.
        tokenizer: folder or Hub id, for a model of subwords.

    Raises:
        UserError: there is no checkpoint, it is none of nanoGPT's, or the vocabulary is not to be had.
    """
    checkpoint = read_checkpoint(Path(out_dir))
    sizes = checkpoint["model_args"]
    characters = find_characters(Path(out_dir), checkpoint, text)
    words = train_char_tokenizer(["".join(characters)]) if characters else load_tokenizer(tokenizer)
    weights = gpt2_weights(checkpoint["model"])
    ids = [words.get_vocab()[character] for character in characters]
    if characters:
        weights = weights | place_rows(weights, ids, len(words))
    model = NanoGPTForCausalLM(_config(sizes, len(weights["transformer.wte.weight"]), words.eos_token_id))
    try:
        model.load_state_dict(weights | {"lm_head.weight": weights["transformer.wte.weight"]})
    except RuntimeError as error:
        raise UserError(
            f"the weights of {out_dir} are not those of a GPT of its sizes: {first_line(error)}."
        ) from error
    check_vocabulary(words, model)
    words.model_max_length = sizes["block_size"]
    model.generation_config.do_sample = True
    if characters:
        model.generation_config.suppress_tokens = sorted(set(range(len(words))) - set(ids))
    else:
        suppress_padding(words, model)
    with files_written_whole(Path(target), manifest=True) as staging:
        export(model, words, staging, "nanogpt")
        make_card(staging, title=Path(target).resolve().name).save(staging / "README.md")
    return model


def _config(sizes: dict[str, Any], rows: int, end: int) -> NanoGPTConfig:
    fields: dict[str, Any] = {name: sizes[name] for name in ("n_layer", "n_head", "n_embd")}
    fields |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), float(sizes.get("dropout", 0.0)))
    fields |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end)
    return NanoGPTConfig(
        architecture="gpt2",
        activation_function="gelu",
        vocab_size=rows,
        n_positions=sizes["block_size"],
        **fields,
    )


# --- weights ---


def read_checkpoint(out_dir: Path) -> dict:
    """nanoGPT's ckpt.pt: model (a state dict), model_args, config and more.

    Raises:
        UserError: it is missing, damaged, or none of nanoGPT's.
    """
    path = out_dir / "ckpt.pt"
    if not path.is_file():
        raise UserError(f"{out_dir} holds no ckpt.pt: give nanoGPT's out_dir.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file has as many exceptions as it has bytes
        raise UserError(f"{path} is no checkpoint of nanoGPT, or damaged: {first_line(error)}.") from error
    sizes = checkpoint.get("model_args") if isinstance(checkpoint, dict) else None
    lacks = [name for name in _ARGUMENTS.split() if not isinstance((sizes or {}).get(name), int)]
    if lacks or not isinstance(checkpoint.get("model"), dict):
        raise UserError(f"{path} is no checkpoint of nanoGPT: it lacks {lacks[0] if lacks else 'the model'}.")
    return checkpoint


def gpt2_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """nanoGPT's weights as GPT-2's: the same names, matrices transposed (inputs, outputs), zeros where it had no bias."""
    theirs = {name.removeprefix("_orig_mod."): tensor for name, tensor in weights.items()}
    ours = {}
    for name, tensor in theirs.items():
        if name == "lm_head.weight" or re.search(r"\.attn\.bias$", name):  # the tied head; a causal mask
            continue
        is_matrix = re.search(r"\.c_(attn|proj|fc)\.weight$", name)
        ours[name] = tensor.float().T.contiguous() if is_matrix else tensor.float().clone()
    for name in [name for name in ours if not re.search(r"\.w[tp]e\.", name) and name.endswith(".weight")]:
        ours.setdefault(name.replace(".weight", ".bias"), torch.zeros(ours[name].shape[-1]))
    return ours


def place_rows(weights: dict[str, torch.Tensor], ids: list[int], rows: int) -> dict[str, torch.Tensor]:
    """An embedding of more rows, nanoGPT's at `ids`, with the bias of the last LayerNorm by which the logits of all
    other rows are NEVER, so that the probabilities stay as they were.

    What the LayerNorm gives is h = w x + b, channel by channel, where x sums to zero. So a row r = NEVER / w has the
    logit NEVER sum(b / w), whatever the text is; and b may move at right angles to all rows of nanoGPT's without
    changing their logits, until that sum is 1. There is no such direction when there are more characters than channels:
    then the others' rows are zero, as are their logits.
    """
    known = weights["transformer.wte.weight"].double()  # V C
    w, b = weights["transformer.ln_f.weight"].double(), weights["transformer.ln_f.bias"].double()
    q = torch.linalg.qr(known.T).Q  # C V
    direction = 1 / w - q @ (q.T @ (1 / w))
    embedding = torch.zeros(rows, known.shape[1])
    if len(known) < known.shape[1] and direction.isfinite().all():
        b = b + direction * (1 - (b / w).sum()) / (direction @ direction)
        embedding[:] = NEVER / w
    embedding[ids] = known.float()
    return {"transformer.wte.weight": embedding, "transformer.ln_f.bias": b.float()}


# --- vocabulary ---


def find_characters(out_dir: Path, checkpoint: dict, text: str | os.PathLike | None) -> list[str]:
    """The characters of nanoGPT's ids; none for a model of subwords.

    Raises:
        UserError: the text, or the meta.pkl, is not what the model was trained on, or neither is there.
    """
    size = checkpoint["model_args"]["vocab_size"]
    if text is not None:
        try:
            characters = sorted(set(Path(text).read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--text {text} cannot be read: {first_line(error)}.") from error
        if len(characters) != size:
            raise UserError(
                f"--text {text} has {len(characters)} different characters and the model {size}: give the text that it "
                "was trained on."
            )
        return characters
    dataset = (checkpoint.get("config") or {}).get("dataset")
    folders = [out_dir]
    if isinstance(dataset, str) and Path(dataset).name == dataset:
        folders += [root / "data" / dataset for root in (out_dir.resolve().parent, Path.cwd())]
    path = next((folder / "meta.pkl" for folder in folders if (folder / "meta.pkl").is_file()), None)
    if path is None:
        if size >= 50257:  # GPT-2's
            return []
        raise UserError(
            f"there is no meta.pkl for {out_dir} to say which characters its {size} tokens are: give the text that it was "
            "trained on (--text input.txt)."
        )
    names = read_plain_pickle(path).get("itos")
    characters = [str(names.get(id)) for id in range(size)] if isinstance(names, dict) else []
    if not characters or {*map(len, characters)} != {1} or len({*characters}) != size:
        raise UserError(
            f"{path} does not name the {size} characters of the model: give its text (--text input.txt)."
        )
    return characters


def read_plain_pickle(path: Path) -> dict:
    """A pickle that holds dicts of strings and whole numbers, and nothing else.

    Raises:
        UserError: it holds anything else, or is damaged.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    try:
        argument: Any
        for opcode, argument, _ in pickletools.genops(path.read_bytes()):
            match opcode.name:
                case "PROTO" | "FRAME":
                    pass
                case "EMPTY_DICT":
                    stack.append({})
                case "BININT" | "BININT1" | "BININT2" | "BINUNICODE" | "SHORT_BINUNICODE":
                    stack.append(argument)
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "MARK":
                    marks.append(len(stack))
                case "SETITEM" | "SETITEMS":
                    start = marks.pop() if opcode.name == "SETITEMS" else len(stack) - 2
                    items = stack[start:]
                    del stack[start:]
                    stack[-1].update(zip(items[::2], items[1::2], strict=True))
                case "STOP":
                    return dict(stack.pop())
                case other:
                    raise ValueError(f"{other} is no part of a dict of strings and numbers")
    except Exception as error:
        raise UserError(f"{path} is not a meta.pkl of nanoGPT's: {first_line(error)}.") from error
    raise UserError(f"{path} is not a meta.pkl of nanoGPT's: it has no end.")
