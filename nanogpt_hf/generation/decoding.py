"""One token after another: how the next token is drawn, and the fast step of our own models.

Shapes: B rows, T time (tokens), C channels, H heads, K heads of keys and values, D head size, V vocabulary, L room in
the cache.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from inspect import signature
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..common.errors import UserError
from ..common.kernels import kernels
from ..model.modeling_nanogpt import (
    NanoGPTAttention,
    NanoGPTBlock,
    NanoGPTForCausalLM,
    RMSNorm,
    rotation_angles,
)
from .layers import plain, plain_rms_norm, swiglu

# Below this temperature the likeliest token has all the probability that float32 tells from none, unless two logits tie.
COLDEST = 1e-5
CACHES = (
    "past_key_values",
    "cache_params",
    "state",
)  # attention's, and those of recurrent models as Mamba and RWKV


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
        forward = model.get_base_model().forward if hasattr(model, "get_base_model") else model.forward
        self.last = {"logits_to_keep": 1} if "logits_to_keep" in signature(forward).parameters else {}

    def continue_(self, ids: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
        """The `count` tokens that follow a text (B T), each B; T + count may be one more than the context."""
        unread = ids
        cache: dict[str, Any] = {}
        for _ in range(count):
            output = self.model(input_ids=unread, use_cache=True, **self.last, **cache)
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
        int8: hold the weights of projections and head in 8 bits beside the model's own; on a CPU.
    """

    def __init__(self, model: NanoGPTForCausalLM, sampler: Sampler, rows: int, room: int, int8: bool = False):
        self.model, self.sampler = model, sampler
        config, network = model.config, model.transformer
        self.wte = network.wte.weight
        room = -(-room // 16) * 16  # CUDA's attention wants the rows of its mask aligned
        self.blocks = [_Block(block, int8) for block in network.h]
        self.norm, self.head = plain(network.ln_f), plain(model.lm_head, int8)
        on_device = {"device": self.wte.device, "dtype": torch.long}
        D = config.head_dim
        self.keys, self.values = self.wte.new_zeros(2, config.n_layer, rows, config.n_kv_head, room, D)
        self.columns = torch.arange(room, **on_device)
        self.position = torch.zeros(1, **on_device)  # of the token to be read
        if config.positions == "rotary":
            cos, sin = (table[0, 0] for table in rotation_angles(config, self.columns[None]))  # L D
            self.rotation = cos.contiguous(), torch.cat((-sin[:, : D // 2], sin[:, D // 2 :]), dim=1)
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
        if self.rotation is None:
            x = x + self.wpe.index_select(0, self.position)
        for block, *cache in zip(self.blocks, self.keys, self.values, strict=True):
            x = block(x, cache, self.position, self.rotation, length, mask)
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

    def __init__(self, block: NanoGPTBlock, int8: bool):
        attention, mlp = block.attn, block.mlp
        self.heads, self.head_dim, self.scaling = attention.heads, attention.head_dim, attention.scaling
        self.ln_1, self.ln_2 = plain(block.ln_1), plain(block.ln_2)
        self.c_attn, self.c_proj = plain(attention.c_attn, int8), plain(attention.c_proj, int8)
        self.c_fc, self.c_out = plain(mlp.c_fc, int8), plain(mlp.c_proj, int8)
        fused = kernels(f"{__package__}.step_kernels", attention.c_attn.weight.device)
        self.place_heads = _place_heads(attention, fused)
        self.activation = mlp.activation
        if mlp.gated:
            self.activation = fused.swiglu if fused else swiglu

    def __call__(
        self,
        x: torch.Tensor,
        cache: Sequence[torch.Tensor],
        position: torch.Tensor,
        rotation: Sequence[torch.Tensor] | None,
        length: Any,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        B, K = len(x), self.heads[1]
        keys, values = cache  # B K L D
        query = self.place_heads(
            self.c_attn(self.ln_1(x)).view(B, -1, self.head_dim), keys, values, position, rotation
        )  # B H D
        # The heads of a group stand where the tokens of a query would: one read of the cache serves them all.
        mixed = F.scaled_dot_product_attention(
            query.view(B, K, -1, self.head_dim),
            keys[:, :, :length],
            values[:, :, :length],
            mask,
            scale=self.scaling,
        )
        x = x + self.c_proj(mixed.reshape(B, -1))
        return x + self.c_out(self.activation(self.c_fc(self.ln_2(x))))


def _place_heads(attention: NanoGPTAttention, fused: ModuleType | None) -> Callable[..., torch.Tensor]:
    """What makes queries (B H D) of c_attn's output (B (H + 2K) D) and puts keys and values into the cache.

    Its other arguments: keys and values (B K L D), the position, and cosines and signed sines (L D each) or None.
    """
    norms = (attention.q_norm, attention.k_norm) if attention.config.qk_norm else ()
    if fused and all(type(norm) is RMSNorm for norm in norms):
        weights = (torch.cat([norm.weight for norm in norms]), norms[0].eps) if norms else None
        return partial(fused.place_heads, norms=weights)
    heads = attention.heads
    normalize = _side_by_side(*norms, heads) if norms else None

    def place(
        projected: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        position: torch.Tensor,
        rotation: Sequence[torch.Tensor] | None,
    ) -> torch.Tensor:
        qk, value = projected.split((heads[0] + heads[1], heads[2]), dim=1)
        if normalize is not None:
            qk = normalize(qk)
        if rotation is not None:
            qk = _rotate(qk, *(table.index_select(0, position) for table in rotation))
        query, key = qk.split(heads[:2], dim=1)
        keys.index_copy_(2, position, key.unsqueeze(2))
        values.index_copy_(2, position, value.unsqueeze(2))
        return query

    return place


def _rotate(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """modeling_nanogpt.rotate of x (… D) with the sign in the table."""
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * signed_sin).to(x.dtype)


def _side_by_side(
    q_norm: nn.Module, k_norm: nn.Module, heads: tuple[int, int, int]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The norms of queries and keys as one function of both (B (H + K) D)."""
    if type(q_norm) is type(k_norm) is RMSNorm:
        weights = [
            norm.weight.expand(count, -1) for norm, count in zip((q_norm, k_norm), heads, strict=False)
        ]
        return plain_rms_norm(q_norm, torch.cat(weights))
    norms = plain(q_norm), plain(k_norm)
    return lambda x: torch.cat(
        [norm(part) for norm, part in zip(norms, x.split(heads[:2], dim=1), strict=True)], dim=1
    )


def make_decoder(
    model: PreTrainedModel, sampler: Sampler, rows: int, room: int, int8: bool = False
) -> CachedDecoder | StaticDecoder:
    """The fastest decoder of a model.

    Raises:
        UserError: int8, and the model is not one of ours on a CPU.
    """
    # A subclass (FSDP makes one), a wrapper (peft, compiled) or a device map need not hold its weights where the step looks.
    ours = type(model) is NanoGPTForCausalLM and not hasattr(model, "hf_device_map")
    if int8 and not (ours and model.device.type == "cpu"):
        raise UserError(
            "weights of 8 bits need a CPU, and a model that is a GPT-2, a Qwen3 or a Llama: leave int8 out."
        )
    return StaticDecoder(model, sampler, rows, room, int8) if ours else CachedDecoder(model, sampler)
