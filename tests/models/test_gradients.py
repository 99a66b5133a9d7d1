"""Gradients of every family are finite, reach every parameter, and are blind to what lies under the padding."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import reference as ref
import variants as cases

from rlhf_jax.models import load_checkpoint, make_model

ONE_EACH = {model_type: name for name, (model_type, _) in reversed(cases.VARIANTS.items())}


@pytest.mark.parametrize("name", ONE_EACH.values())
def test_gradients_are_finite_and_ignore_padding(name, tmp_path):
    checkpoint = load_checkpoint(ref.checkpoint(tmp_path, name))
    model = make_model(checkpoint.spec, remat="full")
    ids, mask = ref.tokens("rows")

    def loss(params, ids):
        logp = jax.nn.log_softmax(model.logits(params, model.hidden(params, ids, mask)))
        chosen = jnp.take_along_axis(logp[:, :-1], ids[:, 1:, None], 2)[..., 0]
        return -jnp.sum(jnp.where(mask[:, 1:] & mask[:, :-1], chosen, 0.0))

    step = jax.jit(jax.grad(loss), compiler_options=ref.FAST)
    gradient = step(checkpoint.params, jnp.asarray(ids))
    other = step(checkpoint.params, jnp.where(mask, ids, cases.VOCAB - 1))

    def check(path, a, b):
        assert np.isfinite(a).all(), path
        assert np.any(a) or "k/bias" in path, path  # without rope a bias of the keys shifts all scores of a query alike
        np.testing.assert_array_equal(a, b)

    jax.tree_util.tree_map_with_path(
        lambda path, a, b: check(jax.tree_util.keystr(path, simple=True, separator="/"), a, b), gradient, other
    )
