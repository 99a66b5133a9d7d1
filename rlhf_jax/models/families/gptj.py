"""GPT-J: rope on neighbouring dims, one norm for both branches, a head with a bias."""

from typing import Any

from rlhf_jax.models import rope
from rlhf_jax.models.families import plain
from rlhf_jax.models.layers import act_name
from rlhf_jax.models.rules import Family, Rule, dense, norm, table
from rlhf_jax.models.spec import Spec


def spec(config: dict[str, Any]) -> Spec:
    width, heads = config["n_embd"], config["n_head"]
    dims = config.get("rotary_dim") or width // heads
    return plain.spec(
        config,
        width=width,
        heads=heads,
        number=config["n_layer"],
        mlp_width=config.get("n_inner") or 4 * width,
        rope=rope.make_rope({}, dims, theta=10000.0, max_length=config["n_positions"]),
        rope_pairs="neighbours",
        branches="parallel_one_norm",
        act=act_name(config.get("activation_function", "gelu_new")),
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        qkv_bias=False,
        o_bias=False,
        head_bias=True,
        tied=bool(config.get("tie_word_embeddings", False)),
        max_length=config["n_positions"],
    )


def rules(spec: Spec) -> list[Rule]:
    layer = "transformer.h.{layer}"
    return [
        *table("transformer.wte", "embed"),
        *norm("transformer.ln_f", "final_norm"),
        *dense("lm_head", "head"),
        *(rule for name in "qkv" for rule in dense(f"{layer}.attn.{name}_proj", f"layers/attention/{name}")),
        *plain.layer_rules(layer, attention_norm="ln_1", attention_o="attn.out_proj", mlp_up="mlp.fc_in", mlp_down="mlp.fc_out"),
    ]


GPTJ = Family(spec, rules, "GPTJ", value=None, prefix="transformer.", loads="GPT-J 6B")
