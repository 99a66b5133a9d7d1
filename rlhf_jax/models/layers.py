"""The pieces of a block, as functions of their own small dictionary of parameters."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf_jax.errors import UserError
from rlhf_jax.models.spec import Spec
from rlhf_jax.types import Params

ACTS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,  # the tanh approximation, under its four names
    "gelu_fast": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "gelu_tanh": jax.nn.gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "tanh": jnp.tanh,
}


def act_name(name: str) -> str:
    """`name`, if it is an activation that the decoder knows."""
    if name not in ACTS:
        raise UserError(f"config.json: activation {name!r} is not supported; known are {', '.join(sorted(ACTS))}")
    return name


def dense(p: Params, x: jax.Array, lora_scale: float = 1.0) -> jax.Array:
    """x kernel + bias, plus lora_scale (x lora_a) lora_b where an adapter is joined to the kernel."""
    y = jnp.einsum("...i,io->...o", x, p["kernel"].astype(x.dtype))
    if "lora_a" in p:
        low = jnp.einsum("...i,ir->...r", x, p["lora_a"].astype(x.dtype))
        y += jnp.einsum("...r,ro->...o", low, p["lora_b"].astype(x.dtype)) * jnp.asarray(lora_scale, x.dtype)
    return y + _last(p["bias"], y) if "bias" in p else y


def normalise(spec: Spec, p: Params, x: jax.Array) -> jax.Array:
    """RMS: x / sqrt(mean x^2 + eps) * scale. Layer: (x - mean) / sqrt(var + eps) * scale + bias. In float32."""
    wide = x.astype(jnp.float32)
    if spec.norm == "layer":
        wide -= jnp.mean(wide, -1, keepdims=True)  # two passes, as torch; E[x^2] - E[x]^2 cancels
    wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + spec.norm_eps)
    scale = p["scale"].astype(jnp.float32) + spec.norm_offset
    if spec.norm_rounds == "before_scale":
        return wide.astype(x.dtype) * _last(scale, x)
    y = wide * scale.reshape((1,) * (x.ndim - 1) + (-1,))
    if "bias" in p:
        y += p["bias"].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    return y.astype(x.dtype)


def mlp(spec: Spec, p: Params, x: jax.Array, lora_scale: float = 1.0) -> jax.Array:
    """down(act(gate(x)) * up(x)), or down(act(up(x)))."""
    up = dense(p["up"], x, lora_scale)
    inner = ACTS[spec.act](dense(p["gate"], x, lora_scale)) * up if spec.gated else ACTS[spec.act](up)
    return dense(p["down"], inner, lora_scale)


def _last(vector: jax.Array, like: jax.Array) -> jax.Array:
    """A vector shaped to broadcast against the last dimension."""
    return vector.astype(like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))
