"""Falcon: 7B (one norm, one key-value head), 40B and 11B (grouped, parallel), RW (ALiBi, serial)."""

from typing import Any

from rlhf_jax.models import rope
from rlhf_jax.models.families import plain
from rlhf_jax.models.layers import act_name
from rlhf_jax.models.rules import Family, Rule, dense, grouped_qkv, norm, table
from rlhf_jax.models.spec import Spec


def spec(config: dict[str, Any]) -> Spec:
    width, heads = config["hidden_size"], config["num_attention_heads"]
    new, alibi = config.get("new_decoder_architecture", False), config.get("alibi", False)
    grouped = config.get("num_kv_heads") or heads
    many = new or not config.get("multi_query", True)
    two_norms = new and config.get("num_ln_in_parallel_attn") in (None, 2)
    parallel = "parallel" if two_norms else "parallel_one_norm"
    bias = bool(config.get("bias", False))
    return plain.spec(
        config,
        width=width,
        heads=heads,
        number=config["num_hidden_layers"],
        mlp_width=config.get("ffn_hidden_size") or 4 * width,
        rope=None if alibi else rope.from_config(config, width // heads),
        kv_heads=grouped if many else 1,
        positions="alibi" if alibi else "rope",
        alibi_scale=(width // heads) ** -0.5,
        alibi_rounds=True,
        branches=parallel if config.get("parallel_attn", True) else "serial",
        act=act_name(config.get("activation", "gelu")),
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        tied=bool(config.get("tie_word_embeddings", True)),
        max_length=config.get("max_position_embeddings", 2048),
    )


def rules(spec: Spec) -> list[Rule]:
    layer = "transformer.h.{layer}"
    two = spec.branches == "parallel"
    return [
        *table("transformer.word_embeddings", "embed"),
        *norm("transformer.ln_f", "final_norm"),
        *dense("lm_head", "head"),
        *grouped_qkv(f"{layer}.self_attention.query_key_value", "layers/attention", spec),
        *plain.layer_rules(
            layer,
            attention_norm="ln_attn" if two else "input_layernorm",
            mlp_norm="ln_mlp" if two else "post_attention_layernorm",
            attention_o="self_attention.dense",
            mlp_up="mlp.dense_h_to_4h",
            mlp_down="mlp.dense_4h_to_h",
        ),
    ]


FALCON = Family(spec, rules, "Falcon", prefix="transformer.", value_name="classifier", loads="Falcon 1B, 7B, 11B, 40B, 180B, RW")
