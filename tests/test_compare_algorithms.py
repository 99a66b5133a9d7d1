"""The comparison of all algorithms: it scores as the tasks do, counts compute as the page does, and runs."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import config, config_file
from rlhf_jax.data.tasks import TASKS
from rlhf_jax.types import RewardInput, Rollout

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("compare_algorithms", ROOT / "scripts/compare_algorithms.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answers_to(name, task, rows, seed):
    """Token lists: what the data says, nonsense, repetitions; ended or not."""
    rng, tokenizer = np.random.default_rng(seed), TASKS[name].tokenizer()
    data = TASKS[name].rows("sft", 0)
    for n in range(rows):
        kind, ended = n % 3, n % 2 == 0
        if kind == 0:
            ids = tokenizer.encode(data[n]["completion"])
        else:
            ids = list(rng.integers(4, tokenizer.vocab_size, int(rng.integers(1, task.length + 1))))
            ids = ids if kind == 1 else (ids[: int(rng.integers(1, 5))] * task.length)[: len(ids)]
        yield [*ids[: task.length - 1], tokenizer.eos_id] if ended else ids[: task.length]


@pytest.mark.parametrize("name", ["addition", "reviews"])
def test_scores_on_tokens_are_those_of_the_task_s_reward_function(script, name):
    options = {"digits": 2, "count": 300} if name == "addition" else {}
    task = script.load_task(config.SFTRun(data=config.Data(task=name, task_options=options)))
    count, tokenizer = 300, TASKS[name].tokenizer()
    rows = jnp.arange(count) % len(task.prompts)
    right = [row["answer"] for row in TASKS[name].rows("prompts", 0, **options)] if name == "addition" else []
    tokens, chosen = np.full((count, task.length), task.pad), np.zeros((count, task.length), bool)
    for n, ids in enumerate(answers_to(name, task, count, seed=0)):
        ids = [*tokenizer.encode(right[n]), task.eos] if name == "addition" and n % 5 == 0 else ids
        tokens[n, : len(ids)], chosen[n, : len(ids)] = ids, True
    finished = (tokens == task.eos).any(1)
    prompts = task.prompts[rows]
    rollout = Rollout(
        tokens=jnp.concatenate([prompts, jnp.asarray(tokens)], 1).astype(jnp.int32),
        mask=jnp.concatenate([prompts != task.pad, jnp.asarray(chosen)], 1),
        action_mask=jnp.asarray(chosen),
        finished=jnp.asarray(finished),
        logprobs=jnp.zeros(chosen.shape),
        index=rows,
    )
    texts = [tokenizer.decode(ids[keep]) for ids, keep in zip(tokens, chosen, strict=True)]
    asked = [tokenizer.decode(ids) for ids in np.asarray(prompts)]
    want = TASKS[name].reward(RewardInput(asked, texts, finished, {}))
    assert len(np.unique(want)) > (1 if name == "addition" else 50)
    np.testing.assert_allclose(jax.jit(task.score)(rollout), want, atol=1e-4)


def test_held_out_prompts_are_not_trained_on(script):
    few = "data.task_options={digits: 2, count: 3000}"
    task = script.load_task(config_file.load(ROOT / "configs/sft_addition.yaml", [few], config.SFTRun))
    train, held_out = ({tuple(row) for row in np.asarray(task.prompts[rows]).tolist()} for rows in (task.train, task.held_out))
    assert train & held_out == set()
    assert len(held_out) > 150
    pairs = {tuple(row) for row in np.asarray(task.pairs.chosen.tokens[:, : task.prompts.shape[1] - 2]).tolist()}
    assert len(pairs) > 1000


def test_compute_is_counted_as_on_the_page(script):
    page = (ROOT / "docs/algorithms.md").read_text(encoding="utf-8")
    for name, (file, changes) in script.CASES.items():
        path = script.CONFIGS / f"{file}.yaml"
        stage = config_file.stage_of(path)
        run = config_file.load(path, changes, config.STAGES[stage])
        passes = script.passes_per_answer(stage, getattr(run, stage))
        found = re.search(rf"^\| {re.escape(name)} \| (\d+) \|", page, re.MULTILINE)
        assert found, name
        assert float(found[1]) == passes, name


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(
    ("task", "options", "steps"), [("addition", ("data.task_options={digits: 2, count: 200}",), 2), ("reviews", (), 1)]
)
def test_it_runs(task, options, steps, script, tmp_path, monkeypatch, capsys):
    start = ["model.scratch.width=32", "model.scratch.heads=4", "model.scratch.kv_heads=4", "model.scratch.mlp_width=64"]
    start += ["steps=2", "batch_size=16", "log.eval_every=0", *options]
    arguments = ["--task", task, "--out", str(tmp_path), "--seeds", "2", "--start", *start, "--change", "batch_size=16"]
    monkeypatch.setattr(script, "HELD_OUT", 64)
    monkeypatch.setattr(script, "SCORER_STEPS", 2)
    monkeypatch.setattr(sys, "argv", ["compare", *arguments, "--budget", str(100 * steps), "--only", "RLOO"])
    script.main()
    row = json.loads((tmp_path / task / "RLOO.json").read_text())
    assert row["steps"] == steps
    assert len(row["after"]) == 2
    assert (tmp_path / task / "reward/final/model.safetensors").is_file() == (task == "reviews")  # what scores its answers
    assert re.search(rf"\| RLOO \| 6 \| -?\d+\.\d+ -> -?\d+\.\d+ ± \d+\.\d+ in {steps} steps \|", capsys.readouterr().out)
