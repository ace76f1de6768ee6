"""One token after another: how the next token is drawn, and the fast step of our own models.

Shapes: B rows, T time (tokens), C channels, H heads, D head size, V vocabulary, L room in the cache.
"""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..model.modeling_nanogpt import NanoGPTBlock, NanoGPTForCausalLM, RMSNorm, rotation_angles

# A product of few rows reads its weights once, and MKL lets one core do that: 2 cores of an AMD EPYC (2026-11-24) read 8
# to 12 GB/s of 3072 x 768 weights whole and 15 to 18 as a batch of two halves; below so many weights it costs more.
SPLIT_FROM = 2**18
# Below this temperature the likeliest token has all the probability that float32 tells from none, unless two logits tie.
COLDEST = 1e-5
CACHES = ("past_key_values", "cache_params")  # attention's, and that of recurrent models as Mamba


class Sampler:
    """Draws the next token (B) from logits (B V): temperature, then top-k, then top-p, as transformers orders them.

    The draw is the exponential race: with noise q of Exp(1), argmax(p / q) is a sample of p. It asks nothing of the
    host, so a CUDA graph can hold it, and it takes k candidates for what they are; transformers' warpers with
    torch.multinomial write -inf over the whole vocabulary first.

    Args:
        temperature: 0, and what comes near it, takes the likeliest token.
        top_k: draw among so many; all where the vocabulary has no more.
        top_p: draw among the likeliest that hold this share of probability, at least one; 0 takes that one.
        seed: of the generator; None draws another each time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ):
        self.greedy = temperature < COLDEST or top_p == 0 or top_k == 1
        self.temperature, self.top_k = temperature, top_k
        self.top_p = None if top_p == 1 else top_p
        self.generator = torch.Generator(model.device)
        self.generator.manual_seed(seed) if seed is not None else self.generator.seed()
        suppressed = model.generation_config.suppress_tokens
        self.suppressed = torch.tensor(suppressed, device=model.device) if suppressed else None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.float()
        if self.suppressed is not None:
            logits = logits.index_fill(-1, self.suppressed, -torch.inf)
        if self.greedy:
            return logits.argmax(dim=-1)
        candidates = None
        if self.top_k is not None or self.top_p is not None:
            k = min(self.top_k or logits.shape[-1], logits.shape[-1])
            logits, candidates = logits.topk(k)  # B k, the likeliest first
        p = (logits / self.temperature).softmax(dim=-1)
        if self.top_p is not None:
            p = p.masked_fill(p.cumsum(dim=-1) - p >= self.top_p, 0)
        noise = torch.empty_like(p).exponential_(generator=self.generator)
        choice = (p / noise).argmax(dim=-1, keepdim=True)
        return (choice if candidates is None else candidates.gather(-1, choice))[:, 0]


class CachedDecoder:
    """Any causal language model, through its own forward and cache; one without a cache reads its text anew."""

    def __init__(self, model: PreTrainedModel, sampler: Sampler):
        self.model, self.sampler = model, sampler

    def continue_(self, ids: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
        """The `count` tokens that follow a text (B T), each B; T + count may be one more than the context."""
        unread, cache = ids, {}
        for _ in range(count):
            output = self.model(input_ids=unread, use_cache=True, logits_to_keep=1, **cache)
            cache = {name: output[name] for name in CACHES if output.get(name) is not None}
            token = self.sampler(output.logits[:, -1])
            yield token
            unread = token[:, None] if cache else torch.cat((unread, token[:, None]), dim=1)


class StaticDecoder:
    """A NanoGPTForCausalLM, through a step of its own over a cache of fixed place and size.

    Why not the forward: a token of a small model costs its operations, not its arithmetic. With 0.8M parameters, batch 1,
    one thread of a busy AMD EPYC (2026-11-24), the step took 2.9 ms where transformers' generate took 9.5.

    Args:
        rows: B.
        room: L, how many tokens the cache holds for each row.
    """

    def __init__(self, model: NanoGPTForCausalLM, sampler: Sampler, rows: int, room: int):
        self.model, self.sampler = model, sampler
        config, network = model.config, model.transformer
        self.wte = network.wte.weight
        room = -(-room // 16) * 16  # CUDA's attention wants the rows of its mask aligned
        self.blocks = [_Block(block) for block in network.h]
        self.norm, self.head = _plain(network.ln_f), _plain(model.lm_head)
        on_device = {"device": self.wte.device, "dtype": torch.long}
        D = config.n_embd // config.n_head
        self.keys, self.values = self.wte.new_zeros(2, config.n_layer, rows, config.n_head, room, D)
        self.columns = torch.arange(room, **on_device)
        self.position = torch.zeros(1, **on_device)  # of the token to be read
        if config.positions == "rotary":
            cos, sin = (table[0, 0] for table in rotation_angles(config, self.columns[None]))  # L D
            self.rotation = cos, torch.cat((-sin[:, : D // 2], sin[:, D // 2 :]), dim=1)
        else:
            self.rotation, self.wpe = None, network.wpe.weight
        self.token = torch.zeros(rows, **on_device)  # what the graph reads and replaces
        self.text = torch.zeros(
            rows, room + 1, **on_device
        )  # what it has written, each token at its position
        self.records, self.graph = self.wte.is_cuda, None

    def continue_(self, ids: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
        """As CachedDecoder's; on CUDA the tokens come in blocks, and on the CPU."""
        T = ids.shape[1]
        output = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        for layer, read in enumerate(output.past_key_values.layers):
            self.keys[layer, :, :, :T], self.values[layer, :, :, :T] = read.keys, read.values
        self.position.fill_(T)
        token = self.sampler(output.logits[:, -1])
        if self.records:
            yield from self._replay(token, T, T + count)
            return
        yield token
        for length in range(T + 1, T + count):
            token = self._step(token, length)
            yield token

    def _step(self, token: torch.Tensor, length: int, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Read one token (B) at self.position, where each row has at most `length`; the token that follows it."""
        x = self.wte.index_select(0, token)  # B C
        rotation = None
        if self.rotation is None:
            x = x + self.wpe.index_select(0, self.position)
        else:
            rotation = [table.index_select(0, self.position) for table in self.rotation]  # 1 D each
        keys, values = self.keys[..., :length, :].unbind(0), self.values[..., :length, :].unbind(0)
        for block, *cache in zip(self.blocks, keys, values, strict=True):
            x = block(x, cache, self.position, rotation, mask)
        self.position += 1
        return self.sampler(self.head(self.norm(x)))

    def _step_on_device(self) -> None:
        """The same with nothing that the host must know: it looks at the whole cache, masked."""
        mask = torch.zeros_like(self.columns, dtype=self.keys.dtype)
        mask = mask.masked_fill(self.columns > self.position, -torch.inf)
        self.token.copy_(self._step(self.token, len(self.columns), mask[None, None, None]))
        self.text.index_copy_(1, self.position, self.token[:, None])

    def _replay(self, token: torch.Tensor, start: int, end: int) -> Iterator[torch.Tensor]:
        """The tokens at positions start to end, the first of them given; the host looks at ever longer blocks."""
        self.token.copy_(token)
        self.text[:, start] = token
        written, block = start + 1, 8
        if self.graph is None and written < end:
            self._record()
            written += 1
        while start < end:
            began, stop = time.perf_counter(), min(start + block, end)
            for _ in range(written, stop):
                self.graph.replay()
            yield from self.text[:, start:stop].to("cpu", copy=True).unbind(1)
            written = start = stop
            if time.perf_counter() - began < 0.1:  # seconds; a reader sees no stutter
                block *= 2

    def _record(self) -> None:
        """Take one step, which also loads kernels and workspaces, and record the graph of a step."""
        with torch.cuda.device(self.token.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._step_on_device()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph, generator = torch.cuda.CUDAGraph(), self.sampler.generator
            before = generator.clone_state()
            self.graph.register_generator_state(generator)
            try:
                with torch.cuda.graph(self.graph):
                    self._step_on_device()
            except RuntimeError:  # the same tokens, one launch after the other
                # The state in use still waits for the end of the recording.
                generator.graphsafe_set_state(before)
                self.graph = SimpleNamespace(replay=self._step_on_device)


class _Block:
    """A NanoGPTBlock at one token, over plain functions."""

    def __init__(self, block: NanoGPTBlock):
        attention, mlp = block.attn, block.mlp
        self.heads, self.scaling = (3, -1, attention.head_dim), attention.scaling
        self.ln_1, self.ln_2 = _plain(block.ln_1), _plain(block.ln_2)
        self.c_attn, self.c_proj = _plain(attention.c_attn), _plain(attention.c_proj)
        self.qk_norm = _side_by_side(attention.q_norm, attention.k_norm) if attention.config.qk_norm else None
        self.c_fc, self.c_out = _plain(mlp.c_fc), _plain(mlp.c_proj)
        self.activation = _swiglu if mlp.gated else mlp.activation

    def __call__(self, x, cache, position, rotation, mask):
        B, C = x.shape
        keys, values = cache  # B H L D
        qk, value = self.c_attn(self.ln_1(x)).view(B, *self.heads).split((2, 1), dim=1)  # B 2 H D, B 1 H D
        if self.qk_norm is not None:
            qk = self.qk_norm(qk)
        if rotation is not None:
            qk = _rotate(qk, *rotation)
        query, key = qk.unbind(1)  # B H D
        keys.index_copy_(2, position, key.unsqueeze(2))
        values.index_copy_(2, position, value.transpose(1, 2))
        mixed = F.scaled_dot_product_attention(query.unsqueeze(2), keys, values, mask, scale=self.scaling)
        x = x + self.c_proj(mixed.reshape(B, C))
        return x + self.c_out(self.activation(self.c_fc(self.ln_2(x))))


def _rotate(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """modeling_nanogpt.rotate of x (… D) with the sign in the table."""
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * signed_sin).to(x.dtype)


def _swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, given weight sqrt(C) and floor sqrt(C eps)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return (x / norm.hypot(floor) * weight).to(x.dtype)


def _side_by_side(q_norm: nn.Module, k_norm: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The norms of queries and keys as one function of both (B 2 H D)."""
    if type(q_norm) is type(k_norm) is RMSNorm:
        return _plain_rms_norm(q_norm, torch.stack((q_norm.weight, k_norm.weight))[:, None])
    norms = _plain(q_norm), _plain(k_norm)
    return lambda x: torch.stack([norm(part) for norm, part in zip(norms, x.unbind(1), strict=True)], dim=1)


def _plain_rms_norm(module: RMSNorm, weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    C = module.normalized_shape[0]
    floor = torch.tensor(math.sqrt(C * module.eps), device=weight.device)
    return partial(_rms_norm, weight=weight.float() * math.sqrt(C), floor=floor)


def _plain(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """A layer as a function of x (B C): no hooks, no reshaping. What is not one of the network's own stays itself."""
    if type(module) is nn.LayerNorm:
        shape = module.normalized_shape
        return lambda x: torch.layer_norm(x, shape, module.weight, module.bias, module.eps)
    if type(module) is RMSNorm:
        return _plain_rms_norm(module, module.weight)
    if type(module) not in (Conv1D, nn.Linear):
        return module
    weight, bias = module.weight, module.bias
    split = weight.device.type == "cpu" and weight.numel() >= SPLIT_FROM and torch.get_num_threads() > 1
    if type(module) is Conv1D:
        return _split_by_inputs(weight, bias) if split else partial(torch.addmm, bias, mat2=weight)
    return _split_by_outputs(weight, bias) if split else partial(F.linear, weight=weight, bias=bias)


def _split_by_inputs(weight: torch.Tensor, bias: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """x (B I) @ weight (I O) + bias (O), a share of the inputs on each thread."""
    inputs, outputs = weight.shape
    parts = max(n for n in range(1, torch.get_num_threads() + 1) if inputs % n == 0)
    weights = weight.view(parts, -1, outputs)
    biases = torch.cat((bias[None], bias.new_zeros(parts - 1, outputs)))[:, None]
    return lambda x: torch.baddbmm(biases, x.view(len(x), parts, -1).transpose(0, 1), weights).sum(0)


def _split_by_outputs(
    weight: torch.Tensor, bias: torch.Tensor | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """x (B I) @ weight (O I) transposed + bias (O), a share of the outputs on each thread."""
    outputs, inputs = weight.shape
    parts = min(torch.get_num_threads(), outputs)
    even = outputs - outputs % parts
    weights, rest = weight[:even].view(parts, -1, inputs).transpose(1, 2), weight[even:]

    def product(x):
        y = torch.matmul(x, weights).transpose(0, 1).reshape(len(x), even)
        y = torch.cat((y, F.linear(x, rest)), dim=1) if len(rest) else y
        return y if bias is None else y + bias

    return product


def make_decoder(
    model: PreTrainedModel, sampler: Sampler, rows: int, room: int
) -> CachedDecoder | StaticDecoder:
    # A subclass (FSDP makes one), a wrapper (peft, compiled) or a device map need not hold its weights where the step looks.
    if type(model) is NanoGPTForCausalLM and not hasattr(model, "hf_device_map"):
        return StaticDecoder(model, sampler, rows, room)
    return CachedDecoder(model, sampler)
