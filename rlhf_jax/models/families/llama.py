"""Llama 2 and 3, and all that spell themselves like it: the family that most others change a little."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.models import rope
from rlhf_jax.models.layers import act_name
from rlhf_jax.models.rules import Family, Rule, dense, norm, table
from rlhf_jax.models.spec import Layer, Spec


def spec(config: dict[str, Any], **changes: Any) -> Spec:
    """Pre-norm RMS, rope, gated MLP. `changes` are fields of the spec in which another family differs."""
    heads = config["num_attention_heads"]
    head_dim = changes.get("head_dim") or config.get("head_dim") or config["hidden_size"] // heads
    layer = Layer(rope=rope.from_config(config, int(head_dim * rope.partial(config))), scale=head_dim**-0.5)
    bias = bool(config.get("attention_bias", False))
    fields = {
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
    }
    return Spec(**fields | changes)


def per_layer(spec: Spec, **columns: Sequence[Any]) -> Spec:
    """The spec with fields of its layers replaced, one value a layer."""
    for name, column in columns.items():
        if len(column) != len(spec.layers):
            raise UserError(f"config.json: {len(column)} entries for the {name} of {len(spec.layers)} layers; give one a layer")
    rows = ({name: column[i] for name, column in columns.items()} for i in range(len(spec.layers)))
    return dataclasses.replace(
        spec, layers=tuple(dataclasses.replace(x, **row) for x, row in zip(spec.layers, rows, strict=True))
    )


def sliding(spec: Spec, window: int | None, types: Sequence[str]) -> Spec:
    """The window on the layers whose type is sliding_attention."""
    return per_layer(spec, window=[window if kind == "sliding_attention" else None for kind in types])


def attention_rules(theirs: str) -> list[Rule]:
    """q, k, v and o stored apart, with norms of queries and keys where there are any."""
    mats = [rule for name in "qkvo" for rule in dense(f"{theirs}.{name}_proj", f"layers/attention/{name}")]
    return mats + norm(f"{theirs}.q_norm", "layers/attention/q_norm") + norm(f"{theirs}.k_norm", "layers/attention/k_norm")


def rules(spec: Spec) -> list[Rule]:
    """Tensors of Llama; biases and norms of queries and keys count where the spec has them."""
    layer = "model.layers.{layer}"
    return [
        *table("model.embed_tokens", "embed"),
        *norm("model.norm", "final_norm"),
        *dense("lm_head", "head"),
        *norm(f"{layer}.input_layernorm", "layers/attention_norm"),
        *norm(f"{layer}.post_attention_layernorm", "layers/mlp_norm"),
        *attention_rules(f"{layer}.self_attn"),
        *(rule for name in ("gate", "up", "down") for rule in dense(f"{layer}.mlp.{name}_proj", f"layers/mlp/{name}")),
    ]


LLAMA = Family(
    spec,
    rules,
    "Llama",
    loads="Llama 2, 3, 3.1, 3.2, 3.3 1B to 405B; SmolLM 1 and 2 135M to 1.7B, TinyLlama 1.1B, Yi, DeepSeek-R1-Distill-Llama",
)
