"""OLMo 2 and 3: only the outputs of the branches are normalised, and queries and keys over all heads jointly."""

from typing import Any

from rlhf_jax.models import rope
from rlhf_jax.models.families import llama
from rlhf_jax.models.rules import Family, Rule, norm
from rlhf_jax.models.spec import Spec

FULL, SLIDING = "full_attention", "sliding_attention"


def olmo2_spec(config: dict[str, Any]) -> Spec:
    config = {"rms_norm_eps": 1e-5} | config
    return llama.spec(config, norms="after_branch", qk_norm="all", norm_rounds="after_scale", mlp_bias=False)


def olmo3_spec(config: dict[str, Any]) -> Spec:
    """Three layers with a window to one without; only the latter's rope is scaled."""
    spec = olmo2_spec(config)
    types = config.get("layer_types") or [SLIDING if (i + 1) % 4 else FULL for i in range(len(spec.layers))]
    ropes = {kind: rope.from_config(config, spec.head_dim, theta=500000.0, layer_type=kind) for kind in (FULL, SLIDING)}
    spec = llama.sliding(spec, config.get("sliding_window", 4096), types)
    return llama.per_layer(spec, rope=[ropes[kind] for kind in types])


def rules(spec: Spec) -> list[Rule]:
    layer = "model.layers.{layer}"
    return [
        *(rule for rule in llama.rules(spec) if "layernorm" not in rule.theirs),
        *norm(f"{layer}.post_attention_layernorm", "layers/attention_post_norm"),
        *norm(f"{layer}.post_feedforward_layernorm", "layers/mlp_post_norm"),
    ]


OLMO2 = Family(olmo2_spec, rules, "Olmo2", value=None, loads="OLMo 2 1B to 32B, Tulu 3 on OLMo 2")
OLMO3 = Family(olmo3_spec, rules, "Olmo3", value=None, loads="OLMo 3 7B, 32B")
