"""Attention on whole windows of text, without a mask that has to be made or looked at, for transformers' own classes.

At every call they ask of the positions whether several texts are packed into one window, and wait for the device to
answer; a CUDA graph cannot record that. An attention implementation that transformers knows no mask for is given none,
and torch's kernel masks what is to come by itself.
"""

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "sdpa_without_mask"
AttentionInterface.register(NAME, sdpa_attention_forward)


@torch.no_grad()
def leave_masks_out(model: PreTrainedModel) -> bool:
    """Make a model that is to see whole windows only do without masks, where that changes nothing.

    Returns:
        Whether it does so now. Not where layers see a part of the past only, or where the model makes more of its
        mask than that: its logits on a few tokens must stay what they are.
    """
    config = model.config.get_text_config()
    layers = getattr(config, "layer_types", None) or []
    partial = getattr(config, "sliding_window", None) or any(kind != "full_attention" for kind in layers)
    if partial or config._attn_implementation != "sdpa":
        return False
    tokens = torch.arange(16, device=model.device)[None] % config.vocab_size
    was_training = model.training
    model.eval()
    before = model(input_ids=tokens, use_cache=False).logits
    model.set_attn_implementation(NAME)
    same = torch.allclose(model(input_ids=tokens, use_cache=False).logits, before, atol=1e-4)
    if not same:
        model.set_attn_implementation("sdpa")
    model.train(was_training)
    return same
