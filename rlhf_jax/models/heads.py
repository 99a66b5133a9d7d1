"""Heads: what a model says about its hidden states."""

import jax
import jax.numpy as jnp

from rlhf_jax.models.spec import Spec
from rlhf_jax.types import Params

PADDED_LOGIT = -1e30  # of rows beyond the tokenizer: never sampled, probability exactly 0, yet 0 * logit is 0 and not NaN


def logits(spec: Spec, params: Params, x: jax.Array) -> jax.Array:
    """f32[..., V] of states [..., D]: accumulated, capped, biased and cut to the tokenizer's vocabulary in float32."""
    if spec.tied:
        y = jnp.einsum("...d,vd->...v", x, params["embed"]["embedding"].astype(x.dtype), preferred_element_type=jnp.float32)
    else:
        head = params["head"]
        y = jnp.einsum("...d,dv->...v", x, head["kernel"].astype(x.dtype), preferred_element_type=jnp.float32)
        if "bias" in head:
            y += head["bias"].astype(jnp.float32).reshape((1,) * (y.ndim - 1) + (-1,))
    if spec.logit_cap is not None:
        y = spec.logit_cap * jnp.tanh(y / spec.logit_cap)
    if spec.real_vocab is not None and spec.real_vocab < spec.vocab_size:
        real = jnp.arange(spec.vocab_size) < spec.real_vocab
        y = jnp.where(real.reshape((1,) * (y.ndim - 1) + (-1,)), y, PADDED_LOGIT)
    return y


def score(params: Params, x: jax.Array) -> jax.Array:
    """f32[...] of states [..., D], reward units: the scalar head of reward models and critics."""
    head = params["score"]
    y = jnp.einsum("...d,do->...o", x.astype(jnp.float32), head["kernel"].astype(jnp.float32))[..., 0]
    return y + head["bias"].astype(jnp.float32).reshape((1,) * y.ndim) if "bias" in head else y
