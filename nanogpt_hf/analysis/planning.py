"""What a size needs before anybody pays for it: parameters, FLOPs, memory per GPU, days.

Tensor and context parallelism are planned although nothing here trains with them: GPT-3's largest sizes fit no other way,
and that is what who plans one has to know. Parameters are counted on the meta device. Memory is the peak of one training
step of `stepping.py`: bfloat16 autocast, float32 weights, fused AdamW, attention that never holds its T x T scores. Every
estimate is a sum of named terms.

Shapes: B sequences a micro-batch, T tokens, C channels, H heads, K heads of keys and values, D head size, I width of
the MLP, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..common.errors import UserError
from ..model import NanoGPTConfig, NanoGPTForCausalLM
from ..training import fused_loss
from ..training.gpus import GPU

GIB = 2**30
GPT3_TOKENS = 300e9  # Brown et al. 2020: every size of theirs
CHINCHILLA_TOKENS = 20  # a parameter: Hoffmann et al. 2022
# Of a GPU's memory, for what no tensor of ours is: the CUDA context, NCCL's buffers, fragments of the allocator.
RESERVED = 0.08


@dataclass(frozen=True)
class Size:
    """Parameters of a model.

    Attributes:
        matrices: of them, those in the blocks' matrices, which tensor parallelism splits.
        block: of one block.
    """

    config: NanoGPTConfig
    parameters: int
    matrices: int
    block: int

    @property
    def embedding(self) -> int:
        return self.config.vocab_size * self.config.n_embd


def measure_size(config: NanoGPTConfig) -> Size:
    """Build the model on the meta device, where it takes no memory, and count."""
    with torch.device("meta"):
        model = NanoGPTForCausalLM(config)
    blocks = model.transformer.h
    return Size(
        config=config,
        parameters=model.num_parameters(),
        matrices=sum(p.numel() for p in blocks.parameters() if p.ndim > 1),
        block=sum(p.numel() for p in blocks[0].parameters()),
    )


# --- arithmetic ---


def training_flops(size: Size, tokens: float) -> dict[str, float]:
    """FLOPs of forward and backward, recomputed activations left out.

    matmul: 6 a parameter and token (Kaplan et al. 2020, section 2.1), all N parameters, as GPT-3's table D.1 counts.
    attention: 12 n_layer H D T a token (Chowdhery et al. 2022, appendix B): scores and their sums over the whole
    context, though a causal kernel needs half.
    """
    config = size.config
    return {
        "matmul": 6 * size.parameters * tokens,
        "attention": 12 * config.n_layer * config.n_head * config.head_dim * config.n_positions * tokens,
    }


def training_days(flops: Mapping[str, float], gpus: int, gpu: GPU, mfu: float) -> float:
    """Days at a model FLOPs utilisation (MFU, Chowdhery et al. 2022): the share of the peak that these FLOPs get."""
    return sum(flops.values()) / (gpus * gpu.bf16_tflops * 1e12 * mfu) / 86_400


# --- memory ---


LAYOUT_SIZES = ("dp_replicate_size", "dp_shard_size", "tp_size", "cp_size")


@dataclass(frozen=True)
class Layout:
    """How the GPUs share the work, named as accelerate's ParallelismConfig and FSDP plugin name it.

    Attributes:
        dp_replicate_size: copies that see different data: alone, DDP.
        dp_shard_size: GPUs that share one copy and see different data: FSDP2; with replicas, hybrid.
        tp_size: GPUs that split the matrices of every block between them (Shoeybi et al. 2019). Embeddings, norms,
            residual stream and logits are whole on each. No model of ours has a plan for it yet.
        cp_size: GPUs that split the sequence between them; FSDP2 shards over them too.
        gradient_checkpointing: keep the blocks' inputs alone and compute the rest again (Chen et al. 2016).
        reshard_after_forward: FSDP2 gives gathered weights back after the forward pass.
    """

    dp_replicate_size: int = 1
    dp_shard_size: int = 1
    tp_size: int = 1
    cp_size: int = 1
    gradient_checkpointing: bool = False
    reshard_after_forward: bool = True

    def __post_init__(self) -> None:
        for name in LAYOUT_SIZES:
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}, it must be at least 1.")

    @property
    def gpus(self) -> int:
        return self.dp_replicate_size * self.dp_shard_size * self.tp_size * self.cp_size

    @property
    def data_parallel_size(self) -> int:
        return self.dp_replicate_size * self.dp_shard_size

    @property
    def shards(self) -> int:
        """GPUs that FSDP2 shards over: accelerate's mesh dp_shard_cp. One: no FSDP2."""
        return self.dp_shard_size * self.cp_size

    @property
    def name(self) -> str:
        parts = ["DDP" if self.shards == 1 and self.dp_replicate_size > 1 else "FSDP2" * (self.shards > 1)]
        parts += [f"tp {self.tp_size}"] * (self.tp_size > 1) + [f"cp {self.cp_size}"] * (self.cp_size > 1)
        if self.shards > 1 and self.dp_replicate_size > 1:
            parts[0] = f"FSDP2 {self.dp_replicate_size} x {self.dp_shard_size}"
        if self.gradient_checkpointing:
            parts.append("checkpointing")
        if self.shards > 1 and not self.reshard_after_forward:
            parts.append("no reshard")
        return ", ".join(part for part in parts if part) or "one GPU"


def check_layout(layout: Layout, config: NanoGPTConfig, gpus: int) -> None:
    """Raises UserError where accelerate, the model or the number of GPUs cannot have this layout."""
    if layout.gpus != gpus:
        product = " x ".join(f"{name} {getattr(layout, name)}" for name in LAYOUT_SIZES)
        raise UserError(f"--gpus is {gpus:,}, but {product} is {layout.gpus:,}: they must be equal.")
    widths = {"n_head": config.n_head, "n_kv_head": config.n_kv_head, "the MLP's width": config.inner_size}
    for width, value in widths.items():
        if value % layout.tp_size:
            raise UserError(f"--tp_size {layout.tp_size} does not divide {width} ({value:,}).")
    if config.n_positions % (2 * layout.cp_size) and layout.cp_size > 1:
        raise UserError(
            f"--cp_size {layout.cp_size} must divide n_positions ({config.n_positions:,}) into two equal parts a GPU."
        )
    if layout.tp_size * layout.cp_size > 1 and layout.dp_replicate_size > 1 and layout.dp_shard_size == 1:
        raise UserError(
            "accelerate has no tensor or context parallelism beside DDP: set --dp_shard_size above 1, or "
            "--dp_replicate_size to 1."
        )


def norm_input_bytes(config: NanoGPTConfig, compiled: bool, device: str) -> int:
    """Bytes a channel of what a norm keeps of its input, the bfloat16 residual stream.

    The norms compute in float32, and keep that copy; compiled code makes it anew. CPU only: autocast leaves LayerNorm
    in bfloat16.
    """
    return 2 if compiled or (device == "cpu" and config.norm == "layernorm") else 4


def activation_bytes(
    config: NanoGPTConfig, compiled: bool = False, tp_size: int = 1, device: str = "cuda"
) -> dict[str, float]:
    """What the forward pass of one block keeps for the backward pass, bytes a token.

    2 bytes are a bfloat16 value and 4 a float32 one.
    """
    C, H, K, inner = config.n_embd, config.n_head, config.n_kv_head, config.inner_size
    HD, KD = H * config.head_dim, K * config.head_dim
    gated, rms = config.mlp == "swiglu", config.norm == "rmsnorm"
    kept = {
        # input; 1/std, and LayerNorm's mean
        "norms": 2 * (norm_input_bytes(config, compiled, device) * C + (4 if rms else 8)),
        "normalised": 2 * 2 * C,  # input of c_attn and c_fc
        "attention": (2 * HD + 2 * 2 * KD + 2 * HD + 4 * H)
        / tp_size,  # query, key, value; output; log-sum-exp
        # c_fc's output and c_proj's input; eagerly, SwiGLU's gate after its silu too
        "mlp": (3 if gated and compiled else 4 if gated else 2) * 2 * inner / tp_size,
    }
    if config.qk_norm:  # both norms' input in float32, which compiled code makes anew; their rotated output
        kept["qk_norm"] = ((0 if compiled else 4 * (HD + KD)) + 2 * (HD + KD) + 4 * (H + K)) / tp_size
    elif config.positions == "rotary":
        kept["rotation"] = 2 * (HD + KD) / tp_size
    if config.resid_pdrop:
        kept["dropout masks"] = 2 * C
    if device == "cpu" and rms and not compiled:
        # CPU only: rms_norm is several operations there, and keeps what it has normalised too
        kept["float32 norms"] = 4 * (2 * C + (HD + KD if config.qk_norm else 0))
    return kept


def logits_bytes(config: NanoGPTConfig, tokens: float, device: str = "cuda") -> float:
    """What logits and cross-entropy, fused with the head, hold at their peak.

    One chunk of bfloat16 logits, which become their gradient in place; CPU only: beside two float32 copies.
    """
    chunk = min(2 * config.vocab_size * tokens, fused_loss.CHUNK_BYTES)
    return chunk * (5 if device == "cpu" else 1)


def step_memory(
    size: Size,
    layout: Layout,
    batch_size: int,
    accumulation: int = 1,
    compiled: bool = False,
    device: str = "cuda",
) -> dict[str, float]:
    """Bytes on every GPU at the worst moment of a step, by what they are for.

    The moments compared: the loss, where all activations are alive; the backward pass of the last block, which may have
    been recomputed; that of the first one, where most gradients are; and its end, where all are. On one GPU a CUDA
    graph keeps a step's peak, weights and moments left out, for itself between the steps too.

    Args:
        batch_size: sequences a device and micro-batch.
        accumulation: micro-batches a step.
        compiled: the blocks are; head and loss never.
        device: cuda, or cpu, where torch keeps other things: for checks without a GPU.
    """
    config = size.config
    tokens = batch_size * config.n_positions / layout.cp_size
    C, L = config.n_embd, config.n_layer
    HD, KD = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    fsdp = layout.shards > 1
    local = size.parameters - size.matrices * (1 - 1 / layout.tp_size)  # before sharding
    block = size.block / layout.tp_size
    root = local - L * block
    sharded = local / layout.shards
    states = {"weights": 4 * sharded, "AdamW's moments": 8 * sharded}

    # bfloat16 copies of the weights: gathered by FSDP2, of which the root keeps its own, or cast by autocast.
    if fsdp:
        gathered = 2 * (root + block * (min(2, L) if layout.reshard_after_forward else L))
    else:
        gathered = 2 * block if layout.gradient_checkpointing else 2 * size.matrices / layout.tp_size

    # Activations. Beside those of the blocks, ln_f's input and output and embd_pdrop's mask.
    one_block = sum(activation_bytes(config, compiled, layout.tp_size, device).values()) * tokens
    kept = L * (2 * C * tokens if layout.gradient_checkpointing else one_block)
    kept += (norm_input_bytes(config, False, device) * C + 2 * C + (C if config.embd_pdrop else 0)) * tokens
    if layout.cp_size > 1:  # keys and values of the whole sequence, while a block attends
        kept += 2 * 2 * KD / layout.tp_size * batch_size * config.n_positions
    hidden = (8 if config.mlp == "swiglu" else 4) * config.inner_size / layout.tp_size
    in_block = (
        HD + 2 * KD + hidden
    ) * tokens  # gradients of its activations, as torch's MemTracker finds them
    again = one_block if layout.gradient_checkpointing else 0

    # Gradients of weights: float32 beside the weights. Earlier micro-batches leave theirs; DDP holds them from the
    # start, as views of its buckets. The tied embedding's come in two parts, of which the head's waits for the other.
    begun = 4 * sharded if accumulation > 1 or (layout.dp_replicate_size > 1 and not fsdp) else 0
    from_head = (2 if fsdp else 4) * size.embedding
    complete = 4 * sharded + from_head * (2 if begun and not fsdp else 1)
    # FSDP2's whole ones, in bfloat16 and in float32 to be reduced: a block's or the root's, beside another block's.
    reducing = 4 * block + 6 * max(block, root) if fsdp else 0

    # The head's copy, its gradient in float32 and a chunk's part of it, the gradient of ln_f's output.
    head, logits = size.embedding, logits_bytes(config, tokens, device=device)
    loss = (gathered + 2 * head, begun + 6 * head, kept + 2 * C * tokens, logits)
    last = (gathered, begun + from_head + reducing, kept + again + in_block, 0)
    left = 2 * root if fsdp else 0
    first = (left + 2 * block, complete - 4 * block / layout.shards + reducing, one_block + in_block, 0)
    end = (left, complete + reducing, 0, 0)
    names = ("bfloat16 weights", "gradients", "activations", "logits")
    moments = [states | dict(zip(names, moment, strict=True)) for moment in (loss, last, first, end)]
    return max(moments, key=lambda terms: sum(terms.values()))


def usable_bytes(gpu: GPU) -> float:
    return gpu.memory_gib * GIB * (1 - RESERVED)


# --- a plan ---


def usual_layouts(config: NanoGPTConfig, gpus: int) -> list[Layout]:
    """The layouts worth comparing for so many GPUs, from the simplest; machines hold up to eight."""
    if gpus == 1:
        return [Layout(), Layout(gradient_checkpointing=True)]
    machine = max(n for n in (1, 2, 4, 8) if gpus % n == 0)
    split = max(n for n in (1, 2, 4, 8) if machine % n == config.n_kv_head % n == config.inner_size % n == 0)
    more = {"gradient_checkpointing": True}
    layouts = [Layout(dp_replicate_size=gpus), Layout(dp_replicate_size=gpus, **more)]
    layouts += [Layout(dp_shard_size=gpus), Layout(dp_shard_size=gpus, **more)]
    layouts.append(Layout(dp_shard_size=gpus, reshard_after_forward=False, **more))
    if 1 < machine < gpus:
        layouts.append(Layout(dp_replicate_size=gpus // machine, dp_shard_size=machine, **more))
    if split > 1:
        layouts.append(Layout(dp_shard_size=gpus // split, tp_size=split, **more))
    if machine > 1 and config.n_positions % (2 * machine) == 0:
        layouts.append(Layout(dp_shard_size=gpus // machine, cp_size=machine, **more))
    return layouts


def fill_layout(gpus: int, dp_shard_size: int | None = None, **fields: Any) -> Layout:
    """A layout of so many GPUs; those that the given sizes leave share one copy by FSDP2.

    Raises:
        UserError: the sizes do not divide the GPUs.
    """
    if dp_shard_size is not None:
        return Layout(dp_shard_size=dp_shard_size, **fields)
    others = Layout(**fields).gpus
    if gpus % others:
        named = " x ".join(f"{name} {value}" for name, value in fields.items() if name.endswith("_size"))
        raise UserError(f"--gpus is {gpus:,}, which {named} ({others:,}) does not divide.")
    return Layout(dp_shard_size=gpus // others, **fields)


def plan_layout(
    size: Size, layout: Layout, gpu: GPU, batch_size: int, batch_tokens: int | None, compiled: bool = False
) -> dict:
    """Memory of one layout with a micro-batch of batch_size, and the largest micro-batch that fits.

    Args:
        batch_tokens: tokens that a step should have, on all GPUs; gradients of several micro-batches add up to it.
    """
    at_once = size.config.n_positions * layout.data_parallel_size  # tokens of one sequence a device

    def accumulation(batch_size: int) -> int:
        return max(1, (batch_tokens or 0) // (batch_size * at_once))

    def memory(batch_size: int) -> dict[str, float]:
        return step_memory(size, layout, batch_size, accumulation(batch_size), compiled)

    def fits(batch_size: int) -> bool:
        return sum(memory(batch_size).values()) <= usable_bytes(gpu)

    # Powers of two that do not overshoot the step's tokens. One more may need less: it may save an accumulation.
    most = max(1, (batch_tokens or math.inf) // at_once)
    terms = memory(batch_size)
    return {
        "layout": layout.name,
        **asdict(layout),
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation(batch_size),
        "tokens_per_step": batch_size * accumulation(batch_size) * at_once,
        "memory_bytes": {name: round(value) for name, value in terms.items()},
        "memory_gib": sum(terms.values()) / GIB,
        "fits": fits(batch_size),
        "largest_batch_size": max((2**k for k in range(13) if 2**k <= most and fits(2**k)), default=0),
    }


def plan_budgets(size: Size, gpus: int, gpu: GPU, mfu: float, batch_tokens: int | None) -> list[dict]:
    """FLOPs, days and steps of training on GPT-3's 300 billion tokens, and on Chinchilla's 20 a parameter."""
    budgets = {"GPT-3": GPT3_TOKENS, "Chinchilla": CHINCHILLA_TOKENS * size.parameters}
    rows = []
    for name, tokens in budgets.items():
        flops = training_flops(size, tokens)
        days = training_days(flops, gpus, gpu, mfu)
        row = {
            "tokens_by": name,
            "tokens": tokens,
            **{f"{part}_flops": value for part, value in flops.items()},
        }
        row |= {"flops": sum(flops.values()), "days": days, "gpu_hours": days * 24 * gpus}
        rows.append(row | ({"steps": math.ceil(tokens / batch_tokens)} if batch_tokens else {}))
    return rows


def draw_memory(path: Path, title: str, rows: Sequence[Mapping], gpu: GPU) -> None:
    """A picture: memory per GPU of every layout, by what it is for, against what the GPU has."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    terms = list(rows[0]["memory_bytes"])
    colours = dict(
        zip(terms, ("#4477aa", "#66ccee", "#ccbb44", "#ee6677", "#228833", "#aa3377"), strict=True)
    )
    figure = Figure(figsize=(9.5, 1.9 + 0.42 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    # What does not fit by far would press all that fits against the axis: its bar is cut, its number is not.
    edge = min(1.5 * gpu.memory_gib, max(1.02 * gpu.memory_gib, *(row["memory_gib"] for row in rows)))
    for place, row in enumerate(rows):
        left = 0.0
        for term in terms:
            value = row["memory_bytes"][term] / GIB
            shown = max(0, min(value, edge - left))
            axes.barh(place, shown, left=left, color=colours[term], height=0.66)
            left += shown
        cut = row["memory_gib"] > edge
        axes.text(
            left + 0.01 * edge,
            place,
            f"{row['memory_gib']:,.{1 if row['memory_gib'] < 100 else 0}f} GiB"
            + (", off the scale" if cut else "" if row["fits"] else ", does not fit"),
            va="center",
            fontsize=9,
            color="black" if row["fits"] else "#bb2222",
        )
    axes.axvline(gpu.memory_gib, color="black", lw=1)
    axes.axvspan(usable_bytes(gpu) / GIB, gpu.memory_gib, color="black", alpha=0.12, lw=0)
    memory = f"{gpu.memory_gib:g} GiB; grey: for CUDA, NCCL and fragments"
    axes.text(gpu.memory_gib, -0.7, memory, ha="right", va="bottom", fontsize=8)
    axes.set(xlim=(0, edge * 1.25), ylim=(len(rows) - 0.5, -0.6))
    axes.set_xlabel("GiB per GPU at the worst moment of a step")
    axes.set_yticks(range(len(rows)), [row["layout"] for row in rows])
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    handles = [axes.barh(0, 0, color=colour, label=term) for term, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(terms), frameon=False, fontsize=8.5)
    figure.savefig(path, dpi=130)
