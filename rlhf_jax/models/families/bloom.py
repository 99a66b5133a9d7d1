"""BLOOM: ALiBi, a norm of the embeddings, queries, keys and values interleaved by head."""

from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.models.families import plain
from rlhf_jax.models.rules import Family, Rule, dense, grouped_qkv, norm, table
from rlhf_jax.models.spec import Spec


def spec(config: dict[str, Any]) -> Spec:
    if config.get("apply_residual_connection_post_layernorm"):
        raise UserError("config.json: apply_residual_connection_post_layernorm is true; that residual is not supported")
    width = config.get("hidden_size") or config["n_embed"]
    return plain.spec(
        config,
        width=width,
        heads=config.get("n_head") or config["num_attention_heads"],
        number=config.get("n_layer") or config["num_hidden_layers"],
        mlp_width=4 * width,
        positions="alibi",
        embed_norm=True,
        act="gelu_tanh",
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        tied=bool(config.get("tie_word_embeddings", True)),
    )


def rules(spec: Spec) -> list[Rule]:
    layer = "transformer.h.{layer}"
    return [
        *table("transformer.word_embeddings", "embed"),
        *norm("transformer.word_embeddings_layernorm", "embed_norm"),
        *norm("transformer.ln_f", "final_norm"),
        *dense("lm_head", "head"),
        *grouped_qkv(f"{layer}.self_attention.query_key_value", "layers/attention", spec),
        *plain.layer_rules(
            layer,
            attention_norm="input_layernorm",
            mlp_norm="post_attention_layernorm",
            attention_o="self_attention.dense",
            mlp_up="mlp.dense_h_to_4h",
            mlp_down="mlp.dense_4h_to_h",
        ),
    ]


BLOOM = Family(spec, rules, "Bloom", prefix="transformer.", value_name="classifier", loads="BLOOM 560M to 176B, BLOOMZ")
