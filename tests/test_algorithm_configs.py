"""The run files of the algorithms through the real commands: each loads, runs, says what it is; what a user can get wrong."""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax import cli, config, config_file, metrics, setups
from rlhf_jax.rewards import make_reward
from rlhf_jax.rewards.math_answer import math_answer
from rlhf_jax.types import RewardInput

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
GSM8K = ROOT / "tests/data/gsm8k_rows.jsonl"  # 16 rows, Cobbe et al. 2021; the MIT licence stands beside them
TINY = ("model.scratch.width=32", "model.scratch.layers=2", "model.scratch.kv_heads=2", "model.scratch.mlp_width=64")
SHORT = ("steps=2", "batch_size=16", "log.eval_every=0", "log.eval_prompts=2")
TASKS = {path.stem: path.stem.rpartition("_")[2] for path in CONFIGS if path.stem.endswith(("_addition", "_reviews"))}
STARTS = {name for name in TASKS if name.startswith("sft_")}


def command(*arguments):
    """Exit status of a command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", dict(os.environ))
        patch.setattr(sys, "argv", ["rlhf-jax", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as left:
            return left.code
    return 0


def run(name, out, *overrides):
    """The rows that a shortened run of configs/NAME.yaml wrote."""
    path = ROOT / "configs" / f"{name}.yaml"
    few = ("data.limit=200",) if name.endswith("_reviews") else ()
    few += ("data.task_options={digits: 2, count: 200}",) if name.endswith("_addition") else ()
    assert command(config_file.stage_of(path), path, f"out={out}", *SHORT, *few, *overrides) == 0
    return metrics.read_rows(out / metrics.METRICS)


@pytest.fixture(scope="module", autouse=True)
def all_on_one_device(on_one_device):
    """Programs for one device compile and start sooner; that eight agree with one is shown elsewhere."""
    with on_one_device():
        yield


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """Tiny models fine-tuned by the sft_*.yaml files, by task: what the other files start from."""
    folder = tmp_path_factory.mktemp("starts")
    for name in sorted(STARTS):
        assert [row["step"] for row in run(name, folder / TASKS[name], *TINY) if "sft/loss_nats" in row] == [1, 2]
    return folder


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_first_two_lines_are_the_command_and_what_to_expect(path):
    first, second = path.read_text(encoding="utf-8").splitlines()[:2]
    found = re.match(r"# rlhf-jax (\w+) (configs/\S+)", first)
    assert found, first
    assert found[1] in (config_file.stage_of(path), "fit")
    assert found[2] == f"configs/{path.name}"
    assert re.match(r"# .*\b(CPU|TPU)\b.*\.$", second), second


def test_every_algorithm_has_a_file():
    assert {config_file.stage_of(path) for path in CONFIGS} == set(config.STAGES)
    losses = {path.stem: config_file.load(path, [], config.DPORun).dpo.loss for path in CONFIGS if "dpo: {" in path.read_text()}
    assert losses == {"dpo_reviews": "dpo", "ipo_reviews": "ipo"}


def test_dr_grpo_and_dapo_are_the_values_that_the_page_names():
    page = (ROOT / "docs/algorithms.md").read_text(encoding="utf-8")
    for name, row in {"dr_grpo": "Dr.GRPO", "dapo": "DAPO"}.items():
        settings = config_file.load(ROOT / f"configs/{name}_addition.yaml", [], config.GRPORun).grpo
        cells = next(line for line in page.splitlines() if line.startswith(f"| {row} (")).split("|")[2:6]
        wanted = [settings.advantage_scale, settings.aggregation, settings.clip_high, settings.kl_coef]
        assert [cell.strip(" `") for cell in cells] == [f"{value:g}" if isinstance(value, float) else value for value in wanted]
        assert settings.drop_uninformative == (settings.overlong_buffer > 0) == (row == "DAPO")


@pytest.mark.parametrize("name", sorted(set(TASKS) - STARTS))
def test_every_file_runs(name, starts, tmp_path):
    graded = (
        () if TASKS[name] == "reviews" else ("reward.functions=[{function: length, options: {unit: characters, maximum: 2}}]",)
    )
    rows = run(name, tmp_path, f"model.path={starts / TASKS[name] / 'final'}", *graded)  # no untrained model gets a sum right
    key = {"dpo_reviews": "dpo/loss", "ipo_reviews": "dpo/loss", "kto_reviews": "kto/loss"}.get(name, "policy/loss")
    trained = [row for row in rows if key in row]
    assert [row["step"] for row in trained] == [1, 2]
    assert all(np.isfinite(row[key]) for row in trained)
    assert all(row[key.partition("/")[0].replace("dpo", "update").replace("kto", "update") + "/grad_norm"] > 0 for row in trained)
    assert (tmp_path / "final/model.safetensors").is_file()


def test_kto_learns_from_single_answers_too(starts, tmp_path):
    path = tmp_path / "answers.jsonl"
    answers = [("it was nice .", True), ("it was dull .", False)]
    lines = [{"prompt": "the hotel :", "completion": text, "label": good} for text, good in answers] * 80
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    changes = (f"model.path={starts / 'reviews/final'}", "data.task=null", f"data.path={path}", "steps=4")
    rows = run("kto_reviews", tmp_path / "run", *changes)
    trained = [row for row in rows if "kto/loss" in row]
    assert trained[0]["kto/desirable_reward"] == trained[0]["kto/undesirable_reward"] == 0.0
    assert trained[-1]["kto/desirable_reward"] > 0 > trained[-1]["kto/undesirable_reward"]
    assert [row["step"] for row in rows if "kto/eval_loss" in row] == [0, 4]


# GSM8K: data, chat template, answer check, training


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory):
    """A tiny model fine-tuned on rows of GSM8K, and GRPO from it: the directories of both runs."""
    folder = tmp_path_factory.mktemp("gsm8k")
    run("sft_gsm8k", folder / "sft", f"data.path={GSM8K}", *TINY, "model.scratch.vocabulary=300", "batch_size=8")
    run("grpo_gsm8k", folder / "grpo", *GRPO, f"model.path={folder / 'sft/final'}")
    return folder


GRPO = (f"data.path={GSM8K}", "data.eval_fraction=0.3", "sampling.max_new_tokens=12", "grpo.group_size=4")


def gsm8k_run(name, stage, *overrides):
    return config_file.load(ROOT / f"configs/{name}.yaml", [f"data.path={GSM8K}", *overrides], config.STAGES[stage])


def test_gsm8k_fine_tuning_trains_the_answers_and_nothing_else(gsm8k):
    settings = gsm8k_run("sft_gsm8k", "sft", f"model.path={gsm8k / 'sft/final'}", "model.scratch=null", "batch_size=8")
    plan = setups.plan_offline("sft", settings)
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    assert plan.data.tables.counts()["kept"] == len(rows) == 16
    for table, example in (plan.data.tables.locate(i) for i in range(16)):
        ids, trained = table.example(example)[0]
        asked, answered = (plan.tokenizer.decode(ids[keep], skip_special=False) for keep in (~trained, trained))
        assert asked == f"<bos><|user|>{rows[example]['question']}<|assistant|>"
        assert answered == f"{rows[example]['answer']}<eos>"


def test_gsm8k_rewards_are_right_by_the_data_s_own_answers(gsm8k):
    settings = gsm8k_run("grpo_gsm8k", "grpo", f"model.path={gsm8k / 'sft/final'}")
    plan, reward = setups.plan_online("grpo", settings), make_reward(settings.reward)
    index = np.arange(16)
    gold = [str(answer) for answer in plan.data.columns(index)["answer"]]
    changed = [re.sub(r"#### (.*)$", lambda found: f"#### {int(found[1].replace(',', '')) + 1}", answer) for answer in gold]

    def score(responses):
        return reward(RewardInput(plan.data.texts(index), responses, np.ones(16, bool), plan.data.columns(index)))[0]

    np.testing.assert_allclose(score(gold), 1.1, rtol=1e-6)  # right, and in the form that is asked for
    np.testing.assert_allclose(score(changed), 0.1, rtol=1e-6)
    np.testing.assert_array_equal(score(["no number"] * 16), 0.0)


def test_gsm8k_grpo_samples_scores_and_trains(gsm8k):
    rows = metrics.read_rows(gsm8k / "grpo" / metrics.METRICS)
    trained = [row for row in rows if "policy/loss" in row]
    assert [row["step"] for row in trained] == [1, 2]
    assert all(np.isfinite(row["policy/loss"]) and row["rollout/logprob_gap_max_nats"] < 1e-4 for row in trained)
    questions = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    samples = metrics.read_rows(gsm8k / "grpo" / metrics.SAMPLES)
    assert len(samples) == 4  # two prompts, before and after
    for row in samples:
        source = questions[row["index"]]
        assert row["prompt"] == f"<bos><|user|>{source['question']}<|assistant|>"
        batch = RewardInput([row["prompt"]], [row["response"]], np.asarray([row["finished"]]), {"answer": [source["answer"]]})
        assert row["score"] == pytest.approx(math_answer(batch, strict=True, format_bonus=0.1)[0])


# What a user can get wrong: one message, exit status 2


@pytest.fixture
def refused(tmp_path, capsys, starts):
    """refused("dpo_reviews", "key=value") -> the one message; nothing was made."""

    def call(name, *overrides):
        path = ROOT / "configs" / f"{name}.yaml"
        model = f"model.path={starts / TASKS[name] / 'final'}"
        capsys.readouterr()
        assert command(config_file.stage_of(path), path, f"out={tmp_path / 'run'}", model, *overrides) == 2
        text = capsys.readouterr().err
        assert re.fullmatch(r"rlhf-jax: .+\n", text), text  # one line
        assert not (tmp_path / "run").exists()
        return text

    return call


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo", "rloo"])
def test_a_group_size_that_does_not_divide_the_batch(name, refused):
    key = f"{config_file.stage_of(ROOT / f'configs/{name}_addition.yaml')}.group_size"
    assert f"{key} is 7; it must divide batch_size = 256; nearest: 4 or 8" in refused(f"{name}_addition", f"{key}=7")


@pytest.mark.parametrize("name", ["dpo", "ipo", "kto"])
def test_prompts_without_answers(name, refused, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "the hotel :"}\n' * 80)
    text = refused(f"{name}_reviews", "data.task=null", f"data.path={path}")
    needed = "prompt+chosen+rejected | chosen+rejected (for kto also prompt+completion+label)"
    assert f"{path}:1: columns prompt fit no format of preferences; needed: {needed}" in text
    assert "data.columns.chosen=" in text


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_pairs_whose_two_answers_are_equal(name, refused, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "the hotel :", "chosen": "it was nice .", "rejected": "it was nice ."}\n' * 80)
    text = refused(f"{name}_reviews", "data.task=null", f"data.path={path}")
    assert "0 rows left for preferences: 80 rows, 80 dropped: chosen equals rejected, 0 kept" in text
    assert "0 kept; a pair needs two different answers: mend the file, or say with data.columns.chosen" in text


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("dpo_reviews", "dpo.label_smoothing=0.1", "dpo.loss dpo does not read it"),
        ("kto_reviews", "batch_size=1", "batch_size is 1; kto pairs every prompt with another row's answer"),
        ("rloo_addition", "rloo.group_size=1", "rloo.group_size is 1; it must be at least 2"),
        ("remax_addition", "sampling.temperature=0", "sampling.temperature is 0; remax needs samples"),
    ],
)
def test_settings_that_contradict_the_algorithm(name, override, message, refused):
    assert message in refused(name, override)
