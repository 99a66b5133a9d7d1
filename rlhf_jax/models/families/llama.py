"""Llama 2 and 3, and all that spell themselves like it: the family that most others change a little."""

import json
from typing import Any

from rlhf_jax import config as settings
from rlhf_jax.models import rope
from rlhf_jax.models.layers import act_name
from rlhf_jax.models.spec import Layer, Spec


def spec(config: dict[str, Any], **changes: Any) -> Spec:
    """Pre-norm RMS, rope, gated MLP. `changes` are fields of the spec in which another family differs."""
    heads = config["num_attention_heads"]
    head_dim = changes.pop("head_dim", None) or config.get("head_dim") or config["hidden_size"] // heads
    layer = Layer(rope=rope.from_config(config, int(head_dim * rope.partial(config))), scale=head_dim**-0.5)
    bias = bool(config.get("attention_bias", False))
    fields = {
        "model_type": config["model_type"],
        "vocab_size": config["vocab_size"],
        "width": config["hidden_size"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "mlp_width": config["intermediate_size"],
        "layers": (layer,) * config["num_hidden_layers"],
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "norm_rounds": "before_scale",
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": bool(config.get("mlp_bias", False)),
        "act": act_name(config.get("hidden_act", "silu")),
        "tied": bool(config.get("tie_word_embeddings", False)),
        "max_length": config.get("max_position_embeddings") or 0,
        "origin": json.dumps(config, sort_keys=True),
    }
    return Spec(**fields | changes)


def scratch_spec(scratch: settings.Scratch, vocab_size: int, *, real_vocab: int | None = None) -> Spec:
    """The Llama-type model that `model.scratch` describes, for a vocabulary of `vocab_size` tokens."""
    if scratch.width % scratch.heads or (scratch.width // scratch.heads) % 2:
        raise ValueError(
            f"model.scratch: width {scratch.width} / heads {scratch.heads} must be an even whole number; change one of them"
        )
    if scratch.heads % scratch.kv_heads:
        raise ValueError(f"model.scratch: kv_heads {scratch.kv_heads} must divide heads {scratch.heads}; change one of them")
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab_size,
        "hidden_size": scratch.width,
        "intermediate_size": scratch.mlp_width,
        "num_hidden_layers": scratch.layers,
        "num_attention_heads": scratch.heads,
        "num_key_value_heads": scratch.kv_heads,
        "head_dim": scratch.width // scratch.heads,
        "max_position_embeddings": scratch.max_length,
        "rope_parameters": {"rope_type": "default", "rope_theta": scratch.rope_theta},
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": scratch.tied,
    }
    return spec(config, real_vocab=real_vocab)
