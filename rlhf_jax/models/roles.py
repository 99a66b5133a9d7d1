"""From one role to the next: reward model from a language model, critic from a reward model, reference from the actor.

Trunks are shared, not copied: JAX arrays do not change. What is trained next gets its own copy when its first step donates it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.models.heads import draw_head
from rlhf_jax.models.spec import Spec
from rlhf_jax.types import Calibration, Params


def reward_model(spec: Spec, params: Params, key: jax.Array | None, *, zero: bool = False) -> Params:
    """A reward model on a language model's trunk: the output matrix goes, a scalar head from N(0, 1 / (D + 1)) (or 0) comes."""
    return _trunk(params) | {"score": jax.tree.map(jnp.asarray, draw_head(spec, "score", key, zero=zero))}


def critic(spec: Spec, params: Params, calibration: Calibration | None = None) -> Params:
    """A critic: from a reward model, whose calibration enters the head, or from a language model with a head of 0.

    value = (w h - mean) / std, so that the critic begins by predicting the calibrated score.
    """
    if "score" not in params:
        return _trunk(params) | {"score": jax.tree.map(jnp.asarray, draw_head(spec, "value", None, zero=True))}
    mean, std, _ = calibration or Calibration()
    kernel = params["score"]["kernel"]
    bias = params["score"].get("bias", jnp.zeros(1, kernel.dtype))
    return _trunk(params) | {"score": {"kernel": kernel / std, "bias": (bias - mean) / std}}


def reference(params: Params, dtype: Any = None) -> Params:
    """A frozen copy of the actor, cast to `dtype` where one is given."""
    return params if dtype is None else jax.tree.map(lambda x: x.astype(dtype), params)


def _trunk(params: Params) -> Params:
    return {name: value for name, value in params.items() if name not in ("head", "score")}
