"""Statistics against their definitions: enumeration where it is possible, coverage by simulation where it is not."""

import itertools
import math

import numpy as np
import pytest

from rlhf_jax.estimates import Interval, best_of_n, best_of_n_kl, bootstrap, pass_at_k, shares, wilson, win_rate

# Wilson interval.


def test_wilson_solves_the_score_equation():
    """Its ends are the p at which |k/n - p| is z standard errors of p: checked on the definition, not on the formula."""
    z = 1.959963984540054
    for k, n in [(1, 10), (5, 10), (37, 100), (0, 8), (8, 8), (999, 1000), (2.5, 7)]:
        found = wilson(k, n)
        assert found.value == k / n
        for end in (found.low, found.high):
            if 0 < end < 1:
                assert abs(k / n - end) == pytest.approx(z * math.sqrt(end * (1 - end) / n), rel=1e-9)
        assert 0 <= found.low <= k / n <= found.high <= 1


def test_wilson_reference_values():
    found = wilson(81, 263)  # Newcombe 1998, table I: 0.2553 to 0.3662
    assert (found.low, found.high) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))
    assert wilson(0, 20) == Interval(0.0, 0.0, pytest.approx(0.1611, abs=5e-5), 20)
    assert wilson(20, 20).high == 1.0
    assert wilson(5, 10, confidence=0.5).high - wilson(5, 10, confidence=0.5).low < 0.22


def test_wilson_covers_as_often_as_it_says():
    for n, p in [(20, 0.5), (50, 0.1), (30, 0.9)]:
        pmf = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
        covered = sum(pmf[k] for k in range(n + 1) if wilson(k, n).low <= p <= wilson(k, n).high)
        assert 0.93 <= covered <= 0.98


def test_wilson_of_nothing_and_of_nonsense():
    nothing = wilson(0, 0)
    assert math.isnan(nothing.value)
    assert (nothing.low, nothing.high) == (0.0, 1.0)
    for k, n in [(-1, 5), (6, 5)]:
        with pytest.raises(ValueError, match="between 0 and the count"):
            wilson(k, n)
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        wilson(1, 2, confidence=95)


# Bootstrap.


def test_bootstrap_of_the_mean_is_near_the_normal_interval():
    values = np.random.default_rng(0).normal(2.0, 3.0, 400)
    found = bootstrap(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert found.value == pytest.approx(values.mean(), rel=1e-12)
    assert (found.low, found.high) == (
        pytest.approx(values.mean() - half, abs=0.05),
        pytest.approx(values.mean() + half, abs=0.05),
    )


def test_bootstrap_covers_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        found = bootstrap(rng.exponential(1.0, 80), resamples=400, seed=trial)
        covered += found.low <= 1.0 <= found.high
    assert 0.88 <= covered / 200 <= 0.985


def test_bootstrap_draws_rows_together_and_the_same_every_time():
    values = np.random.default_rng(2).normal(size=(50, 4))
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3)
    assert bootstrap(values, seed=3) != bootstrap(values, seed=4)
    tied = np.repeat(values[:, :1], 4, axis=1)  # four copies of a prompt's value are one observation, not four
    one = bootstrap(values[:, 0])
    four = bootstrap(tied)
    assert (four.high - four.low) == pytest.approx(one.high - one.low, rel=1e-9)
    median = bootstrap(values[:, 0], lambda drawn: np.median(drawn, axis=1))
    assert median.value == pytest.approx(np.median(values[:, 0]))


def test_bootstrap_of_a_constant_and_of_nothing():
    assert bootstrap([2.0, 2.0, 2.0]) == Interval(2.0, 2.0, 2.0, 3)
    assert bootstrap([5.0]) == Interval(5.0, 5.0, 5.0, 1)
    with pytest.raises(ValueError, match="no rows"):
        bootstrap([])
    with pytest.raises(ValueError, match=r"values\[1\] is not finite"):
        bootstrap([1.0, math.nan])


def test_bootstrap_in_blocks_is_the_same_size():
    values = np.arange(3_000.0)
    found = bootstrap(values, resamples=2500)  # two blocks
    half = 1.96 * values.std() / math.sqrt(3000)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)


# pass@k.


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one():
    for n, c in [(1, 0), (1, 1), (5, 0), (5, 2), (6, 6), (7, 1)]:
        correct = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(correct, k))
            assert pass_at_k(n, [c], k)[0] == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_is_unbiased_and_stable():
    rng = np.random.default_rng(5)
    p, k = 0.13, 4
    found = pass_at_k(10, rng.binomial(10, p, 20_000), k).mean()
    assert found == pytest.approx(1 - (1 - p) ** k, abs=0.006)
    assert pass_at_k(100_000, [50_000], 100)[0] == pytest.approx(1.0)
    assert pass_at_k([4, 8], [1, 1], 1).tolist() == pytest.approx([0.25, 0.125])


@pytest.mark.parametrize(("n", "c", "k"), [(3, 1, 4), (3, 1, 0), (3, 4, 1), (3, -1, 1)])
def test_pass_at_k_refuses_what_cannot_be(n, c, k):
    with pytest.raises(ValueError, match=r"pass@k needs|must lie between"):
        pass_at_k(n, [c], k)


# Win rate.


def test_win_rate_counts_ties_as_half():
    found = win_rate([2.0, 1.0, 0.0, 5.0], [1.0, 1.0, 3.0, 4.9])
    assert found.value == 2.5 / 4
    assert win_rate([2.0, 1.0, 0.0, 5.0], [1.0, 1.0, 3.0, 4.9], tie_margin=0.2).value == 2.0 / 4
    a, b = np.random.default_rng(6).normal(size=(2, 300))
    forth, back = win_rate(a, b), win_rate(b, a)
    assert forth.value + back.value == pytest.approx(1.0)
    assert forth.low == pytest.approx(1 - back.high)
    assert forth.low < 0.5 < forth.high


def test_win_rate_of_several_answers_is_over_all_pairs():
    a, b = np.random.default_rng(8).integers(0, 3, (2, 5, 4)).astype(float)
    shares_by_hand = [np.mean([(x > y) + 0.5 * (x == y) for x in p for y in q]) for p, q in zip(a, b, strict=True)]
    found = win_rate(a, b)
    assert found.value == pytest.approx(np.mean(shares_by_hand))
    assert found.count == 5
    assert win_rate(a, b[:, :2]).count == 5


def test_shares_cover_at_least_as_often_as_they_say():
    """Prompts of unequal difficulty with 3 answers each: the mean share is in the interval."""
    rng = np.random.default_rng(9)
    covered = 0
    for _ in range(300):
        difficulty = rng.beta(0.5, 0.5, 40)
        found = shares(rng.binomial(3, difficulty) / 3)
        covered += found.low <= 0.5 <= found.high
    assert covered / 300 > 0.94
    assert shares([0.0] * 20).high > 0.1, "that all fail is no proof that all would"
    for wrong in ([1.1], [-0.1], [[0.5]]):
        with pytest.raises(ValueError, match="one share"):
            shares(wrong)


def test_win_rate_refuses_what_cannot_be_compared():
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(3,\)"):
        win_rate([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"scores_b\[0\] is not finite"):
        win_rate([1.0], [math.inf])


# Best of n.


def test_best_of_n_is_the_mean_over_all_subsets():
    rng = np.random.default_rng(7)
    scores, gold = rng.normal(size=(2, 3, 6))
    for n in range(1, 7):
        expected = [
            [max(subset)[1] for subset in itertools.combinations(zip(s, g, strict=True), n)]
            for s, g in zip(scores, gold, strict=True)
        ]
        assert best_of_n(scores, n, gold).tolist() == pytest.approx([float(np.mean(row)) for row in expected], abs=1e-12)
    assert best_of_n(scores, 1).tolist() == pytest.approx(scores.mean(axis=1).tolist())
    assert best_of_n(scores, 6).tolist() == pytest.approx(scores.max(axis=1).tolist())


def test_best_of_n_does_not_depend_on_the_order_of_samples():
    scores = np.array([[1.0, 1.0, 0.0, 1.0]])
    gold = np.array([[3.0, 6.0, 100.0, 0.0]])
    assert best_of_n(scores, 4, gold).tolist() == pytest.approx([3.0])  # three share the first place
    for order in itertools.permutations(range(4)):
        assert best_of_n(scores[:, order], 2, gold[:, order])[0] == pytest.approx(best_of_n(scores, 2, gold)[0])


def test_best_of_n_with_many_samples_does_not_overflow():
    scores = np.random.default_rng(8).normal(size=(1, 2000))
    found = best_of_n(scores, 1000)[0]
    assert 2.5 < found <= scores.max()


def test_best_of_n_refuses_what_cannot_be():
    for n in (0, 4):
        with pytest.raises(ValueError, match="best-of-n needs"):
            best_of_n(np.zeros((2, 3)), n)
    with pytest.raises(ValueError, match="must be"):
        best_of_n(np.zeros((2, 3)), 2, np.zeros((3, 2)))


def test_kl_of_best_of_n_is_the_integral_of_its_density():
    """The best of n uniform draws has density n u^(n-1) against 1: KL = integral of f log f."""
    u = (np.arange(400_000) + 0.5) / 400_000
    for n in (1, 2, 5, 16):
        density = n * u ** (n - 1)
        assert best_of_n_kl(n) == pytest.approx(float((density * np.log(density)).mean()), abs=1e-4)
    assert best_of_n_kl(1) == 0.0
    with pytest.raises(ValueError, match="at least one"):
        best_of_n_kl(0)
