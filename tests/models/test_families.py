"""Every family against transformers: stored reference outputs, weights drawn by name, float32."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import reference as ref
import variants as cases

from rlhf_jax import scoring
from rlhf_jax.models import FAMILIES, load_checkpoint, make_model, stack


def test_every_family_has_a_variant():
    text_only = set(FAMILIES) - {"gemma3"}  # the same decoder as gemma3_text under other names: test_files.py
    assert {model_type for model_type, _ in cases.VARIANTS.values()} == text_only


@pytest.mark.parametrize("name", cases.VARIANTS)
def test_logits_and_scores_are_those_of_transformers(name, tmp_path, monkeypatch):
    """Left padding, right padding and none (the first row is as long as the batch) in one batch of six.

    Asked for the last tokens alone, the model says the same of them.
    """
    monkeypatch.setattr(stack, "WORTH_A_COPY", 0)
    checkpoint = load_checkpoint(ref.checkpoint(tmp_path, name))
    scorer = load_checkpoint(ref.checkpoint(tmp_path / "reward", name, head="score"), head="score")
    model = make_model(checkpoint.spec)
    pairs = [ref.tokens("rows", side) for side in ("left", "right")]
    ids, mask = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))

    def forward(params, head, ids, mask):
        states = model.hidden(params, ids, mask)
        return model.logits(params, states), model.score(head, states), states, model.hidden(params, ids, mask, last=5)

    forward = jax.jit(forward, compiler_options=ref.FAST)
    logits, scores, states, last = forward(checkpoint.params, {"score": scorer.params["score"]}, ids, mask)
    np.testing.assert_allclose(last[mask[:, -5:]], states[:, -5:][mask[:, -5:]], atol=1e-5, rtol=0)
    expected, atol = ref.reference(name).outputs, 2e-4 if name in ref.MIXTURES else 1e-4
    logp = np.asarray(jax.nn.log_softmax(logits))
    for half, (side_ids, side_mask) in enumerate(pairs):
        rows = slice(3 * half, 3 * half + 3)
        for row in range(3):
            mine, theirs = np.flatnonzero(side_mask[row]), np.flatnonzero(pairs[0][1][row])
            step = cases.VOCAB // 20
            np.testing.assert_allclose(logits[rows][row, mine, ::step], expected["columns"][row, theirs], atol=atol, rtol=0)
            got = logp[rows][row, mine[:-1], side_ids[row, mine[1:]]]
            np.testing.assert_allclose(got, expected["logprobs"][row, theirs[:-1]], atol=atol, rtol=0)
        ends = scoring.readable(side_ids, np.ones_like(side_mask), scorer.calibration.pad_id)
        np.testing.assert_array_equal(ends, side_mask)
        np.testing.assert_allclose(scoring.at_last_token(scores[rows], ends), expected["score"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "kind"), [*((n, "long") for n in cases.LONG), *((n, "far") for n in cases.FAR)])
def test_positions_whose_meaning_changes_beyond_a_length(name, kind, tmp_path):
    checkpoint = load_checkpoint(ref.checkpoint(tmp_path, name))
    model = make_model(checkpoint.spec)
    ids, mask = ref.tokens(kind)
    logits = jax.jit(lambda p: model.logits(p, model.hidden(p, ids, mask)), compiler_options=ref.FAST)(checkpoint.params)
    expected = ref.reference(name).outputs[kind]
    np.testing.assert_allclose(logits[:, -expected.shape[1] :, :: cases.VOCAB // 20], expected, atol=1e-4, rtol=0)
