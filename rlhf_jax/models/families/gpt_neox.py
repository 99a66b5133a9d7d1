"""GPT-NeoX and Pythia: rope on a part of each head, queries, keys and values interleaved by head."""

from typing import Any

from rlhf_jax.models import rope
from rlhf_jax.models.families import plain
from rlhf_jax.models.layers import act_name
from rlhf_jax.models.rules import Family, Rule, dense, grouped_qkv, norm, table
from rlhf_jax.models.spec import Spec


def spec(config: dict[str, Any]) -> Spec:
    width, heads = config["hidden_size"], config["num_attention_heads"]
    share = rope.partial(config, config.get("rotary_pct", 0.25))
    theta = config.get("rotary_emb_base", 10000)
    bias = bool(config.get("attention_bias", True))
    return plain.spec(
        config,
        width=width,
        heads=heads,
        number=config["num_hidden_layers"],
        mlp_width=config["intermediate_size"],
        rope=rope.from_config(config, int(width // heads * share), theta=theta),
        branches="parallel" if config.get("use_parallel_residual", True) else "serial",
        act=act_name(config.get("hidden_act", "gelu")),
        norm_eps=config.get("layer_norm_eps", 1e-5),
        qkv_bias=bias,
        o_bias=bias,
        tied=bool(config.get("tie_word_embeddings", False)),
        max_length=config.get("max_position_embeddings") or 0,
    )


def rules(spec: Spec) -> list[Rule]:
    layer = "gpt_neox.layers.{layer}"
    return [
        *table("gpt_neox.embed_in", "embed"),
        *norm("gpt_neox.final_layer_norm", "final_norm"),
        *dense("embed_out", "head"),
        *grouped_qkv(f"{layer}.attention.query_key_value", "layers/attention", spec),
        *plain.layer_rules(
            layer,
            attention_norm="input_layernorm",
            mlp_norm="post_attention_layernorm",
            attention_o="attention.dense",
            mlp_up="mlp.dense_h_to_4h",
            mlp_down="mlp.dense_4h_to_h",
        ),
    ]


def old_config(config: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
    return {"rotary_emb_base": parameters["rope_theta"], "rotary_pct": parameters["partial_rotary_factor"]}


GPT_NEOX = Family(
    spec,
    rules,
    "GPTNeoX",
    prefix="gpt_neox.",
    value_name="classifier",
    renamed=(("lm_head.", "embed_out."),),
    old_config=old_config,
    loads="Pythia 14M to 12B, GPT-NeoX 20B, RedPajama, Dolly 2",
)
