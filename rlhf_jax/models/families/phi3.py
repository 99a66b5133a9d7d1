"""Phi-3, 3.5 and 4: Llama with fused matrices and longrope."""

from typing import Any

from rlhf_jax.models.families import llama
from rlhf_jax.models.rules import Family, Rule, fused
from rlhf_jax.models.spec import Spec


def spec(config: dict[str, Any]) -> Spec:
    config = {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096} | config
    for key in ("rope_scaling", "rope_parameters"):
        found = dict(config.get(key) or {})
        kind = found.get("rope_type") or found.get("type")
        if kind in ("su", "yarn"):  # what Phi-3 first called longrope
            config = config | {key: found | {"rope_type": "longrope", "type": "longrope"}}
    made = llama.spec(config, qkv_bias=False, o_bias=False, mlp_bias=False)
    return llama.per_layer(made, window=[config.get("sliding_window")] * len(made.layers))


def rules(spec: Spec) -> list[Rule]:
    layer = "model.layers.{layer}"
    split = (".q_proj", ".k_proj", ".v_proj", ".gate_proj", ".up_proj")
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    qkv = [f"layers/attention/{name}" for name in "qkv"]
    return [
        *(rule for rule in llama.rules(spec) if not any(name in rule.theirs for name in split)),
        *fused(f"{layer}.self_attn.qkv_proj", qkv, spec.width, (queries, keys, keys)),
        *fused(f"{layer}.mlp.gate_up_proj", ["layers/mlp/gate", "layers/mlp/up"], spec.width, (spec.mlp_width,) * 2),
    ]


def old_config(config: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
    """transformers 4 wants a scaling of exactly three keys, and the rest of the rope at the top level."""
    if parameters.get("rope_type", "default") == "default":
        return {"rope_scaling": None}
    if parameters.keys() & {"attention_factor", "factor"}:
        return {"rope_scaling": None}  # version 4 cannot say it, and version 5 would take its word over rope_parameters
    return {"rope_scaling": {"type": "longrope"} | {key: parameters[key] for key in ("short_factor", "long_factor")}}


PHI3 = Family(spec, rules, "Phi3", old_config=old_config, loads="Phi-3, 3.5 and 4 (mini to 14B)")
