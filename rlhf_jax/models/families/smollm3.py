"""SmolLM3: Llama, some of whose layers know no positions."""

from typing import Any

from rlhf_jax.models.families import llama
from rlhf_jax.models.rules import Family
from rlhf_jax.models.spec import Spec


def spec(config: dict[str, Any]) -> Spec:
    """`no_rope_layers` has a 1 where the rope *is* used."""
    config = {"rope_theta": 2e6, "tie_word_embeddings": True} | config
    made = llama.spec(config)
    number, every = len(made.layers), config.get("no_rope_layer_interval", 4)
    used = config.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(number)]
    made = llama.per_layer(made, rope=[made.layers[0].rope if use else None for use in used])
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    types = config.get("layer_types") or ["full_attention" if use or not window else "sliding_attention" for use in used]
    return llama.sliding(made, window, types)


SMOLLM3 = Family(spec, llama.rules, "SmolLM3", loads="SmolLM3 3B")
