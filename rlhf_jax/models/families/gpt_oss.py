"""gpt-oss: attention sinks, biases everywhere, clamped experts chosen before the softmax."""

from typing import Any

from rlhf_jax.models.families import llama
from rlhf_jax.models.rules import Family, Rule, dense, same
from rlhf_jax.models.spec import Experts, Spec

YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}


def spec(config: dict[str, Any]) -> Spec:
    defaults = {"rms_norm_eps": 1e-5, "rope_theta": 150000.0, "attention_bias": True, "head_dim": 64}
    config = defaults | config
    if not (config.get("rope_parameters") or config.get("rope_scaling")):
        config = config | {"rope_scaling": YARN | {"original_max_position_embeddings": 4096}}
    experts = Experts(
        number=config.get("num_local_experts") or config.get("num_experts") or 128,
        active=config.get("num_experts_per_tok", 4),
        width=config["intermediate_size"],
        router_bias=True,
        clamp=config.get("swiglu_limit", 7.0),
        swish=config.get("swiglu_alpha", 1.702),
    )
    made = llama.spec(config, sinks=True, mlp_bias=True)
    number = len(made.layers)
    types = config.get("layer_types") or ["full_attention" if i % 2 else "sliding_attention" for i in range(number)]
    return llama.sliding(llama.per_layer(made, experts=[experts] * number), config.get("sliding_window", 128), types)


def rules(spec: Spec) -> list[Rule]:
    """All experts of a layer in one tensor, stored [expert, in, out], gate and up in alternate columns."""
    layer, ours = "model.layers.{layer}", "layers/mlp/experts"
    number, width = spec.layers[0].experts.number, spec.layers[0].experts.width
    both = {"gate": lambda w: w[..., 0::2], "up": lambda w: w[..., 1::2]}
    kernel = tuple((f"{ours}/{name}/kernel", view) for name, view in both.items())
    bias = tuple((f"{ours}/{name}/bias", view) for name, view in both.items())
    return [
        *llama.rules(spec),
        Rule(f"{layer}.self_attn.sinks", (("layers/attention/sinks", same),)),
        *dense(f"{layer}.mlp.router", "layers/mlp/router"),
        Rule(f"{layer}.mlp.experts.gate_up_proj", kernel, (number, spec.width, 2 * width)),
        Rule(f"{layer}.mlp.experts.gate_up_proj_bias", bias, (number, 2 * width)),
        Rule(f"{layer}.mlp.experts.down_proj", ((f"{ours}/down/kernel", same),)),
        Rule(f"{layer}.mlp.experts.down_proj_bias", ((f"{ours}/down/bias", same),)),
    ]


GPT_OSS = Family(spec, rules, "GptOss", loads="gpt-oss 20B, 120B (bfloat16 copies; not the MXFP4 files)")
