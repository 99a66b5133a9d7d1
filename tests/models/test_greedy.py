"""Greedy decoding with the cache gives transformers' 24 tokens, token for token, whatever side the prompts are padded on."""

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


@pytest.mark.parametrize("name", cases.VARIANTS)
def test_greedy_tokens_are_those_of_transformers(name, tmp_path):
    checkpoint = load_checkpoint(ref.checkpoint(tmp_path, name))
    model = make_model(checkpoint.spec)
    pairs = [ref.tokens("prompts", side) for side in ("left", "right")]
    ids, mask = (jnp.concatenate([jnp.asarray(x) for x in arrays]) for arrays in zip(*pairs, strict=True))
    out = jax.jit(lambda p: ref.greedy(model, p, ids, mask, 24), compiler_options=ref.FAST)(checkpoint.params)
    expected = ref.reference(name).outputs["greedy"]
    np.testing.assert_array_equal(out, np.concatenate([expected, expected]))
