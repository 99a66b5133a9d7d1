"""What the older families share: LayerNorm, biases, an MLP without a gate. Not itself a family."""

from typing import Any

from rlhf_jax.models.rules import Rule, dense, norm
from rlhf_jax.models.spec import Layer, Rope, Spec


def spec(
    config: dict[str, Any], *, width: int, heads: int, number: int, mlp_width: int, rope: Rope | None = None, **changes: Any
) -> Spec:
    """`number` equal layers; `changes` are fields of the spec."""
    head_dim = width // heads
    fields = {
        "vocab_size": config["vocab_size"],
        "width": width,
        "heads": heads,
        "kv_heads": heads,
        "head_dim": head_dim,
        "mlp_width": mlp_width,
        "layers": (Layer(rope=rope, scale=head_dim**-0.5),) * number,
        "norm": "layer",
        "norm_eps": 1e-5,
        "gated": False,
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
    }
    return Spec(**fields | changes)


def layer_rules(layer: str, **names: str) -> list[Rule]:
    """Linear layers and norms of one block: ours=theirs, such as attention_o="self_attn.dense", mlp_norm="ln_2"."""
    found = []
    for ours, theirs in names.items():
        make = norm if ours.endswith("norm") else dense
        found += make(f"{layer}.{theirs}", "layers/" + (ours if ours.endswith("norm") else ours.replace("_", "/")))
    return found
