"""Tiny models of the families that people use, made from their configs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 64
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8},
    "phi": {},
    "phi3": {},
    "gpt_neox": {},
    "olmo": {},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4},
    "stablelm": {},
    "glm": {"head_dim": 8},
    "cohere": {},
    "granite": {},
}
"""Rotary families, with what differs from ``COMMON``."""
LAYERS = {"gemma2", "gemma3_text", "gpt_oss", "smollm3", "qwen2", "qwen3"}


def tiny(family: str, layers: int = 2, **settings: Any) -> nn.Module:
    """A model with random weights, in evaluation mode; its layers attend to all tokens."""
    torch.manual_seed(0)
    if family == "gpt2":
        config = AutoConfig.for_model(
            "gpt2", vocab_size=VOCABULARY, n_embd=32, n_layer=layers, n_head=4, n_positions=256
        )
    else:
        given = {**COMMON, "num_hidden_layers": layers, **FAMILIES[family]}
        if family in LAYERS:
            given["layer_types"] = ["full_attention"] * layers
        if "no_rope_layers" in given:
            given["no_rope_layers"] = given["no_rope_layers"][:layers]
        config = AutoConfig.for_model(family, **{**given, **settings})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                # Weights of a common start would attend evenly: a wrong position would not show.
                parameter.mul_(4)
    return model.eval()
