"""The decoder by itself: padding, packing, cache, rematerialisation, sharding, dtypes. A tiny Llama with random weights."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

sys.path.insert(0, str(Path(__file__).parent))
import reference as ref

from rlhf_jax import config, parallel
from rlhf_jax.config import Scratch
from rlhf_jax.errors import UserError
from rlhf_jax.models import at_fixed_length, make_model, scratch_spec, spec_of, stack
from rlhf_jax.models.attention import alibi_slopes
from rlhf_jax.models.heads import PADDED_LOGIT

SPEC = scratch_spec(Scratch(width=32, layers=3, heads=4, kv_heads=2, mlp_width=48, tied=False), 64)
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WINDOWED = TINY | {"model_type": "gemma2", "head_dim": 8, "sliding_window": 4}
ALTERNATING = TINY | {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "decoder_sparse_step": 2,
    "norm_topk_prob": True,
}


@pytest.fixture(scope="module")
def params():
    return make_model(SPEC).init(jax.random.key(0))


def batch(rows=2, width=9, seed=0):
    ids = np.random.default_rng(seed).integers(1, 64, (rows, width)).astype(np.int32)
    return ids, np.ones((rows, width), bool)


def test_width_of_the_padding_changes_no_logit(params):
    model = make_model(SPEC)
    ids, mask = batch()
    plain = model.logits(params, model.hidden(params, ids, mask))
    for left, right in ((3, 0), (0, 3), (2, 4)):
        wide = np.pad(ids, ((0, 0), (left, right)), constant_values=7)
        wide_mask = np.pad(mask, ((0, 0), (left, right)))
        padded = model.logits(params, model.hidden(params, wide, wide_mask))[:, left : left + 9]
        np.testing.assert_allclose(padded, plain, atol=1e-6, rtol=0)


@pytest.mark.parametrize("spec", [SPEC, spec_of(WINDOWED)], ids=["full", "windows"])
def test_packed_sequences_see_themselves_alone(spec):
    model = make_model(spec)
    params = model.init(jax.random.key(1))
    ids, mask = batch(rows=1, width=14)
    segments = np.asarray([[1] * 6 + [2] * 5 + [0] * 3], np.int32)
    positions = np.asarray([[*range(6), *range(5), 0, 0, 0]], np.int32)
    packed = model.hidden(params, ids, segments > 0, positions=positions, segments=segments)
    for cut in (slice(0, 6), slice(6, 11)):
        alone = model.hidden(params, ids[:, cut], mask[:, cut])
        np.testing.assert_allclose(packed[:, cut], alone, atol=1e-5, rtol=0)


def test_causality_by_gradient(params):
    """The state of token t depends on the embeddings of tokens up to t and on no later one."""
    model = make_model(SPEC)
    ids = np.arange(1, 10, dtype=np.int32)[None]  # every token once, so that embedding rows are positions
    mask = np.ones_like(ids, bool)

    def state(params, t):
        return model.hidden(params, ids, mask)[0, t].sum()

    touched = jax.jit(jax.grad(state))(params, 4)["embed"]["embedding"]
    assert set(np.flatnonzero(np.abs(touched).sum(1))) == set(ids[0, :5])


def test_decoding_repeats_the_forward_pass(params):
    """Holes between a right-padded prompt and the answer shrink no window."""
    for spec in (SPEC, spec_of(WINDOWED)):
        model = make_model(spec)
        own = params if spec is SPEC else model.init(jax.random.key(1))
        ids, mask = batch(width=12)
        whole = model.hidden(own, ids, mask)
        prompt = np.pad(ids[:, :5], ((0, 0), (0, 2)))
        prompt_mask = np.pad(mask[:, :5], ((0, 0), (0, 2)))
        decoding = model.for_decoding(own)
        states, cache = model.prefill(decoding, prompt, prompt_mask, 14)
        np.testing.assert_allclose(states[:, :5], whole[:, :5], atol=1e-5, rtol=0)
        in_prompt, order = np.pad(prompt_mask, ((0, 0), (0, 7))), np.arange(14)[None]
        step = jax.jit(model.decode)
        for t in range(7):
            valid = in_prompt | ((order >= 7) & (order < 7 + t))
            state, cache = step(decoding, cache, ids[:, 5 + t], jnp.full(2, 5 + t), 7 + t, valid)
            np.testing.assert_allclose(state, whole[:, 5 + t], atol=1e-5, rtol=0)


LONGER = WINDOWED | {"model_type": "llama", "max_position_embeddings": 8, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}


@pytest.mark.parametrize("config", [WINDOWED, LONGER], ids=["windows", "every step reads all again"])
def test_slots_may_stand_in_any_order(config):
    """A cache of 14 slots turned by 5 is the same cache."""
    model = make_model(spec_of(config))
    params = model.for_decoding(model.init(jax.random.key(1)))
    ids, mask = batch(width=9)
    mask[1, :2] = False
    _, cache = model.prefill(params, ids, mask, 14)
    turned = jax.tree.map(lambda leaf: jnp.roll(leaf, 5, leaf.shape.index(14)), cache)
    step = jax.jit(model.decode, compiler_options=ref.FAST)
    for t in range(3):
        valid, position = np.pad(mask, ((0, 0), (0, 5))) | ((np.arange(14) >= 9) & (np.arange(14) < 9 + t)), mask.sum(1) + t
        plain, cache = step(params, cache, ids[:, t], position, 9 + t, valid)
        other, turned = step(params, turned, ids[:, t], position, (9 + t + 5) % 14, np.roll(valid, 5, 1))
        np.testing.assert_allclose(other, plain, atol=2e-6, rtol=0)


def test_a_row_of_padding_alone_harms_no_gradient(params):
    model = make_model(SPEC)
    ids, mask = batch()
    mask[1] = False

    def loss(params):
        states = model.hidden(params, ids, mask)
        return jnp.sum(jnp.where(mask[..., None], states, 0.0))

    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.jit(jax.grad(loss))(params)))


@pytest.mark.parametrize("remat", ["none", "elementwise"])
@pytest.mark.parametrize("spec", [SPEC, spec_of(WINDOWED), spec_of(ALTERNATING)], ids=["full", "windows", "experts"])
def test_last_tokens_alone_have_the_same_states_and_gradients(spec, remat, monkeypatch):
    """Stacked, as a list and with a last layer that is a stack of its own (experts on every second layer)."""
    monkeypatch.setattr(stack, "WORTH_A_COPY", 0)
    model = make_model(spec, remat=remat)
    params = model.init(jax.random.key(4))
    ids, mask = batch()
    mask[0, :3] = False

    def loss(states):
        return jnp.sum(jnp.sin(states) * ids[:, -4:, None]), states

    whole = jax.jit(jax.value_and_grad(lambda p: loss(model.hidden(p, ids, mask)[:, -4:]), has_aux=True))
    last = jax.jit(jax.value_and_grad(lambda p: loss(model.hidden(p, ids, mask, last=4)), has_aux=True))
    (_, states), gradient = whole(params)
    (_, found), found_gradient = last(params)
    np.testing.assert_allclose(found, states, atol=2e-6, rtol=0)
    for a, b in zip(jax.tree.leaves(found_gradient), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=0)
    np.testing.assert_allclose(model.hidden(model.for_decoding(params), ids, mask, last=4), states, atol=2e-6, rtol=0)


def test_the_last_layer_computes_the_last_tokens_alone_where_that_pays(params, monkeypatch):
    """Operations as XLA counts them, a scan's body once: a last layer that stands outside comes on top of it."""
    model = make_model(SPEC)
    ids, mask = jnp.ones((4, 64), int), jnp.ones((4, 64), bool)

    def work(last, layout=lambda p: p):
        run = jax.jit(lambda p: model.hidden(layout(p), ids, mask, last=last))
        return run.lower(params).compile().cost_analysis()["flops"]

    layer = 2 * 4 * 64 * sum(x[0].size for x in jax.tree.leaves(params["layers"]) if x.ndim == 3)
    unstacked = model.for_decoding
    assert work(None, unstacked) - work(8, unstacked) > 0.7 * 56 / 64 * layer
    assert 3 * stack.WORTH_A_COPY > 4 * 56
    assert work(8) < work(None) + 0.05 * layer
    monkeypatch.setattr(stack, "WORTH_A_COPY", 4 * 56 // 3)
    assert work(None) + 0.05 * layer < work(8) < work(None) + 0.5 * layer


def test_rematerialisation_changes_no_gradient(params):
    ids, mask = batch()

    def gradient(remat):
        model = make_model(SPEC, remat=remat)
        return jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(model.hidden(p, ids, mask)) * ids[..., None])))(params)

    plain = gradient("none")
    for remat in ("elementwise", "full", "dots", "save_attention"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradient(remat), plain)
    with pytest.raises(ValueError, match="remat"):
        make_model(SPEC, remat="some").hidden(params, ids, mask)


def test_rematerialisation_keeps_less_the_more_it_recomputes(params):
    ids, mask = jnp.ones((8, 64), int), jnp.ones((8, 64), bool)

    def temporaries(remat):
        model = make_model(SPEC, remat=remat)
        gradient = jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(model.hidden(p, ids, mask)))))
        return gradient.lower(params).compile().memory_analysis().temp_size_in_bytes

    none, elementwise, dots, full = (temporaries(remat) for remat in ("none", "elementwise", "dots", "full"))
    assert full < dots < elementwise < 0.75 * none


def test_rows_beyond_the_tokenizer_have_no_probability_and_no_gradient(params):
    model = make_model(dataclasses.replace(SPEC, real_vocab=50))
    states = jax.random.normal(jax.random.key(2), (2, 32))

    def entropy(params):
        logp = jax.nn.log_softmax(model.logits(params, states) / 0.1)
        return -jnp.sum(jnp.exp(logp) * logp)

    logits = model.logits(params, states)
    assert np.all(logits[:, 50:] == PADDED_LOGIT)
    assert np.all(jax.nn.softmax(logits)[:, 50:] == 0)
    value, gradient = jax.value_and_grad(entropy)(params)
    assert np.isfinite(value)
    assert np.all(np.asarray(gradient["head"]["kernel"])[:, 50:] == 0)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
    with pytest.raises(UserError, match="70 tokens and the embedding 64 rows"):
        dataclasses.replace(SPEC, real_vocab=70)


def test_bfloat16_computes_logits_and_scores_in_float32(params):
    model = make_model(SPEC, compute_dtype=jnp.bfloat16)
    ids, mask = batch()
    states = model.hidden(params, ids, mask)
    assert states.dtype == jnp.bfloat16
    assert model.logits(params, states).dtype == jnp.float32
    exact = make_model(SPEC)
    logits = exact.logits(params, exact.hidden(params, ids, mask))
    np.testing.assert_allclose(model.logits(params, states), logits, atol=0.1, rtol=0)
    decoding = model.for_decoding(params)
    assert decoding["layers"][0]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16
    assert decoding["layers"][0]["mlp_norm"]["scale"].dtype == jnp.float32  # as `hidden` uses it
    np.testing.assert_array_equal(model.prefill(decoding, ids, mask, 9)[0], model.hidden(decoding, ids, mask))


def test_initial_weights_depend_on_the_path_alone():
    model = make_model(SPEC)
    lm, scorer = model.init(jax.random.key(3)), model.init(jax.random.key(3), head="score")
    np.testing.assert_array_equal(lm["layers"]["mlp"]["up"]["kernel"], scorer["layers"]["mlp"]["up"]["kernel"])
    assert "head" not in scorer
    assert "score" not in lm
    assert np.std(scorer["score"]["kernel"]) < 2 / np.sqrt(33)
    up = np.asarray(lm["layers"]["mlp"]["up"]["kernel"])
    assert abs(up.std() - 32**-0.5) < 0.01
    assert not np.array_equal(up[0], up[1])


def _mesh():
    return parallel.make_mesh(config.Mesh(data=2, fsdp=2, tensor=2), jax.devices()[:8])


RULES = {"batch": ("data", "fsdp"), "embed": "fsdp", "heads": "tensor", "kv": "tensor", "mlp": "tensor", "vocab": "tensor"}


def test_a_mesh_computes_the_same_and_gathers_no_embedding_in_vain(params, capfd):
    mesh = _mesh()

    def constrain(x, axes):
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*(RULES.get(a) for a in axes))))

    plain, model = make_model(SPEC), make_model(SPEC, constrain=constrain)
    where = jax.tree.map(
        lambda _, axes: NamedSharding(mesh, PartitionSpec(*(RULES.get(a) for a in axes))), params, plain.axes(params)
    )
    sharded = jax.device_put(params, where)
    ids, mask = batch(rows=4, width=8)

    def loss(model):
        return lambda p, ids, mask: jnp.mean(jax.nn.log_softmax(model.logits(p, model.hidden(p, ids, mask)))[..., 3])

    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    step = jax.jit(jax.value_and_grad(loss(model)), out_shardings=(None, where))
    value, gradient = step(sharded, jax.device_put(ids, rows), jax.device_put(mask, rows))
    expected, expected_gradient = jax.jit(jax.value_and_grad(loss(plain)))(params, ids, mask)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), gradient, expected_gradient)
    assert "rematerialization" not in capfd.readouterr().err


def test_axes_describe_stacked_and_unstacked_trees(params):
    model = make_model(SPEC)
    axes = model.axes(params)
    assert axes["layers"]["attention"]["q"]["kernel"] == ("layers", "embed", "heads")
    assert axes["embed"]["embedding"] == ("vocab", "embed")
    assert axes["head"]["kernel"] == ("embed", "vocab")
    decoding = model.for_decoding(params)
    assert model.axes(decoding)["layers"][2]["attention"]["o"]["kernel"] == ("heads", "embed")
    for tree in (params, decoding):
        jax.tree.map(lambda x, names: None if x.ndim == len(names) else pytest.fail(f"{x.shape} {names}"), tree, model.axes(tree))


def test_alibi_slopes_of_the_paper():
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)], rtol=1e-6)
    np.testing.assert_allclose(alibi_slopes(6)[4:], [2.0**-1, 2.0**-3], rtol=1e-6)


def test_a_fixed_length_makes_rows_independent_and_decoding_cached(tmp_path):
    """dynamic rope: by default the longest row decides, as in transformers; a run fixes the length instead."""
    config = ref.reference("llama_dynamic").config
    spec = spec_of(config)
    ids, mask = batch(rows=2, width=20, seed=5)
    mask[1, 8:] = False

    def of(spec, rows):
        model = make_model(spec)
        return jax.jit(model.hidden)(model.init(jax.random.key(0)), ids[rows], mask[rows])

    together, alone = of(spec, slice(0, 2))[1, :8], of(spec, slice(1, 2))[0, :8]
    assert np.abs(together - alone).max() > 1e-3
    fixed = at_fixed_length(spec, 20)
    np.testing.assert_allclose(of(fixed, slice(0, 2))[1, :8], of(fixed, slice(1, 2))[0, :8], atol=1e-6)
    np.testing.assert_allclose(of(fixed, slice(0, 1)), of(spec, slice(0, 1)), atol=1e-5)
    model = make_model(fixed)
    assert hasattr(
        jax.eval_shape(lambda: model.prefill(model.for_decoding(model.init(jax.random.key(0))), ids, mask, 24))[1], "keys"
    )
