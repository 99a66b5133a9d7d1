"""Masked arithmetic, log-probabilities, KL: known answers, then invariances, then the inputs on which others return NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from rlhf_jax import ops

B, R, D, V = 3, 7, 5, 41


def jitted(function, **static):
    """One compilation instead of one per operation: these tests are many and small."""
    return jax.jit(functools.partial(function, **static))


@pytest.fixture(scope="module")
def model():
    """Hidden states, an output matrix, targets, as a tiny head."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(B, R, D)), jnp.float32)
    matrix = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    return hidden, matrix, jnp.asarray(rng.integers(0, V, (B, R)), jnp.int32)


def whole(hidden, matrix, targets, temperature=1.0, kept=None):
    """The same in float64, all at once."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(matrix, np.float64) / temperature
    if kept is not None:
        logits = np.where(kept, logits, -np.inf)
    logits = logits - logits.max(-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    finite = np.where(np.isfinite(logprobs), logprobs, 0.0)
    return np.take_along_axis(logprobs, np.asarray(targets)[..., None], -1)[..., 0], -(np.exp(logprobs) * finite).sum(-1)


# --- known answers


@pytest.mark.parametrize("name", oracles.names("logprobs_entropy"))
def test_logprobs_and_entropy_equal_the_definition(name):
    case = oracles.load("logprobs_entropy")[name]
    logits, labels = jnp.asarray(case.inputs["logits"]), jnp.asarray(case.inputs["labels"])
    extreme = {"large_scale60", "huge_offset9000", "offset_minus1e4"}
    atol = 2e-6 * max(1.0, np.abs(case.ref["logprobs"][np.isfinite(case.ref["logprobs"])]).max()) if name in extreme else None
    weights = jnp.cos(jnp.arange(labels.size, dtype=jnp.float32)).reshape(labels.shape)

    @jax.jit
    def everything(logits):
        warm = ops.logits_logprobs(ops.sampled_logits(logits, temperature=0.7), labels)
        grad = jax.grad(lambda x: jnp.sum(weights * ops.logits_logprobs(x, labels)))(logits)
        return ops.logits_logprobs(logits, labels), warm, ops.logits_entropy(logits), grad

    logprobs, warm, entropy, grad = everything(logits)
    oracles.close(logprobs, case.ref["logprobs"], atol=atol)
    if "logprobs_temp07" in case.ref:  # dividing logits of 1e4 rounds them by 1e-3
        oracles.close(warm, case.ref["logprobs_temp07"], rtol=1e-4 if name in extreme else 2e-6)
    oracles.close(entropy, case.ref["entropy"], atol=1e-30 if case.ref["entropy"].max() < 1e-30 else None)
    if "grad_logits" in case.ref:
        oracles.close(grad, case.ref["grad_logits"], rtol=1e-5)


@pytest.mark.parametrize("name", oracles.names("kl_estimators"))
def test_kl_estimators_equal_the_definition(name):
    case = oracles.load("kl_estimators")[name]
    logprobs, ref = (jnp.asarray(case.inputs[k]) for k in ("logprobs", "ref_logprobs"))
    d = case.inputs["ref_logprobs"].astype(np.float64) - case.inputs["logprobs"]
    inside = d < ops.LOG_RATIO_CAP
    for kind in ("k1", "k2", "k3", "k1_plus", "k3_plus"):
        value, grad = jax.jit(jax.vmap(jax.vmap(jax.value_and_grad(functools.partial(ops.kl_estimate, kind=kind)))))(
            logprobs, ref
        )
        assert np.isfinite(value).all()
        assert np.isfinite(grad).all()
        # relative to each element: tiny differences must keep their digits, not only be small
        np.testing.assert_allclose(value, np.where(inside, case.ref[kind], value), rtol=2e-6, atol=0, err_msg=kind)
        np.testing.assert_allclose(grad, np.where(inside, case.ref[f"grad_{kind}"], grad), rtol=1e-5, atol=1e-12, err_msg=kind)


def test_k3_is_exact_and_never_negative_for_every_size_of_difference():
    d = np.concatenate([s * np.logspace(-12, 1.5, 200) for s in (1, -1)])
    got = np.asarray(ops.kl_estimate(jnp.asarray(-d, jnp.float32), jnp.zeros(400), "k3"), np.float64)
    rounded = d.astype(np.float32).astype(np.float64)
    want = np.where(np.abs(rounded) < 1e-3, rounded**2 / 2 * (1 + rounded / 3 + rounded**2 / 12), np.expm1(rounded) - rounded)
    assert (got >= 0).all()
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-38)


@pytest.mark.parametrize("name", oracles.names("kl_full"))
def test_exact_kl_equals_the_definition(name):
    case = oracles.load("kl_full")[name]
    got = ops.exact_kl(jnp.asarray(case.inputs["logits"]), jnp.asarray(case.inputs["ref_logits"]))
    oracles.close(got, case.ref["kl"])


@pytest.mark.parametrize("name", oracles.names("whiten"))
def test_whitening_equals_the_definition(name):
    case = oracles.load("whiten")[name]
    x, mask = jnp.asarray(case.inputs["values"]), jnp.asarray(case.inputs["mask"], bool)
    got = {"whitened": jitted(ops.whiten)(x, mask), "whitened_noshift": jitted(ops.whiten, shift_mean=False)(x, mask)}
    assert all(np.isfinite(y).all() for y in got.values())
    if mask.sum() < 2:
        np.testing.assert_array_equal(got["whitened"], np.where(mask, x, 0.0))
        return
    tolerance = {"offset1e4": 1e-3, "tiny_var": 1e-3}.get(name, 1e-5)
    for key, value in got.items():
        oracles.close(value, case.ref[key], rtol=tolerance, where=mask, what=key)
        assert not np.asarray(value)[~np.asarray(mask)].any()
    oracles.close(ops.masked_mean(x, mask), case.ref["mean"])
    oracles.close(jitted(ops.masked_var)(x, mask), case.ref["var_unbiased"], rtol=1e-5)
    oracles.close(jitted(ops.masked_var, variance="population")(x, mask), case.ref["var_biased"], rtol=1e-5)


@pytest.mark.parametrize("name", oracles.names("loss_aggregation"))
def test_aggregation_equals_the_definition(name):
    case = oracles.load("loss_aggregation")[name]
    loss, mask = jnp.asarray(case.inputs["loss_mat"]), jnp.asarray(case.inputs["response_mask"], bool)
    for ours, theirs in (
        ("token_mean", "token_mean"),
        ("sequence_mean_token_sum", "seq_mean_token_sum"),
        ("sequence_mean_token_mean", "seq_mean_token_mean"),
    ):
        oracles.close(ops.aggregate(loss, mask, ours), np.nan_to_num(case.ref.get(theirs, 0.0)), what=ours)
    rows, width = mask.shape
    found = ops.aggregate(loss, mask, "sequence_mean_token_sum_norm")  # sum / (B R); each peer has another constant
    constants = {"seq_mean_token_sum_norm": width, "seq_mean_token_sum_norm64": 64, "token_sum_over_batch": rows}
    constants["seq_mean_token_scale"] = width * max(int(mask.any(1).sum()), 1)
    for theirs, constant in constants.items():
        oracles.close(found * rows * width / constant, np.nan_to_num(case.ref.get(theirs, 0.0)), what=theirs)


# --- chunked log-probabilities: rules 1 and 2 of "What must be right"


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
def test_chunked_logprobs_equal_the_whole_for_every_chunk(model, chunk):
    hidden, matrix, targets = model

    @jax.jit
    def everything(hidden, other):
        def head(h):
            return h @ matrix

        logprobs, entropy = ops.token_logprobs(hidden, head, targets, temperature=0.7, chunk=chunk, entropy=True)
        kl = ops.token_kl(hidden, head, other, head, temperature=0.7, chunk=chunk)
        plain, correct = ops.token_logprobs_and_correct(hidden, head, targets, chunk=chunk)
        return logprobs, entropy, kl, ops.exact_kl(head(hidden) / 0.7, head(other) / 0.7), plain, correct

    got, entropy, kl, want_kl, plain, correct = everything(hidden, hidden[::-1])
    oracles.close(plain, whole(hidden, matrix, targets, 1.0)[0])
    want, want_entropy = whole(hidden, matrix, targets, 0.7)
    oracles.close(got, want)
    oracles.close(entropy, want_entropy)
    oracles.close(kl, want_kl)
    np.testing.assert_array_equal(correct, np.argmax(np.asarray(hidden) @ np.asarray(matrix), -1) == np.asarray(targets))


def test_chunked_gradients_equal_the_whole(model):
    hidden, matrix, targets = model
    weights = jnp.cos(jnp.arange(B * R, dtype=jnp.float32)).reshape(B, R)

    def chunked(hidden, matrix):
        logprobs, entropy = ops.token_logprobs(hidden, lambda h: h @ matrix, targets, chunk=3, entropy=True)
        return jnp.sum(weights * (logprobs + entropy))

    def direct(hidden, matrix):
        logits = hidden @ matrix
        return jnp.sum(weights * (ops.logits_logprobs(logits, targets) + ops.logits_entropy(logits)))

    pairs = zip(*(jax.jit(jax.grad(function, (0, 1)))(hidden, matrix) for function in (chunked, direct)), strict=True)
    for got, want in pairs:
        oracles.close(got, want, rtol=1e-5)


def test_the_backward_pass_computes_logits_again_but_normalises_once(model):
    hidden, matrix, targets = model

    def loss(hidden):
        return ops.token_logprobs(hidden, lambda h: h @ matrix, targets, chunk=3)[0].sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(hidden))
    assert text.count("dot_general") == 3  # forward, again, gradient
    assert text.count("reduce_max") == 1


def sizes(jaxpr):
    """Shapes of every intermediate of a jaxpr, those of inner loops included."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield tuple(variable.aval.shape)
        for value in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if inner := getattr(value, "jaxpr", value if hasattr(value, "eqns") else None):
                yield from sizes(inner)


@pytest.mark.parametrize("what", ["logprobs", "kl"])
def test_rule_1_logits_of_all_positions_never_exist(what):
    batch, length, width, vocab, chunk = 2, 64, 4, 1000, 8
    shapes = (jnp.zeros((batch, length, width)), jnp.zeros((width, vocab)), jnp.zeros((batch, length), jnp.int32))

    def loss(hidden, matrix, targets):
        def head(h):
            return h @ matrix

        if what == "kl":
            return ops.token_kl(hidden, head, hidden, head, chunk=chunk).sum()
        return sum(x.sum() for x in ops.token_logprobs(hidden, head, targets, chunk=chunk, entropy=True))

    seen = list(sizes(jax.make_jaxpr(jax.grad(loss, (0, 1)))(*shapes).jaxpr))
    assert max(np.prod(s) for s in seen if vocab in s) <= batch * chunk * vocab


def test_rule_1_float32_whatever_the_dtype(model):
    hidden, matrix, targets = model
    half = hidden.astype(jnp.bfloat16)
    head = matrix.astype(jnp.bfloat16)
    got, entropy = ops.token_logprobs(half, lambda h: h @ head, targets, temperature=0.7, entropy=True)
    assert got.dtype == entropy.dtype == jnp.float32
    wide = (half @ head).astype(jnp.float32)  # the model's logits are rounded; nothing after them is
    np.testing.assert_allclose(got, ops.logits_logprobs(wide / 0.7, targets), rtol=1e-6)
    np.testing.assert_array_equal(ops.logits_logprobs(half @ head, targets), ops.logits_logprobs(wide, targets))
    np.testing.assert_array_equal(ops.logits_entropy(half @ head), ops.logits_entropy(wide))
    mask = jnp.ones((B, R), bool)
    thirds = jnp.full((B, R), 1 / 3, jnp.bfloat16)
    outputs = (ops.whiten(thirds, mask), ops.masked_mean(thirds, mask), ops.kl_estimate(thirds, thirds, "k3"))
    assert all(y.dtype == jnp.float32 for y in outputs)
    assert ops.masked_sum(jnp.full((300, 1), 1.0, jnp.bfloat16), jnp.ones((300, 1), bool)) == 300  # bfloat16 stops at 256


def test_rule_1_nan_in_padding_leaves_gradients_bit_equal(model):
    hidden, matrix, targets = model
    mask = jnp.arange(R)[None, :] < jnp.asarray([[7], [3], [0]])

    def loss(matrix, hidden):
        logprobs, entropy = ops.token_logprobs(hidden, lambda h: h @ matrix, targets, mask=mask, chunk=2, entropy=True)
        kl = ops.token_kl(hidden, lambda h: h @ matrix, -hidden, lambda h: h @ matrix, mask=mask)
        return ops.masked_mean(logprobs + entropy + kl, mask)

    poisoned = jnp.where(mask[..., None], hidden, jnp.nan)
    both = jax.jit(jax.value_and_grad(loss))
    clean_value, clean = both(matrix, hidden)
    value, grad = both(matrix, poisoned)
    assert np.isfinite(grad).all()
    np.testing.assert_array_equal(grad, clean)
    assert value == clean_value
    x = jnp.where(mask, targets.astype(jnp.float32), jnp.nan)
    for function in (ops.whiten, ops.masked_mean, ops.masked_var, lambda x, m: ops.masked_quantile(x, m, 0.5)):
        both = jax.jit(jax.value_and_grad(lambda x, f=function: jnp.sum(f(x, mask) ** 3)))
        (value, grad), (clean_value, _) = both(x), both(jnp.where(mask, x, 0.0))
        assert value == clean_value
        assert np.isfinite(np.asarray(grad)).all()
        assert not np.asarray(grad)[~np.asarray(mask)].any()


def test_rule_2_kept_sets_and_temperature_are_replayed_exactly(model):
    hidden, matrix, targets = model
    kept = np.random.default_rng(1).random((B, R, V)) < 0.2
    np.put_along_axis(kept, np.asarray(targets)[..., None], True, -1)
    words = ops.pack_kept(jnp.asarray(kept))
    assert words.shape == (B, R, 2)
    assert words.dtype == jnp.uint32
    np.testing.assert_array_equal(ops.unpack_kept(words, V), kept)
    got, entropy = ops.token_logprobs(hidden, lambda h: h @ matrix, targets, temperature=0.7, kept=words, chunk=2, entropy=True)
    want, want_entropy = whole(hidden, matrix, targets, 0.7, kept)
    oracles.close(got, want)
    oracles.close(entropy, want_entropy)
    kl = ops.token_kl(
        hidden, lambda h: h @ matrix, hidden[::-1], lambda h: h @ matrix, temperature=0.7, kept=words, chunk=2
    )  # the reference has the same support: finite, not negative
    assert np.isfinite(kl).all()
    assert (np.asarray(kl) >= -1e-6).all()


def test_padding_without_a_kept_set_is_finite_in_value_and_gradient(model):
    hidden, matrix, targets = model
    nothing = jnp.zeros((B, R, 2), jnp.uint32)

    def loss(matrix):
        return sum(x.sum() for x in ops.token_logprobs(hidden, lambda h: h @ matrix, targets, kept=nothing, entropy=True))

    value, grad = jax.jit(jax.value_and_grad(loss))(matrix)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 64, 100])
def test_kept_sets_survive_packing_for_every_vocabulary(vocab):
    kept = np.random.default_rng(vocab).random((2, 3, vocab)) < 0.5
    np.testing.assert_array_equal(ops.unpack_kept(ops.pack_kept(jnp.asarray(kept)), vocab), kept)


def test_the_one_shift_gives_the_state_before_each_response_token():
    hidden = jnp.broadcast_to(jnp.arange(10.0)[None, :, None], (2, 10, 1))
    np.testing.assert_array_equal(ops.response_hidden(hidden, 4)[0, :, 0], [5, 6, 7, 8])
    with pytest.raises(ValueError, match="response length 10"):
        ops.response_hidden(hidden, 10)


# --- inputs on which peers return NaN


def test_impossible_tokens_are_finite_in_value_and_gradient():
    logits = jnp.asarray([[[0.5, -jnp.inf, 1.0], [-jnp.inf, -jnp.inf, 2.0], [-jnp.inf, -jnp.inf, -jnp.inf]]])
    ref = jnp.asarray([[[-jnp.inf, -jnp.inf, 1.0], [0.0, 0.0, 2.0], [0.0, 0.0, 0.0]]])
    targets = jnp.asarray([[0, 2, 0]])

    def loss(logits, row):
        picked = jnp.where(jnp.asarray([1.0, 1.0, 0.0])[None, :] > 0, ops.logits_logprobs(logits, targets), 0.0)
        return jnp.sum(picked) + jnp.sum(ops.logits_entropy(logits)) + row * jnp.sum(ops.exact_kl(logits, ref))

    value, grad = jax.jit(jax.value_and_grad(loss))(logits, 1.0)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()
    np.testing.assert_allclose(ops.logits_entropy(logits)[0, 1], 0.0)


def test_groups_of_one_of_none_and_of_equals_whiten_to_defined_values():
    mask = jnp.asarray([[True, False, False]])
    np.testing.assert_array_equal(ops.whiten(jnp.asarray([[3.5, jnp.nan, 1.0]]), mask), [[3.5, 0.0, 0.0]])
    assert not np.asarray(ops.whiten(jnp.ones((2, 3)), jnp.zeros((2, 3), bool))).any()
    constants = jnp.asarray([0.1, 0.3, 0.7, -1.1, 1000.1, 1e-7, 2.3])  # their rounded float32 means are not the constants
    for count in (3, 7, 12, 1000):
        for variance in ("unbiased", "population"):
            rows = jnp.broadcast_to(constants[:, None, None], (len(constants), 1, count))
            got = jitted(jax.vmap(functools.partial(ops.whiten, variance=variance)))(rows, jnp.ones(rows.shape, bool))
            assert not np.asarray(got).any(), count
    assert ops.masked_mean(jnp.ones((2, 2)), jnp.zeros((2, 2), bool)) == 0
    assert ops.masked_var(jnp.ones((2, 2)), jnp.zeros((2, 2), bool)) == 0
    for kind in ops.Aggregation.__args__:
        assert ops.aggregate(jnp.full((2, 3), jnp.nan), jnp.zeros((2, 3), bool), kind) == 0


def test_quantile_counts_kept_values_only():
    x = jnp.arange(1.0, 101.0).reshape(10, 10)
    assert ops.masked_quantile(x, jnp.ones((10, 10), bool), 0.99) == 99
    assert ops.masked_quantile(x, x < 50.5, 1.0) == 50
    assert ops.masked_quantile(x, x < 0, 0.99) == 0


# --- rule 9: global denominators


@pytest.mark.parametrize("kind", ops.Aggregation.__args__)
def test_rule_9_parts_with_the_global_denominator_add_up_to_the_whole(kind):
    rng = np.random.default_rng(2)
    loss, mask = jnp.asarray(rng.normal(size=(8, 5)), jnp.float32), jnp.asarray(rng.random((8, 5)) < 0.6).at[3].set(False)
    denominator = ops.aggregation_denominator(mask, kind)
    part = jitted(ops.aggregate, kind=kind, denominator=denominator)
    for parts in (2, 4):
        total = sum(part(loss[i::parts], mask[i::parts]) for i in range(parts))
        np.testing.assert_allclose(total, ops.aggregate(loss, mask, kind), rtol=1e-6)


# --- what a user can get wrong


def test_mistakes_are_refused_with_a_rule(model):
    hidden, matrix, targets = model
    with pytest.raises(ValueError, match="temperature 0"):
        ops.token_logprobs(hidden, lambda h: h @ matrix, targets, temperature=0)
    with pytest.raises(ValueError, match="chunk 0"):
        ops.token_logprobs(hidden, lambda h: h @ matrix, targets, chunk=0)
    with pytest.raises(ValueError, match="k4"):
        ops.kl_estimate(targets, targets, "k4")
    with pytest.raises(ValueError, match="aggregation 'mean'"):
        ops.aggregation_denominator(targets > 0, "mean")
    with pytest.raises(AssertionError):
        ops.token_logprobs(hidden[0], lambda h: h @ matrix, targets)
    with pytest.raises(AssertionError):
        ops.masked_mean(hidden, targets > 0)


def test_chunks_in_which_nothing_counts_are_left_out():
    rng, ran = np.random.default_rng(0), []
    states, kernel = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 12, 5), (5, 7)))
    targets, mask = jnp.asarray(rng.integers(0, 7, (2, 12))), jnp.arange(12)[None] < jnp.asarray([[5], [2]])
    wanted = jnp.broadcast_to(mask.any(0), mask.shape)

    def loss(states, kernel, skip):
        def unembed(x):
            jax.debug.callback(lambda: ran.append(1))
            return x @ kernel

        return ops.token_logprobs(states, unembed, targets, chunk=4, mask=mask, entropy=True, wanted=wanted if skip else None)

    def gradient(skip):
        return jax.jit(jax.grad(lambda *args: sum((x**2).sum() for x in loss(*args, skip)), (0, 1)))(states, kernel)

    plain = loss(states, kernel, False)
    jax.effects_barrier()
    assert len(ran) == 3
    ran.clear()
    skipped = loss(states, kernel, True)
    jax.effects_barrier()
    assert len(ran) == 2
    jax.tree.map(np.testing.assert_array_equal, skipped, plain)
    for a, b in zip(gradient(True), gradient(False), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    options = {"chunk": 4, "mask": mask}
    kl = [
        ops.token_kl(states, lambda x: x @ kernel, states + 1, lambda x: x @ kernel, wanted=w, **options) for w in (None, wanted)
    ]
    np.testing.assert_array_equal(*kl)
