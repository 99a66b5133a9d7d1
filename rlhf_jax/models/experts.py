"""A mixture of experts: a router gives every token to some of many MLPs."""

import jax
import jax.numpy as jnp

from rlhf_jax.models.layers import ACTS
from rlhf_jax.models.spec import Experts, Spec
from rlhf_jax.types import Params


def mixture(spec: Spec, experts: Experts, p: Params, x: jax.Array, lora_scale: float = 1.0) -> jax.Array:
    """sum over the active experts e of weight_e mlp_e(x), [B, T, D].

    Every expert sees every token and the weights of the others are 0: it shards like a dense MLP, and costs
    number / active times the arithmetic.
    """
    weights = routing(experts, p["router"], x)
    up = _each(p["experts"]["up"], x, lora_scale)
    gate = _each(p["experts"]["gate"], x, lora_scale)
    if experts.clamp is None:
        inner = ACTS[spec.act](gate) * up
    else:
        gate, up = jnp.minimum(gate, experts.clamp), jnp.clip(up, -experts.clamp, experts.clamp)
        inner = gate * jax.nn.sigmoid(experts.swish * gate) * (up + 1)
    down = p["experts"]["down"]
    weights = weights.astype(x.dtype)
    inner *= weights[..., None]
    out = jnp.einsum("btef,efd->btd", inner, down["kernel"].astype(x.dtype))
    if "lora_a" in down:
        low = jnp.einsum("btef,efr->bter", inner, down["lora_a"].astype(x.dtype))
        out += jnp.einsum("bter,erd->btd", low, down["lora_b"].astype(x.dtype)) * jnp.asarray(lora_scale, x.dtype)
    return out + jnp.einsum("bte,ed->btd", weights, down["bias"].astype(x.dtype)) if "bias" in down else out


def routing(experts: Experts, p: Params, x: jax.Array) -> jax.Array:
    """f32[B, T, experts]: softmax over the experts, all but the best set to 0 (and the rest scaled to sum 1)."""
    scores = jnp.einsum("btd,de->bte", x, p["kernel"].astype(x.dtype), preferred_element_type=jnp.float32)
    if "bias" in p:
        scores += p["bias"].astype(jnp.float32)[None, None]
    best, index = jax.lax.top_k(jax.nn.softmax(scores, -1), experts.active)
    if experts.renormalise:
        best /= jnp.sum(best, -1, keepdims=True)
    return jnp.sum(best[..., None] * jax.nn.one_hot(index, experts.number, dtype=jnp.float32), -2)


def _each(p: Params, x: jax.Array, lora_scale: float) -> jax.Array:
    """[B, T, experts, out]: x through the same linear layer of every expert."""
    y = jnp.einsum("btd,edf->btef", x, p["kernel"].astype(x.dtype))
    if "lora_a" in p:
        low = jnp.einsum("btd,edr->bter", x, p["lora_a"].astype(x.dtype))
        y += jnp.einsum("bter,erf->btef", low, p["lora_b"].astype(x.dtype)) * jnp.asarray(lora_scale, x.dtype)
    return y + p["bias"].astype(x.dtype)[None, None] if "bias" in p else y
