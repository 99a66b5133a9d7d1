"""Gemma 1, 2 and 3 (text). RMS scales are stored minus 1; embeddings are multiplied by the root of the width."""

import math
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.models import rope
from rlhf_jax.models.families import llama
from rlhf_jax.models.layers import act_name
from rlhf_jax.models.rules import Family, Rule, norm, prefixed
from rlhf_jax.models.spec import Spec

FULL, SLIDING = "full_attention", "sliding_attention"


def gemma_spec(config: dict[str, Any], **changes: Any) -> Spec:
    if config.get("use_bidirectional_attention"):
        raise UserError("config.json: use_bidirectional_attention is true; this is an embedding model, not a decoder")
    act = config.get("hidden_act") or "gelu_pytorch_tanh"
    fields = {
        "head_dim": config.get("head_dim") or 256,
        "norm_offset": 1.0,
        "norm_rounds": "after_scale",
        "act": "gelu_pytorch_tanh" if act == "gelu" else act_name(act),  # Gemma 1 says gelu and means its tanh form
        "embed_scale": math.sqrt(config["hidden_size"]),
        "tied": bool(config.get("tie_word_embeddings", True)),
        "mlp_bias": False,
    }
    return llama.spec(config, **fields | changes)


def gemma2_spec(config: dict[str, Any], **changes: Any) -> Spec:
    """Norms before and after each branch, soft-caps, a window on every other layer."""
    fields = {
        "norms": "around",
        "act": act_name(config.get("hidden_activation") or "gelu_pytorch_tanh"),
        "attention_cap": config.get("attn_logit_softcapping", 50.0),
        "logit_cap": config.get("final_logit_softcapping", 30.0),
    }
    spec = gemma_spec(config, **fields | changes)
    number = len(spec.layers)
    spec = llama.per_layer(spec, scale=[config.get("query_pre_attn_scalar", 256) ** -0.5] * number)
    types = config.get("layer_types") or [FULL if i % 2 else SLIDING for i in range(number)]
    return llama.sliding(spec, config.get("sliding_window", 4096), types)


def gemma3_spec(config: dict[str, Any]) -> Spec:
    """Norms of queries and keys, two ropes, five layers with a window to one without."""
    defaults = {"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
    defaults |= {"num_attention_heads": 8, "num_key_value_heads": 4}  # text_config names only what differs from these
    config = defaults | config.get("text_config", config)
    every = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    types = config.get("layer_types") or [SLIDING if (i + 1) % every else FULL for i in range(config["num_hidden_layers"])]
    # transformers reads attn_logit_softcapping for Gemma 3 and never applies it
    caps = {"attention_cap": None, "logit_cap": config.get("final_logit_softcapping")}
    spec = gemma2_spec(config | {"layer_types": types}, qk_norm="head", **caps)
    local = {"rope_theta": config.get("rope_local_base_freq") or 10000.0}
    ropes = {
        FULL: rope.from_config({"rope_theta": 1e6} | config, spec.head_dim, layer_type=FULL),
        SLIDING: rope.from_config(config | local, spec.head_dim, layer_type=SLIDING),
    }
    return llama.per_layer(spec, rope=[ropes[kind] for kind in types])


def around_rules(spec: Spec) -> list[Rule]:
    """Gemma 2 and 3: what Llama calls post_attention_layernorm really comes after the attention."""
    layer = "model.layers.{layer}"
    llama_rules = [rule for rule in llama.rules(spec) if "post_attention_layernorm" not in rule.theirs]
    return [
        *llama_rules,
        *norm(f"{layer}.post_attention_layernorm", "layers/attention_post_norm"),
        *norm(f"{layer}.pre_feedforward_layernorm", "layers/mlp_norm"),
        *norm(f"{layer}.post_feedforward_layernorm", "layers/mlp_post_norm"),
    ]


def multimodal_rules(spec: Spec) -> list[Rule]:
    return prefixed("language_model.", around_rules(spec))


GEMMA = Family(gemma_spec, llama.rules, "Gemma", loads="Gemma 2B, 7B")
GEMMA2 = Family(gemma2_spec, around_rules, "Gemma2", loads="Gemma 2 2B, 9B, 27B")
GEMMA3_TEXT = Family(
    gemma3_spec, around_rules, "Gemma3", score="Gemma3TextForSequenceClassification", value=None, loads="Gemma 3 270M, 1B"
)
GEMMA3 = Family(
    gemma3_spec,
    multimodal_rules,
    "Gemma3",
    lm="Gemma3ForConditionalGeneration",
    value=None,
    prefix="language_model.model.",
    renamed=(("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")),
    ignored=(r"(model\.)?(vision_tower|multi_modal_projector)\.",),
    loads="Gemma 3 4B, 12B, 27B (the text half; the vision tower is passed on unchanged)",
)
