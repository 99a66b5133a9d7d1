"""Qwen 2 and 2.5, Qwen 3, and Qwen 3's mixtures of experts."""

from typing import Any

from rlhf_jax.models.families import llama
from rlhf_jax.models.rules import Family, Rule, dense
from rlhf_jax.models.spec import Experts, Spec


def qwen2_spec(config: dict[str, Any]) -> Spec:
    """Biases on q, k and v but not on o; a window on the later layers, if any."""
    return _windows(config, llama.spec(config, qkv_bias=True, o_bias=False))


def qwen3_spec(config: dict[str, Any]) -> Spec:
    """Queries and keys are normalised head by head, before the rope."""
    return _windows(config, llama.spec(config, head_dim=config.get("head_dim") or 128, qk_norm="head"))


def qwen3_moe_spec(config: dict[str, Any]) -> Spec:
    """Softmax over all experts, then the best; their weights are scaled to sum 1 where the config says so."""
    spec = llama.spec(config, qk_norm="head")
    experts = Experts(
        number=config.get("num_experts") or config.get("num_local_experts") or 128,
        active=config["num_experts_per_tok"],
        width=config["moe_intermediate_size"],
        renormalise=bool(config.get("norm_topk_prob", False)),
    )
    step, dense_layers = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    number = range(len(spec.layers))
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    sparse = [i not in dense_layers and step > 0 and (i + 1) % step == 0 for i in number]
    return llama.per_layer(spec, window=[window for _ in number], experts=[experts if s else None for s in sparse])


def _windows(config: dict[str, Any], spec: Spec) -> Spec:
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    first = config.get("max_window_layers", 28)
    later = ["sliding_attention" if i >= first else "full_attention" for i in range(len(spec.layers))]
    return llama.sliding(spec, window, config.get("layer_types") or later)


def moe_rules(spec: Spec) -> list[Rule]:
    mlp, ours = "model.layers.{layer}.mlp", "layers/mlp"
    experts = [r for x in ("gate", "up", "down") for r in dense(mlp + ".experts.{expert}." + f"{x}_proj", f"{ours}/experts/{x}")]
    return llama.rules(spec) + dense(f"{mlp}.gate", f"{ours}/router") + experts


def old_moe_config(config: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
    return {"num_experts": config.get("num_local_experts") or config.get("num_experts")}


QWEN2 = Family(qwen2_spec, llama.rules, "Qwen2", loads="Qwen 1.5, 2, 2.5 0.5B to 110B, QwQ 32B, DeepSeek-R1-Distill-Qwen")
QWEN3 = Family(qwen3_spec, llama.rules, "Qwen3", loads="Qwen 3 0.6B to 32B")
QWEN3_MOE = Family(qwen3_moe_spec, moe_rules, "Qwen3Moe", old_config=old_moe_config, loads="Qwen3-30B-A3B, Qwen3-235B-A22B")
