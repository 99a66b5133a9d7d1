"""Mistral, Ministral and Mixtral."""

from typing import Any

from rlhf_jax.models.families import llama
from rlhf_jax.models.rules import Family, Rule, dense
from rlhf_jax.models.spec import Experts, Spec


def mistral_spec(config: dict[str, Any]) -> Spec:
    """A window on all layers, or none."""
    spec = llama.spec(config, qkv_bias=False, o_bias=False, mlp_bias=False)
    return llama.per_layer(spec, window=[config.get("sliding_window", 4096)] * len(spec.layers))


def ministral_spec(config: dict[str, Any]) -> Spec:
    """A window on the layers that `layer_types` names."""
    types = config.get("layer_types") or ["sliding_attention"] * config["num_hidden_layers"]
    return llama.sliding(mistral_spec(config), config.get("sliding_window", 4096), types)


def mixtral_spec(config: dict[str, Any]) -> Spec:
    spec = mistral_spec({"sliding_window": None, "rope_theta": 1e6, "rms_norm_eps": 1e-5} | config)
    number = config.get("num_local_experts") or config.get("num_experts") or 8
    experts = Experts(number=number, active=config.get("num_experts_per_tok", 2), width=config["intermediate_size"])
    return llama.per_layer(spec, experts=[experts] * len(spec.layers))


def mixtral_rules(spec: Spec) -> list[Rule]:
    theirs, ours = "model.layers.{layer}.block_sparse_moe", "layers/mlp"
    names = (("w1", "gate"), ("w3", "up"), ("w2", "down"))
    experts = [r for a, b in names for r in dense(theirs + ".experts.{expert}." + a, f"{ours}/experts/{b}")]
    return llama.rules(spec) + dense(f"{theirs}.gate", f"{ours}/router") + experts


MISTRAL = Family(mistral_spec, llama.rules, "Mistral", loads="Mistral 7B v0.1 to v0.3, Nemo 12B, Small 24B; Zephyr 7B")
MINISTRAL = Family(ministral_spec, llama.rules, "Ministral", loads="Ministral 8B")
MIXTRAL = Family(mixtral_spec, mixtral_rules, "Mixtral", loads="Mixtral 8x7B, 8x22B")
