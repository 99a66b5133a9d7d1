"""The pieces of a block, as functions of their own small dictionary of parameters."""

from collections.abc import Callable
from typing import Any

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


def matmul(x: jax.Array, kernel: jax.Array, *, inputs: int = 0, dtype: Any = None) -> jax.Array:
    """x [..., in] times kernel [in, out] (or [out, in] with inputs=1), the kernel cast to x's dtype, the sum kept in `dtype`.

    The leading axes are merged first: XLA on CPU is twice as slow where the kernel's gradient sums over two axes.
    """
    flat = x.reshape(-1, x.shape[-1])
    y = jax.lax.dot_general(flat, kernel.astype(x.dtype), (((1,), (inputs,)), ((), ())), preferred_element_type=dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def dense(p: Params, x: jax.Array, lora_scale: float = 1.0) -> jax.Array:
    """x kernel + bias, plus lora_scale (x lora_a) lora_b where an adapter is joined to the kernel."""
    y = matmul(x, p["kernel"])
    if "lora_a" in p:
        y += matmul(matmul(x, p["lora_a"]), p["lora_b"]) * jnp.asarray(lora_scale, x.dtype)
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
