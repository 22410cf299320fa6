# SPDX-License-Identifier: Apache-2.0
"""Named configurations: small ones of ours that need no download, and those of the models that the paper uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A model configuration under a short name.

    Attributes:
        about: one line for `deepfusion list`.
        config: Hugging Face configuration keys, `model_type` among them.
        hub: the model that the configuration is copied from, or None for one of ours.
    """

    about: str
    config: dict[str, Any]
    hub: str | None = None


def _gpt2(width: int, depth: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2", "n_embd": width, "n_layer": depth, "n_head": heads,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }  # fmt: skip


def _llama(width: int, depth: int, heads: int, inner: int, model_type: str = "llama") -> dict[str, Any]:
    return {
        "model_type": model_type, "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads,
        "num_key_value_heads": heads, "intermediate_size": inner, "tie_word_embeddings": True,
    }  # fmt: skip


def _bloom(width: int, depth: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "bloom", "hidden_size": width, "n_layer": depth, "n_head": heads,
        "hidden_dropout": 0.0, "attention_dropout": 0.0,
    }  # fmt: skip


def _qwen2_moe(width: int, depth: int, heads: int, expert: int, experts: int = 4, top: int = 2) -> dict[str, Any]:
    return {
        "model_type": "qwen2_moe", "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads,
        "num_key_value_heads": heads, "intermediate_size": 2 * expert, "moe_intermediate_size": expert,
        "shared_expert_intermediate_size": expert, "num_experts": experts, "num_experts_per_tok": top,
        "norm_topk_prob": True, "tie_word_embeddings": True,
    }  # fmt: skip


def _unshared(
    model_type: str, width: int, depth: int, heads: int, expert: int, experts: int = 4, top: int = 2
) -> dict[str, Any]:
    """Qwen3-MoE, Mixtral, OLMoE: no shared experts. Each has names of its own for the two numbers."""
    values: dict[str, Any] = {
        "model_type": model_type, "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads,
        "num_key_value_heads": heads, "num_experts_per_tok": top, "tie_word_embeddings": True,
    }  # fmt: skip
    values |= {"num_experts" if model_type == "olmoe" else "num_local_experts": experts}
    if model_type == "qwen3_moe":
        return values | {"moe_intermediate_size": expert, "norm_topk_prob": True}
    return values | {"intermediate_size": expert}


def _deepseek(
    version: int, width: int, depth: int, heads: int, expert: int, experts: int = 4, top: int = 2
) -> dict[str, Any]:
    head = width // heads
    return {
        "model_type": f"deepseek_v{version}", "hidden_size": width, "num_hidden_layers": depth,
        "num_attention_heads": heads, "num_key_value_heads": heads, "kv_lora_rank": width // 2, "q_lora_rank": None,
        "qk_nope_head_dim": head // 2, "qk_rope_head_dim": head // 2, "v_head_dim": head,
        "intermediate_size": 2 * expert, "moe_intermediate_size": expert, "n_shared_experts": 1,
        "n_routed_experts": experts, "num_experts_per_tok": top, "first_k_dense_replace": 1, "norm_topk_prob": True,
        "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "tie_word_embeddings": True,
    }  # fmt: skip


PRESETS: dict[str, Preset] = {
    # for tests: a few thousand parameters
    "gpt2-pico": Preset("GPT-2, 2 layers of 32", _gpt2(32, 2, 2)),
    "llama-pico": Preset("Llama, 2 layers of 32", _llama(32, 2, 2, 64)),
    "olmo2-pico": Preset("OLMo-2, 2 layers of 32", _llama(32, 2, 2, 64, "olmo2")),
    "bloom-pico": Preset("BLOOM, 2 layers of 32", _bloom(32, 2, 2)),
    "qwen2-moe-pico": Preset("Qwen2-MoE, 2 layers of 32, 4 experts, top-2", _qwen2_moe(32, 2, 2, 48)),
    "deepseek-v2-pico": Preset("DeepSeek-V2, 2 layers of 32, 4 experts, top-2", _deepseek(2, 32, 2, 2, 48)),
    "deepseek-v3-pico": Preset("DeepSeek-V3, 2 layers of 32, 4 experts, top-2", _deepseek(3, 32, 2, 2, 48)),
    "qwen3-moe-pico": Preset("Qwen3-MoE, 2 layers of 32, 4 experts, top-2", _unshared("qwen3_moe", 32, 2, 2, 48)),
    "mixtral-pico": Preset("Mixtral, 2 layers of 32, 4 experts, top-2", _unshared("mixtral", 32, 2, 2, 48)),
    "olmoe-pico": Preset("OLMoE, 2 layers of 32, 4 experts, top-2", _unshared("olmoe", 32, 2, 2, 48)),
    # for a laptop: about half a million parameters a device, 1 to 3 million a MoE, at 2,048 tokens of vocabulary
    "gpt2-tiny": Preset("GPT-2, 3 layers of 112", _gpt2(112, 3, 4)),
    "llama-tiny": Preset("Llama, 4 layers of 96", _llama(96, 4, 4, 256)),
    "olmo2-tiny": Preset("OLMo-2, 3 layers of 104", _llama(104, 3, 4, 288, "olmo2")),
    "bloom-tiny": Preset("BLOOM, 3 layers of 96", _bloom(96, 3, 4)),
    "qwen2-moe-tiny": Preset("Qwen2-MoE, 4 layers of 128, 4 experts of 256, top-2", _qwen2_moe(128, 4, 4, 256)),
    "deepseek-v2-tiny": Preset("DeepSeek-V2, 4 layers of 128, 4 experts of 256, top-2", _deepseek(2, 128, 4, 4, 256)),
    "deepseek-v3-tiny": Preset("DeepSeek-V3, 4 layers of 128, 4 experts of 256, top-2", _deepseek(3, 128, 4, 4, 256)),
    "qwen3-moe-tiny": Preset("Qwen3-MoE, 4 layers of 128, 4 experts of 384, top-2", _unshared("qwen3_moe", 128, 4, 4, 384)),
    "mixtral-tiny": Preset("Mixtral, 4 layers of 128, 4 experts of 384, top-2", _unshared("mixtral", 128, 4, 4, 384)),
    "olmoe-tiny": Preset("OLMoE, 4 layers of 128, 4 experts of 384, top-2", _unshared("olmoe", 128, 4, 4, 384)),
    # about ten million parameters at 8,192 tokens of vocabulary
    "gpt2-small": Preset("GPT-2, 6 layers of 320", _gpt2(320, 6, 5)),
    "llama-small": Preset("Llama, 8 layers of 288", _llama(288, 8, 6, 768)),
    "olmo2-small": Preset("OLMo-2, 6 layers of 320", _llama(320, 6, 5, 864, "olmo2")),
    "bloom-small": Preset("BLOOM, 6 layers of 320", _bloom(320, 6, 5)),
    "qwen2-moe-small": Preset("Qwen2-MoE, 8 layers of 384, 8 experts, top-2", _qwen2_moe(384, 8, 6, 768, 8)),
    # what the paper uses; weights come from the hub
    "gpt2": Preset("GPT-2, 124M", {**_gpt2(768, 12, 12), "vocab_size": 50257, "n_positions": 1024}, "openai-community/gpt2"),
    "gpt2-medium": Preset(
        "GPT-2 Medium, 355M", {**_gpt2(1024, 24, 16), "vocab_size": 50257, "n_positions": 1024}, "openai-community/gpt2-medium"
    ),
    "tinyllama-1.1b": Preset(
        "TinyLlama, 1.1B",
        {
            **_llama(2048, 22, 32, 5632), "num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": False,
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        },
        "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    ),
    "olmo-1.2b": Preset(
        "OLMo, 1.2B",
        {**_llama(2048, 16, 16, 8192, "olmo"), "vocab_size": 50304, "max_position_embeddings": 2048},
        "allenai/OLMo-1B-hf",
    ),
    "bloom-1.1b": Preset("BLOOM, 1.1B", {**_bloom(1536, 24, 16), "vocab_size": 250880}, "bigscience/bloom-1b1"),
    "qwen1.5-moe-a2.7b": Preset(
        "Qwen1.5-MoE, 14.3B, 60 experts, top-4",
        {
            **_qwen2_moe(2048, 24, 16, 1408, 60, 4), "intermediate_size": 5632, "shared_expert_intermediate_size": 5632,
            "vocab_size": 151936, "max_position_embeddings": 8192, "tie_word_embeddings": False, "rope_theta": 1000000.0,
        },
        "Qwen/Qwen1.5-MoE-A2.7B",
    ),
    # The published model has plain multi-head attention and brings code of its own; the native family nearest to it is V2.
    # Its latent attention is sized so that the model has 16.365 billion parameters, where the published one has 16.376.
    "deepseek-moe-16b": Preset(
        "DeepSeekMoE, 16.4B, 64 experts, top-6, as deepseek_v2",
        {
            **_deepseek(2, 2048, 28, 16, 1408, 64, 6), "kv_lora_rank": 1536, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64,
            "v_head_dim": 128, "intermediate_size": 10944, "n_shared_experts": 2, "vocab_size": 102400,
            "max_position_embeddings": 4096, "tie_word_embeddings": False,
        },
        "deepseek-ai/deepseek-moe-16b-base",
    ),
}  # fmt: skip
