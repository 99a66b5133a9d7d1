"""GPT-2: learned positions, matrices stored [in, out]."""

from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.models.families import llama, plain
from rlhf_jax.models.layers import act_name
from rlhf_jax.models.rules import Family, Rule, dense, fused, norm, same, table
from rlhf_jax.models.spec import Spec


def spec(config: dict[str, Any]) -> Spec:
    if config.get("add_cross_attention"):
        raise UserError("config.json: add_cross_attention is true; only decoders without an encoder are supported")
    width, heads, number = config["n_embd"], config["n_head"], config["n_layer"]
    made = plain.spec(
        config,
        width=width,
        heads=heads,
        number=number,
        mlp_width=config.get("n_inner") or 4 * width,
        act=act_name(config.get("activation_function", "gelu_new")),
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        positions="learned",
        position_rows=config["n_positions"],
        tied=bool(config.get("tie_word_embeddings", True)),
        max_length=config["n_positions"],
    )
    scale = made.layers[0].scale if config.get("scale_attn_weights", True) else 1.0
    inverse = config.get("scale_attn_by_inverse_layer_idx", False)
    return llama.per_layer(made, scale=[scale / (i + 1) if inverse else scale for i in range(number)])


def rules(spec: Spec) -> list[Rule]:
    layer = "transformer.h.{layer}"
    return [
        *table("transformer.wte", "embed"),
        *table("transformer.wpe", "positions"),
        *norm("transformer.ln_f", "final_norm"),
        *dense("lm_head", "head"),
        *norm(f"{layer}.ln_1", "layers/attention_norm"),
        *norm(f"{layer}.ln_2", "layers/mlp_norm"),
        *fused(f"{layer}.attn.c_attn", [f"layers/attention/{x}" for x in "qkv"], spec.width, (spec.width,) * 3, stored=same),
        *dense(f"{layer}.attn.c_proj", "layers/attention/o", same),
        *dense(f"{layer}.mlp.c_fc", "layers/mlp/up", same),
        *dense(f"{layer}.mlp.c_proj", "layers/mlp/down", same),
    ]


GPT2 = Family(
    spec,
    rules,
    "GPT2",
    lm="GPT2LMHeadModel",
    prefix="transformer.",
    value_name="classifier",
    loads="GPT-2 82M to 1.5B",
)
