"""Heads: what a model says about its hidden states."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.layers import matmul
from rlhf_jax.models.spec import Spec
from rlhf_jax.types import Params

PADDED_LOGIT = -1e30  # of rows beyond the tokenizer: never sampled, probability exactly 0, yet 0 * logit is 0 and not NaN


def weights(spec: Spec, params: Params) -> Params:
    """What `logits` reads."""
    name = "embed" if spec.tied else "head"
    return {name: params[name]}


def logits(spec: Spec, params: Params, x: jax.Array) -> jax.Array:
    """f32[..., V] of states [..., D]: accumulated, capped, biased and cut to the tokenizer's vocabulary in float32."""
    if spec.tied:
        y = matmul(x, params["embed"]["embedding"], inputs=1, dtype=jnp.float32)
    else:
        head = params["head"]
        y = matmul(x, head["kernel"], dtype=jnp.float32)
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


def draw_head(spec: Spec, head: str, key: jax.Array | None, *, zero: bool = False) -> dict[str, np.ndarray]:
    """A new scalar head: kernel f32[D, 1] from N(0, 1 / (D + 1)), or 0; with head="value" a bias of 0.

    Source: Stiennon et al. 2020 (arXiv 2009.01325) for the spread; a critic starts at 0 so that it begins without opinion.
    """
    kernel = np.zeros((spec.head_width, 1), np.float32)
    if not zero:
        if key is None:
            raise ValueError("a head that is drawn at random needs a key")
        kernel = np.asarray(jax.random.normal(key, kernel.shape)) / np.float32(math.sqrt(spec.head_width + 1))
    return {"kernel": kernel} | ({"bias": np.zeros(1, np.float32)} if head == "value" else {})
