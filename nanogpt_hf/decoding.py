"""One token after another: how the next token is drawn, and the fast step of our own models.

Shapes: B rows, T time (tokens), C channels, H heads, D head size, V vocabulary, L room in the cache.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .model.modeling_nanogpt import NanoGPTBlock, NanoGPTForCausalLM, rotate, rotation_angles


class Sampler:
    """Draws the next token (B) from logits (B V): temperature, then top-k, then top-p, as transformers orders them.

    The draw is the exponential race: with noise q of Exp(1), argmax(p / q) is a sample of p. It asks nothing of the
    host, so a CUDA graph can hold it, and it takes k candidates for what they are; transformers' warpers with
    torch.multinomial write -inf over the whole vocabulary first.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ):
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
        if self.temperature == 0:
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
    """Any causal language model, through its own forward and cache."""

    def __init__(self, model: PreTrainedModel, sampler: Sampler):
        self.model, self.sampler = model, sampler

    def continue_(self, ids: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
        """The `count` tokens that follow a text (B T), each B; T + count may be one more than the context."""
        unread, cache = ids, None
        for _ in range(count):
            output = self.model(input_ids=unread, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            token = self.sampler(output.logits[:, -1])
            yield token
            unread = token[:, None]


class StaticDecoder:
    """A NanoGPTForCausalLM, through a step of its own over a cache of fixed place and size.

    Args:
        rows: B.
        room: how many tokens the cache holds for each row.
    """

    def __init__(self, model: NanoGPTForCausalLM, sampler: Sampler, rows: int, room: int):
        self.model, self.sampler = model, sampler
        config, network = model.config, model.transformer
        self.blocks = [_Block(block) for block in network.h]
        self.norm, self.head = _plain(network.ln_f), _plain(model.lm_head)
        weight = network.wte.weight
        on_device = {"device": weight.device, "dtype": torch.long}
        self.cache = weight.new_zeros(
            config.n_layer, 2, rows, config.n_head, room, config.n_embd // config.n_head
        )
        self.columns = torch.arange(room, **on_device)
        self.text = torch.zeros(
            rows, room + 1, **on_device
        )  # what a graph has written; the prompt is left out
        self.token = torch.zeros(rows, **on_device)  # the next to be read,
        self.position = torch.zeros(1, **on_device)  # and its place
        self.rotation = None
        if config.positions == "rotary":
            self.rotation = [table[0, 0] for table in rotation_angles(config, self.columns[None])]  # L D each
        self.graph = None

    def continue_(self, ids: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
        """As CachedDecoder's; on CUDA the tokens come in blocks, and on the CPU."""
        T = ids.shape[1]
        output = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        for ours, theirs in zip(self.cache, output.past_key_values.layers, strict=True):
            ours[0, :, :, :T], ours[1, :, :, :T] = theirs.keys, theirs.values
        self.token.copy_(self.sampler(output.logits[:, -1]))
        self.position.fill_(T)
        if self.token.is_cuda:
            yield from self._replay(T, count)
            return
        for length in range(T + 1, T + count):
            yield self.token.clone()
            self._step(length)
        yield self.token.clone()

    def _step(self, length: int, mask: torch.Tensor | None = None) -> None:
        """Read self.token as the last of at most `length` tokens, and draw the one that follows it."""
        network = self.model.transformer
        x = F.embedding(self.token, network.wte.weight)  # B C
        rotation = None
        if self.rotation is None:
            x = x + network.wpe.weight.index_select(0, self.position)
        else:
            rotation = [table.index_select(0, self.position) for table in self.rotation]  # 1 D each
        for block, cache in zip(self.blocks, self.cache, strict=True):
            x = block(x, cache, self.position, length, rotation, mask)
        self.token.copy_(self.sampler(self.head(self.norm(x))))
        self.position += 1

    def _step_on_device(self) -> None:
        """The same step with nothing in it that the host has to know: it looks at the whole cache, and masks."""
        mask = torch.zeros_like(self.columns, dtype=self.cache.dtype)
        mask = mask.masked_fill(self.columns > self.position, -torch.inf)
        self._step(len(self.columns), mask[None, None, None])
        self.text.index_copy_(1, self.position, self.token[:, None])

    def _replay(self, T: int, count: int) -> Iterator[torch.Tensor]:
        self.text[:, T] = self.token
        ready, end, block = (
            T + 1,
            T + count,
            8,
        )  # tokens in self.text; where to stop; tokens until the host looks
        given = T
        if self.graph is None and ready < end:
            self._record()
            ready += 1
        while given < end:
            start = time.perf_counter()
            block_end = min(given + block, end)
            for _ in range(block_end - ready):
                self.graph.replay()
            yield from self.text[:, given:block_end].cpu().unbind(1)
            given = ready = block_end
            if time.perf_counter() - start < 0.1:
                block *= 2

    def _record(self) -> None:
        """One step, which also loads kernels and workspaces; then the graph of it, which computes nothing yet."""
        with torch.cuda.device(self.token.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._step_on_device()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            self.graph.register_generator_state(self.sampler.generator)
            with torch.cuda.graph(self.graph):
                self._step_on_device()


class _Block:
    """The functions of a NanoGPTBlock at one token."""

    def __init__(self, block: NanoGPTBlock):
        attention, mlp = block.attn, block.mlp
        self.heads, self.scaling = (3, -1, attention.head_dim), attention.scaling
        self.ln_1, self.ln_2 = _plain(block.ln_1), _plain(block.ln_2)
        self.c_attn, self.c_proj = _plain(attention.c_attn), _plain(attention.c_proj)
        self.c_fc, self.c_out = _plain(mlp.c_fc), _plain(mlp.c_proj)
        self.qk_norm = (attention.q_norm, attention.k_norm) if attention.config.qk_norm else None
        self.activation = None if mlp.gated else mlp.activation

    def __call__(self, x, cache, position, length, rotation, mask):
        B, C = x.shape
        qkv = self.c_attn(self.ln_1(x)).view(B, *self.heads)  # B 3 H D
        query, key, value = qkv.unbind(1)
        if self.qk_norm is not None:
            query, key = self.qk_norm[0](query), self.qk_norm[1](key)
        if rotation is not None:
            query, key = rotate(query, *rotation), rotate(key, *rotation)
        keys, values = cache.unbind(0)
        keys.index_copy_(2, position, key.unsqueeze(2))
        values.index_copy_(2, position, value.unsqueeze(2))
        mixed = F.scaled_dot_product_attention(
            query.unsqueeze(2), keys[:, :, :length], values[:, :, :length], mask, scale=self.scaling
        )
        x = x + self.c_proj(mixed.view(B, C))
        hidden = self.c_fc(self.ln_2(x))
        if self.activation is None:
            gate, value = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * value
        else:
            hidden = self.activation(hidden)
        return x + self.c_out(hidden)


def _plain(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """A layer as a function of x (B C)."""
    if type(module) is Conv1D:
        return partial(torch.addmm, module.bias, mat2=module.weight)
    if type(module) is nn.Linear:
        return partial(F.linear, weight=module.weight, bias=module.bias)
    if type(module) is nn.LayerNorm:
        return partial(
            torch.layer_norm,
            normalized_shape=module.normalized_shape,
            weight=module.weight,
            bias=module.bias,
            eps=module.eps,
        )
    return module


def make_decoder(
    model: PreTrainedModel, sampler: Sampler, rows: int, room: int
) -> CachedDecoder | StaticDecoder:
    # A subclass (FSDP makes one) or a wrapper (peft, compiled) need not hold its weights where the step looks.
    if type(model) is NanoGPTForCausalLM:
        return StaticDecoder(model, sampler, rows, room)
    return CachedDecoder(model, sampler)
