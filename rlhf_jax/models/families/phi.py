"""Phi-1, 1.5 and 2: one norm feeds attention and MLP side by side; the head has a bias."""

from typing import Any

from rlhf_jax.models import rope
from rlhf_jax.models.families import plain
from rlhf_jax.models.layers import act_name
from rlhf_jax.models.rules import Family, Rule, dense, norm, table
from rlhf_jax.models.spec import Spec


def spec(config: dict[str, Any]) -> Spec:
    width, heads = config["hidden_size"], config["num_attention_heads"]
    return plain.spec(
        config,
        width=width,
        heads=heads,
        number=config["num_hidden_layers"],
        mlp_width=config["intermediate_size"],
        rope=rope.from_config(config, int(width // heads * rope.partial(config, 0.5))),
        kv_heads=config.get("num_key_value_heads") or heads,
        branches="parallel_one_norm",
        act=act_name(config.get("hidden_act", "gelu_new")),
        norm_eps=config.get("layer_norm_eps", 1e-5),
        qk_norm="head" if config.get("qk_layernorm", False) else "none",
        head_bias=True,
        tied=bool(config.get("tie_word_embeddings", False)),
        max_length=config.get("max_position_embeddings") or 0,
    )


def rules(spec: Spec) -> list[Rule]:
    layer = "model.layers.{layer}"
    return [
        *table("model.embed_tokens", "embed"),
        *norm("model.final_layernorm", "final_norm"),
        *dense("lm_head", "head"),
        *(rule for name in "qkv" for rule in dense(f"{layer}.self_attn.{name}_proj", f"layers/attention/{name}")),
        *norm(f"{layer}.self_attn.q_layernorm", "layers/attention/q_norm"),
        *norm(f"{layer}.self_attn.k_layernorm", "layers/attention/k_norm"),
        *plain.layer_rules(
            layer, attention_norm="input_layernorm", attention_o="self_attn.dense", mlp_up="mlp.fc1", mlp_down="mlp.fc2"
        ),
    ]


PHI = Family(spec, rules, "Phi", loads="Phi-1, 1.5 1.3B, Phi-2 2.7B")
