"""Widths that leave little padding: the best ones, every row once an epoch, a function of (seed, step)."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import directories
import jax
import numpy as np
import pytest

from rlhf_jax import config, parallel, setups, setups_abstract, testing
from rlhf_jax.config import Data
from rlhf_jax.data import buckets, order
from rlhf_jax.data.batches import make_prompt_data
from rlhf_jax.data.tasks import TASKS

LENGTHS = np.random.default_rng(0).integers(1, 65, 40)


def slots(widths: tuple[int, ...], lengths: np.ndarray) -> int:
    return int(np.asarray(widths)[np.searchsorted(widths, lengths)].sum())


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("least", [1, 9])
def test_no_other_widths_leave_less_padding(count: int, least: int):
    own = buckets.rounded(LENGTHS, 64)
    found = tuple(buckets.widths(own, np.ones(len(own)), count, least))
    every = [
        (*inner, 64) for used in range(count) for inner in itertools.combinations(range(8, 64, 8), used)
    ]  # fmt: skip
    allowed = [widths for widths in every if np.diff([0, *(np.sum(own <= width) for width in widths)]).min() >= least]
    assert found in allowed
    assert slots(found, own) == min(slots(widths, own) for widths in allowed)


def test_more_widths_never_leave_more_padding_and_one_is_the_longest():
    fractions = []
    for count in (1, 2, 4, 8):
        found = buckets.make_buckets([LENGTHS], (1.0,), count=count, limit=64, least=2)
        assert sorted(np.concatenate([bucket.rows[0] for bucket in found]).tolist()) == list(range(40))
        assert sum(bucket.share for bucket in found) == pytest.approx(1.0)
        assert found[-1].width == 64
        assert len(found) <= count
        fractions.append(buckets.padded_fraction(found, [LENGTHS]))
    assert fractions == sorted(fractions, reverse=True)
    assert fractions[0] == pytest.approx(1 - LENGTHS.mean() / 64)
    assert fractions[-1] < 0.15 < fractions[0]


def test_every_bucket_runs_through_its_rows_and_gets_its_share():
    found = buckets.make_buckets([LENGTHS, LENGTHS[:20]], (3.0, 1.0), count=3, limit=64, least=8)
    drawn: dict[int, list[tuple[int, int]]] = {number: [] for number in range(len(found))}
    for step in range(600):
        number, rows = buckets.draw(found, 7, step, 4)
        assert (number, rows) == buckets.draw(found, 7, step, 4)
        drawn[number] += rows
    for number, bucket in enumerate(found):
        assert len(drawn[number]) / 2400 == pytest.approx(bucket.share, abs=0.06)
        wanted = {(source, int(row)) for source, rows in enumerate(bucket.rows) for row in rows}
        assert set(drawn[number]) == wanted
    from_first = sum(source == 0 for rows in drawn.values() for source, _ in rows) / 2400
    assert from_first == pytest.approx(0.75, abs=0.06)
    alone = buckets.make_buckets([LENGTHS], (1.0,), count=2, limit=64, least=8)
    for number, bucket in enumerate(alone):
        rows = [row for step in range(60) for which, found_rows in [buckets.draw(alone, 1, step, 8)] if which == number
                for _, row in found_rows]  # fmt: skip
        size = len(bucket.rows[0])
        assert sorted(rows[:size]) == sorted(bucket.rows[0].tolist())  # the first epoch: each once


def test_seeds_and_streams_are_different():
    assert len({order.derived(seed, number) for seed in range(5) for number in range(-1, 5)}) == 30
    turns = [order.turn(3, step, (1.0, 2.0)) for step in range(300)]
    for stream in (0, 1):
        assert [before for which, before in turns if which == stream] == list(range(sum(which == stream for which, _ in turns)))


def test_batches_have_one_of_the_widths_and_hold_the_same_prompts():
    data = Data(task="reviews", max_prompt_tokens=24, limit=200)
    tokenizer = TASKS["reviews"].tokenizer()
    rows = [{"prompt": " ".join(["good"] * (1 + n % 23)), "number": n} for n in range(160)]
    make = dataclasses.replace(data, task=None, eval_fraction=0.05)
    one, three = (
        make_prompt_data(dataclasses.replace(make, length_buckets=count), tokenizer, seed=0, batch_size=8, rows=rows)
        for count in (1, 3)
    )
    assert [bucket.width for bucket in one.buckets] == [one.length] == [24]
    assert [bucket.width for bucket in three.buckets] == [8, 16, 24]
    assert three.padded_fraction < 0.6 * one.padded_fraction
    seen: list[int] = []
    for step in range(120):
        batch = three.batch(step)
        assert batch.tokens.shape[1] in (8, 16, 24)
        assert batch.tokens.shape[1] - batch.mask.sum(1).min() < 8 + 1
        whole = one.prompts(batch.index)
        np.testing.assert_array_equal(whole.tokens[:, -batch.tokens.shape[1] :], batch.tokens)
        assert not whole.mask[:, : -batch.tokens.shape[1]].any() or batch.tokens.shape[1] == 24
        seen += batch.index.tolist()
    assert set(seen) == set(range(len(rows))) - set(one.tables.eval_index().tolist())
    assert one.eval_batch(8).tokens.shape == three.eval_batch(8).tokens.shape == (8, 24)


def run_of(stage: str, **changes: object) -> config.OnlineRun:
    make: Any = config.STAGES[stage]
    scratch = testing.tiny_scratch(directories.VOCABULARY)
    return make(
        model=config.Model(scratch=scratch), data=Data(task="reviews", max_prompt_tokens=8), batch_size=16,
        sampling=config.Sampling(max_new_tokens=8), **changes,
    )  # fmt: skip


@pytest.mark.parametrize("stage", [stage for stage in config.STAGES if stage not in config.OFFLINE])
def test_the_programs_of_a_run_are_counted_before_it_starts(stage: str):
    mesh = parallel.make_mesh(config.Mesh(), jax.devices()[:1])
    model = config.Reward(model=str(directories.reward_model()))
    for run in [run_of(stage), run_of(stage, reward=model)][: 2 if stage in ("ppo", "grpo") else 1]:
        found = setups_abstract.abstract_programs(stage, run, mesh)[0]
        assert buckets.programs(run, 1) == len(found)
        a_width = len(set(found) - {"sync", "answer"})
        assert buckets.programs(run, 3) == len(found) + 2 * a_width


def test_a_run_says_its_widths_their_padding_and_its_programs(tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": str((n + 7) ** 99)[: 1 + n % 50]}) for n in range(200)))
    data = Data(path=str(path), max_prompt_tokens=64, eval_fraction=0.05)
    length = config.Reward(functions=(config.RewardFunction(function="length"),))
    run = dataclasses.replace(run_of("ppo", reward=length), data=data)
    padded = []
    for widths, programs in ((1, 4), (2, 7), (4, 13)):
        plan = setups.plan_online("ppo", dataclasses.replace(run, data=dataclasses.replace(data, length_buckets=widths)))
        assert len(plan.data.buckets) == widths
        padded.append(plan.data.padded_fraction)
        assert f"{padded[-1]:.1%} of that is padding; {programs} programs" in " ".join(plan.notes)
    assert padded == sorted(padded, reverse=True)
