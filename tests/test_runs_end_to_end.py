"""Fine-tuning, reward model, PPO as the commands run them, with tiny models: what they write, that they agree with themselves."""

import dataclasses
import json
import re
import shutil
import sys
import threading
import types
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import checkpoint, checks, config, export, metrics, models, offline, online, parallel, quickstart, setups
from rlhf_jax.data.tokenizer import load_tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.models import decoding, lora
from rlhf_jax.scorer import open_scorer
from rlhf_jax.types import Prompts

TINY = config.Scratch(width=32, layers=2, heads=4, kv_heads=2, mlp_width=64, max_length=64)
OPTIMIZER = config.Optimizer(learning_rate=3e-3, schedule="constant", eps=1e-8)
DATA = config.Data(task="reviews", max_prompt_tokens=8, max_tokens=40, limit=256)
LOG, SAVE = config.Log(eval_every=2, eval_prompts=3, eval_rows=16), config.Save(every=2)


def sft_run(out: Path, **changes: Any) -> config.SFTRun:
    run = config.SFTRun(
        out=str(out), steps=4, batch_size=16, model=config.Model(scratch=TINY), data=DATA, optimizer=OPTIMIZER, log=LOG, save=SAVE
    )
    return dataclasses.replace(run, **changes)


def reward_run(out: Path, tuned: Path, **changes: Any) -> config.RewardRun:
    model = config.Model(path=str(tuned))
    run = config.RewardRun(out=str(out), steps=4, batch_size=16, model=model, data=DATA, optimizer=OPTIMIZER, log=LOG, save=SAVE)
    return dataclasses.replace(run, **changes)


def ppo_run(out: Path, tuned: Path, scorer: Path | None, **changes: Any) -> config.PPORun:
    run = config.PPORun(
        out=str(out),
        steps=3,
        batch_size=16,
        model=config.Model(path=str(tuned)),
        data=DATA,
        reward=config.Reward(model=None if scorer is None else str(scorer)),
        sampling=config.Sampling(max_new_tokens=12),
        ppo=config.PPO(epochs=2, minibatches=2, kl_coef=0.02),
        actor_optimizer=OPTIMIZER,
        critic_optimizer=OPTIMIZER,
        log=LOG,
        save=SAVE,
    )
    return dataclasses.replace(run, **changes)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, on_one_device: Any) -> Path:
    """A directory with a fine-tuned model and a reward model, one made on one device and one on all."""
    out = tmp_path_factory.mktemp("runs")
    with on_one_device():
        offline.run("sft", sft_run(out / "sft"))
    offline.run("reward", reward_run(out / "reward", out / "sft" / "final"))
    return out


@pytest.fixture(scope="module")
def policy(base: Path) -> tuple[Path, setups.OnlineSetup]:
    """A PPO run against them, and what it held."""
    made: list[setups.OnlineSetup] = []
    with pytest.MonkeyPatch.context() as patch:
        set_up = setups.set_up_online
        patch.setattr(setups, "set_up_online", lambda plan: made.append(set_up(plan)) or made[0])
        out = online.run("ppo", ppo_run(base / "ppo", base / "sft" / "final", base / "reward" / "final"))
    return out, made[0]


def rows_of(out: Path, key: str) -> list[dict[str, Any]]:
    return [row for row in metrics.read_rows(out / metrics.METRICS) if key in row]


def test_fine_tuning_lowers_the_loss_and_writes_what_it_should(base: Path) -> None:
    rows = rows_of(base / "sft", "sft/loss_nats")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["sft/loss_nats"] < rows[0]["sft/loss_nats"]
    assert [row["step"] for row in rows_of(base / "sft", "sft/eval_loss_nats")] == [0, 2, 4]
    for name in ("sft/accuracy", "sft/eval_accuracy"):
        assert rows_of(base / "sft", name)[-1][name] > rows_of(base / "sft", name)[0][name] >= 0
    for name in ("config.resolved.yaml", "summary.json", "report.html", "final/config.json", "final/tokenizer.json"):
        assert (base / "sft" / name).is_file(), name
    summary = metrics.read_summary(base / "sft")
    assert summary["status"] == "finished"
    assert {phase["name"] for phase in summary["phases"]} == {"data", "train", "evaluate", "save", "report", "export"}


def test_a_reward_model_is_saved_with_its_calibration(base: Path) -> None:
    saved = json.loads((base / "reward" / "final" / "config.json").read_text())
    assert saved["architectures"] == ["LlamaForSequenceClassification"]
    found = models.load_checkpoint(base / "reward" / "final", head="score")
    assert found.calibration.std > 0
    assert (found.calibration.mean, found.calibration.std) != (0.0, 1.0)
    summary = metrics.read_summary(base / "reward")
    assert sum(each["count"] for each in summary["calibration"]) > LOG.eval_rows, "over all held-out pairs"


def test_a_reward_model_that_scores_texts_says_what_it_said_in_training(base: Path, policy: tuple[Path, Any]) -> None:
    """What `evaluate` and `serve` score with, on the answers of the run's own evaluations."""
    rows = [json.loads(line) for line in (policy[0] / "samples.jsonl").read_text().splitlines()]
    scorer = open_scorer(base / "reward" / "final")
    ids = [scorer.encode(row["prompt"], row["response"], row["finished"]) for row in rows]
    prompt = len(scorer.encode(rows[0]["prompt"], "", finished=False))
    whole = [n for n, row in enumerate(rows) if len(ids[n]) == prompt + row["length_tokens"]]  # others hold special tokens
    assert len(whole) >= 3
    found = scorer.score([ids[n] for n in whole])
    np.testing.assert_allclose(found, [rows[n]["score"] for n in whole], atol=1e-4)


def test_every_metric_of_ppo_is_there(policy: tuple[Path, setups.OnlineSetup]) -> None:
    rows = rows_of(policy[0], "reward/score")
    assert [row["step"] for row in rows] == [1, 2, 3]
    wanted = [
        "reward/score",
        "reward/gold",
        "kl/per_sequence_nats",
        "kl/per_token_nats",
        "policy/approx_kl_nats",
        "policy/clip_fraction",
        "value/clip_fraction",
        "policy/ratio_mean",
        "policy/ratio_max",
        "policy/entropy_nats",
        "value/explained_variance",
        "response/length_tokens",
        "response/eos_rate",
        "value/loss",
        "value/squared_error",
        "policy/loss",
        "kl/coef",
        "policy/first_ratio_mean",
        "policy/first_ratio_p99",
        "policy/first_ratio_max",
        "rollout/logprob_gap_max_nats",
        "time/step_s",
        "throughput/tokens_per_s",
        "memory/peak_mb",
    ]
    assert [name for name in wanted if name not in rows[0]] == []


def test_rule_10_the_first_ratio_is_one_and_sampling_agrees_with_scoring(policy: tuple[Path, setups.OnlineSetup]) -> None:
    for row in rows_of(policy[0], "reward/score"):
        assert row["policy/first_ratio_max"] < 1e-4
        assert row["rollout/logprob_gap_max_nats"] < 1e-4
    assert rows_of(policy[0], "eval/score")[0]["eval/kl_per_sequence_nats"] == pytest.approx(0.0, abs=1e-5)


def test_few_programs_and_none_compiled_twice(policy: tuple[Path, setups.OnlineSetup]) -> None:
    do = policy[1].do
    assert len(do) <= 8
    assert {name: step._cache_size() for name, step in do.items()} == dict.fromkeys(do, 1)


def test_samples_are_answers_to_fixed_prompts(policy: tuple[Path, setups.OnlineSetup]) -> None:
    rows = metrics.read_rows(policy[0] / metrics.SAMPLES)
    by_step: dict[int, list] = {}
    for row in rows:
        by_step.setdefault(row["step"], []).append((row["index"], row["prompt"]))
    assert sorted(by_step) == [0, 2, 3]
    assert by_step[0] == by_step[2] == by_step[3]
    assert len(by_step[0]) == 3
    assert all(row["gold"] is not None and row["length_tokens"] >= 1 for row in rows)


def test_actor_and_critic_are_exported(policy: tuple[Path, setups.OnlineSetup], base: Path) -> None:
    actor = models.load_checkpoint(policy[0] / "final", head="lm")
    start = models.load_checkpoint(base / "sft" / "final", head="lm")
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), actor.params, start.params)
    assert max(jax.tree.leaves(moved)) > 0
    critic = models.load_checkpoint(policy[0] / "final-critic", head="value")
    assert critic.drawn == ()
    assert load_tokenizer(policy[0] / "final").hash == load_tokenizer(base / "sft" / "final").hash


def same_model(ours: Path, theirs: Path) -> bool:
    names = {path.relative_to(theirs) for path in theirs.rglob("*") if path.is_file()}
    assert names == {path.relative_to(ours) for path in ours.rglob("*") if path.is_file()}
    return all((ours / name).read_bytes() == (theirs / name).read_bytes() for name in names)


def test_a_run_is_exported_again_as_it_exported_itself(
    policy: tuple[Path, setups.OnlineSetup], base: Path, tmp_path: Path
) -> None:
    runs = {"sft": (base / "sft", "final", "model"), "reward": (base / "reward", "final", "model")}
    runs |= {"ppo": (policy[0], "final", "model"), "critic": (policy[0], "final-critic", "critic")}
    for name, (run, final, part) in runs.items():
        assert same_model(export.export(run, tmp_path / name, part=part), run / final), name
    early = export.export(base / "reward" / "checkpoints" / "2", tmp_path / "early")
    found = json.loads((early / "config.json").read_text())
    assert (found["mean"], found["std"]) == (0.0, 1.0)
    assert not same_model(early, base / "reward" / "final")
    for arguments, words in (
        ({"source": policy[0], "part": "ema"}, "holds no ema; it has: model, critic$"),
        ({"source": policy[0], "out": tmp_path / "sft"}, "exists already"),
        ({"source": tmp_path}, "neither a run with checkpoints nor a checkpoint"),
    ):
        with pytest.raises(UserError, match=words):
            export.export(**({"out": tmp_path / "new"} | arguments))
    foreign = shutil.copytree(base / "sft", tmp_path / "foreign")
    (foreign / "summary.json").write_text('{"stage": "rank"}')
    (foreign / "config.resolved.yaml").write_text("rank: {group_size: 8}\n")
    with pytest.raises(UserError, match=r"foreign: a run of 'rank', which is none of sft, .*foreign/final is its export"):
        export.export(foreign, tmp_path / "new")
    saved = shutil.copytree(base / "sft", tmp_path / "harmed") / "checkpoints" / "4"
    victim = max(saved.rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"is damaged: .*{victim.name}"):
        export.export(tmp_path / "harmed", tmp_path / "new")
    for stage in ("reward", "sft"):  # of the two a reward model alone has something to look up there
        harmed = shutil.copytree(base / stage, tmp_path / f"{stage}-recordless")
        (harmed / "run.json").write_text('{"completed_step": 4')
    with pytest.raises(UserError, match=r"reward-recordless/run\.json is damaged"):
        export.export(tmp_path / "reward-recordless", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert same_model(export.export(tmp_path / "sft-recordless", tmp_path / "new"), base / "sft" / "final")


def test_the_same_command_again_says_that_it_is_complete(policy: tuple[Path, setups.OnlineSetup], base: Path) -> None:
    before = (policy[0] / metrics.METRICS).read_bytes()
    online.run("ppo", ppo_run(base / "ppo", base / "sft" / "final", base / "reward" / "final"))
    assert (policy[0] / metrics.METRICS).read_bytes() == before


def test_exports_that_were_taken_away_are_made_again_as_they_were(
    policy: tuple[Path, setups.OnlineSetup], base: Path, tmp_path: Path
) -> None:
    for name in ("reward", "ppo"):
        shutil.copytree(base / name, tmp_path / name)
        for path in (tmp_path / name).glob("final*"):
            shutil.rmtree(path)
    offline.run("reward", reward_run(tmp_path / "reward", base / "sft" / "final"))
    online.run("ppo", ppo_run(tmp_path / "ppo", base / "sft" / "final", base / "reward" / "final"))
    for name in ("reward/final", "ppo/final", "ppo/final-critic"):
        assert same_model(tmp_path / name, base / name), name


@pytest.mark.skipif(jax.device_count() < 8, reason="one simulated device: nothing to compare")
@pytest.mark.usefixtures("one_device")
def test_one_device_and_eight_agree(policy: tuple[Path, setups.OnlineSetup], base: Path, tmp_path: Path) -> None:
    assert parallel.make_mesh(config.Mesh()).size == 1, "eight would be compared with themselves"
    alone = online.run("ppo", ppo_run(tmp_path / "ppo", base / "sft" / "final", base / "reward" / "final"))
    for one, eight in zip(rows_of(alone, "reward/score"), rows_of(policy[0], "reward/score"), strict=True):
        for name in ("reward/score", "kl/per_sequence_nats", "response/length_tokens", "policy/loss", "value/loss"):
            assert one[name] == pytest.approx(eight[name], rel=2e-4, abs=2e-5), (one["step"], name)
    answers = [[row["response"] for row in metrics.read_rows(out / metrics.SAMPLES)] for out in (alone, policy[0])]
    assert answers[0] == answers[1]


@pytest.mark.usefixtures("one_device")
def test_few_rows_at_a_time_change_no_metric(policy: tuple[Path, setups.OnlineSetup], base: Path, tmp_path: Path) -> None:
    few = config.Sampling(max_new_tokens=12, rows=8)
    out = online.run("ppo", ppo_run(tmp_path / "ppo", base / "sft" / "final", base / "reward" / "final", sampling=few))
    for name in ("reward/score", "eval/score"):
        for one, other in zip(rows_of(policy[0], name), rows_of(out, name), strict=True):
            for key in [key for key in one if not key.startswith(("stage", "time", "throughput/", "memory/"))]:
                assert one[key] == pytest.approx(other[key], rel=2e-4, abs=2e-5), (one["step"], key)


def test_the_answers_to_a_prompt_are_numbered_on() -> None:
    """Row 5 stands in the batch three times, where two epochs meet: its twelve answers have twelve keys."""
    index = np.asarray([5, 3, 5, 5], np.int32)
    prompts = Prompts(tokens=np.zeros((4, 1), np.int32), mask=np.ones((4, 1), bool), index=index)
    np.testing.assert_array_equal(setups._numbered(prompts, 4).sample, [0, 0, 4, 8])


@pytest.mark.usefixtures("one_device")
def test_mixture_average_and_adaptive_coefficient_run_together(base: Path, tmp_path: Path) -> None:
    algorithm = config.PPO(
        epochs=1, ptx_coef=0.5, ema_decay=0.9, adaptive_kl=config.AdaptiveKL(target=0.1, horizon=100.0), kl_estimator="exact"
    )
    functions = (config.RewardFunction(function="length", weight=2.0, options={"maximum": 6}),)
    settings = ppo_run(
        tmp_path / "ppo",
        base / "sft" / "final",
        None,
        reward=config.Reward(model=str(base / "reward" / "final"), model_weight=0.5, functions=functions),
        ppo=algorithm,
        ptx_data=DATA,
        steps=2,
        score_parts=2,
    )
    out = online.run("ppo", settings)
    rows = rows_of(out, "reward/score")
    assert rows[1]["kl/coef"] != rows[0]["kl/coef"]
    assert all(row["ptx/loss_nats"] > 0 for row in rows)
    for row in rows:  # every part by itself
        assert row["reward/score"] == pytest.approx(0.5 * row["reward/model"] + 2 * row["reward/length"], abs=2e-5)
        assert row["reward/model"] != 0 != row["reward/length"]
    assert (out / "final-ema" / "config.json").is_file()
    assert any("eval_ema/score" in row for row in rows_of(out, "eval/score"))


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("adapter", [None, config.Lora(rank=2, alpha=4.0)], ids=["whole", "lora"])
def test_the_moving_average_of_a_bfloat16_actor_is_float32_and_compiles_nothing_twice(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: config.Lora | None
) -> None:
    made: list[setups.OnlineSetup] = []
    set_up = setups.set_up_online
    monkeypatch.setattr(setups, "set_up_online", lambda plan: made.append(set_up(plan)) or made[0])
    settings = config.RLOORun(
        out=str(tmp_path / "rloo"),
        steps=2,
        batch_size=4,
        model=config.Model(path=str(base / "sft" / "final"), param_dtype="bfloat16", lora=adapter),
        data=DATA,
        reward=config.Reward(functions=(config.RewardFunction(function="length", options={"maximum": 6}),)),
        sampling=config.Sampling(max_new_tokens=4),
        rloo=config.RLOO(group_size=2, kl_coef=0.0, ema_decay=0.9),
        actor_optimizer=OPTIMIZER,
        log=LOG,
        save=SAVE,
    )
    out = online.run("rloo", settings)
    saved = checkpoint.read(out / "checkpoints" / "2")
    kept = {name.split("/")[0]: leaf.dtype for name, leaf in saved.items() if name.startswith(("ema/", "actor/params/"))}
    assert kept == {"ema": np.float32, "actor": jnp.bfloat16}
    assert {name: step._cache_size() for name, step in made[0].do.items()} == dict.fromkeys(made[0].do, 1)
    assert len([row for row in rows_of(out, "eval/score") if "eval_ema/score" in row]) == 2
    again, final = export.export(out, tmp_path / "ema", part="ema"), out / "final-ema"
    assert same_model(again, final) if adapter is None else same_model(again / "adapter", final / "adapter")


@pytest.mark.usefixtures("one_device")
def test_grpo_runs_through_the_same_loop_without_a_critic_on_prompts_of_two_widths(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [" ".join(["the", "good", "warm", "hotel", *["bed", "kind"] * (4 * (n % 2)), str(n)]) for n in range(64)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    made: list[setups.OnlineSetup] = []
    set_up = setups.set_up_online
    monkeypatch.setattr(setups, "set_up_online", lambda plan: made.append(set_up(plan)) or made[0])
    read: list[int] = []  # prompts of every prefill that is traced
    prefill = decoding.prefill
    monkeypatch.setattr(decoding, "prefill", lambda d, p, tokens, *rest: read.append(len(tokens)) or prefill(d, p, tokens, *rest))
    settings = config.GRPORun(
        out=str(tmp_path / "grpo"),
        steps=3,
        batch_size=16,
        model=config.Model(path=str(base / "sft" / "final")),
        data=config.Data(path=str(tmp_path / "prompts.jsonl"), max_prompt_tokens=24, length_buckets=2),
        reward=config.Reward(functions=(config.RewardFunction(function="length", options={"maximum": 6}),)),
        sampling=config.Sampling(max_new_tokens=12, top_k=20),
        grpo=config.GRPO(group_size=4),
        actor_optimizer=OPTIMIZER,
        log=LOG,
        save=SAVE,
    )
    out = online.run("grpo", settings)
    rows = rows_of(out, "reward/score")
    assert len(rows) == 3
    assert rows[0]["rollout/logprob_gap_max_nats"] < 1e-4  # with kept sets, too
    assert not (out / "final-critic").exists()
    assert {4, 16} <= set(read)  # a group's prompt once; the evaluation's 16 prompts once each
    assert len({row["data/prompt_padded_fraction"] > 0.2 for row in rows}) == 2, rows
    for row in rows:
        width = 8 if row["data/prompt_padded_fraction"] > 0.2 else 16
        real = width * (1 - row["data/prompt_padded_fraction"]) + row["response/length_tokens"]
        assert row["data/padded_fraction"] == pytest.approx(1 - real / (width + 12), abs=1e-4)
    compiled = {name: step._cache_size() for name, step in made[0].do.items()}
    assert compiled == {"sync": 1, "rollout": 2, "answer": 1, "score": 2, "learn": 2}  # 8 of at most 8


@pytest.mark.usefixtures("one_device")  # as the run that it equals
def test_a_trace_of_one_step_is_written_and_nothing_else_changes(base: Path, tmp_path: Path) -> None:
    out = offline.run("sft", sft_run(tmp_path / "sft", log=dataclasses.replace(LOG, profile_step=3)))
    assert [path.suffix for path in (out / "profile").rglob("*.pb")] == [".pb"]
    rows, wanted = rows_of(out, "stage"), rows_of(base / "sft", "stage")
    timed = ("time", "memory", "throughput")
    for row in (*rows, *wanted):
        for name in [name for name in row if name.startswith(timed)]:
            del row[name]
    assert rows == wanted
    assert (out / "final" / "model.safetensors").read_bytes() == (base / "sft" / "final" / "model.safetensors").read_bytes()
    assert {path.name for path in out.iterdir()} - {path.name for path in (base / "sft").iterdir()} == {"profile"}


@pytest.mark.usefixtures("one_device")
def test_the_device_scores_while_the_host_rewards_and_memory_is_given_back(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    copies: list[weakref.ref] = []  # of the decoding copy
    waited: list[int] = []  # for which arrays the loop itself did
    set_up, wait = setups.set_up_online, jax.block_until_ready

    def waiting(array: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            waited.extend(map(id, jax.tree.leaves(array)))
        return wait(array)

    def told(name: str, call: Any) -> Any:
        def wrapped(*args: Any) -> Any:
            order.append(name)
            if name in ("score", "learn"):  # an evaluation's copy is gone as well
                assert [copy for copy in copies if copy() is not None] == []
            found = call(*args)
            if name == "sync":
                copies.extend(weakref.ref(leaf) for leaf in jax.tree.leaves(found))
            if name == "learn":
                assert id(args[2].finished) in waited, "until then the copy's memory is not free"
                assert [leaf for leaf in jax.tree.leaves(args[0]) if not leaf.is_deleted()] == []  # all of it was donated
                assert kinds(found[0].actor.opt_state) == kinds(found[0].critic.opt_state) == {"pinned_host"}
                assert kinds(found[0].actor.params) == {"device"}
                assert kinds(args[1].reference) == {"pinned_host"}
            return found

        return wrapped

    def kinds(tree: Any) -> set[str]:
        return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.ndim}

    def wrapped(plan: setups.OnlinePlan) -> setups.OnlineSetup:
        made = set_up(plan)
        do = {name: told(name, step) for name, step in made.do.items()}
        return dataclasses.replace(made, do=do, host_reward=told("host", made.host_reward))

    monkeypatch.setattr(setups, "set_up_online", wrapped)
    monkeypatch.setattr(jax, "block_until_ready", waiting)
    model = config.Model(path=str(base / "sft" / "final"), offload=("reference", "optimizer"))
    settings = ppo_run(tmp_path / "ppo", base / "sft" / "final", None, steps=1, log=config.Log(eval_every=0), model=model)
    online.run("ppo", settings)
    step = order[order.index("learn") - 4 : order.index("learn") + 1]
    assert step == ["sync", "rollout", "score", "host", "learn"]
    assert copies
    monkeypatch.undo()
    resumed = setups.set_up_online(setups.plan_online("ppo", settings)).abstract
    state = checkpoint.Checkpoints(tmp_path / "ppo" / "checkpoints", keep_last=1).restore(resumed).state
    assert kinds(state.actor.opt_state) == {"pinned_host"}


@pytest.mark.usefixtures("one_device")
def test_a_step_has_its_own_seconds_and_no_decoding_copy_lies_beside_an_update(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that only rewards move: a second each."""
    ready: list[bool] = []  # whether the parameters were there when they were to be copied
    set_up = setups.set_up_online

    def wrapped(plan: setups.OnlinePlan) -> setups.OnlineSetup:
        made = set_up(plan)

        def sync(params: Any, frozen: Any) -> Any:
            ready.append(all(leaf.is_ready() for leaf in jax.tree.leaves(params)))
            return made.do["sync"](params, frozen)

        def reward(batch: Any) -> Any:
            assert made.host_reward is not None
            clock.now += 1
            return made.host_reward(batch)

        return dataclasses.replace(made, do={**made.do, "sync": sync}, host_reward=reward)

    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(online, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(setups, "set_up_online", wrapped)
    settings = ppo_run(tmp_path / "ppo", base / "sft" / "final", None, steps=4, log=config.Log(eval_every=0))
    out = online.run("ppo", dataclasses.replace(settings, save=config.Save(every=0)))
    assert [row["time/step_s"] for row in rows_of(out, "time/step_s")] == [1.0] * 4
    assert len(ready) > 4
    assert all(ready)


@pytest.mark.usefixtures("one_device")
def test_what_a_run_does_not_measure_is_not_in_its_files_and_no_alarm(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No reference is held, and every answer is worth the same: no KL, no ratio, no entropy of an update."""
    settings = config.GRPORun(
        out=str(tmp_path / "grpo"),
        steps=2,
        batch_size=4,
        model=config.Model(path=str(base / "sft" / "final")),
        data=DATA,
        reward=config.Reward(functions=(config.RewardFunction(function="regex", options={"pattern": "never there"}),)),
        sampling=config.Sampling(max_new_tokens=4),
        grpo=config.GRPO(group_size=2, kl_coef=0.0, entropy_coef=0.01, drop_uninformative=True),
        actor_optimizer=OPTIMIZER,
        log=LOG,
        health=config.Health(patience=1),
    )
    out = online.run("grpo", settings)
    rows = rows_of(out, "policy/loss")
    assert [(row["update/steps"], row["policy/loss"]) for row in rows] == [(0.0, 0.0)] * 2
    absent = ("policy/ratio_mean", "policy/entropy_nats", "not_finite")
    assert [name for name in absent if any(name in row for row in rows)] == []
    assert "eval/kl_per_sequence_nats" not in rows_of(out, "eval/score")[-1]
    samples = metrics.read_rows(out / "samples.jsonl")
    assert samples
    assert {row["kl_nats"] for row in samples} == {None}
    said = capsys.readouterr().err
    assert "alarm score_spread" in said
    assert [row["alarms"][0][:18] for row in rows if "alarms" in row] == ["alarm score_spread"]
    assert "alarm ratio" not in said
    assert "alarm entropy" not in said
    page = (out / "report.html").read_text()
    assert "Before and after" in page
    assert "GRPO, step 1</b>: alarm score_spread, for 1 steps" in page
    assert "was not finite at" not in page


def test_a_metric_that_is_not_finite_is_kept_where_something_was_trained() -> None:
    told = {"policy/ratio_mean": np.float32("nan"), "kl/coef": np.float32(0.1)}
    assert set(online.measured(told | {"update/minibatches": np.float32(1)})) == {*told, "update/minibatches"}
    assert set(online.measured(told | {"update/minibatches": np.float32(0)})) == {"kl/coef", "update/minibatches"}


@pytest.mark.usefixtures("one_device")
def test_lora_trains_an_adapter_and_the_base_is_the_reference(base: Path, tmp_path: Path) -> None:
    settings = ppo_run(
        tmp_path / "lora",
        base / "sft" / "final",
        base / "reward" / "final",
        steps=2,
        model=config.Model(path=str(base / "sft" / "final"), lora=config.Lora(rank=2, alpha=4.0)),
    )
    out = online.run("ppo", settings)
    rows = rows_of(out, "eval/score")
    assert rows[0]["eval/kl_per_sequence_nats"] == pytest.approx(0.0, abs=1e-5)
    assert abs(rows[-1]["eval/kl_per_sequence_nats"]) > 1e-6
    merged = models.load_checkpoint(out / "final", head="lm")
    start = models.load_checkpoint(base / "sft" / "final", head="lm")
    same = jax.tree.map(lambda a, b: bool((a == b).all()), merged.params, start.params)
    assert same["embed"]["embedding"]
    assert not same["layers"]["attention"]["q"]["kernel"]
    for part, final, head in (("model", "final", "lm"), ("critic", "final-critic", "value")):
        again = export.export(out, tmp_path / part, part=part)
        assert same_model(again / "adapter", out / final / "adapter")
        pair = [models.load_checkpoint(place, head=head).params for place in (again, out / final)]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=0), *pair)  # merged on other devices
    exported = lora.load_adapter(out / "final" / "adapter", merged.spec)
    assert (out / "final-critic" / "adapter" / "adapter_model.safetensors").is_file()
    again = config.Lora(rank=2, alpha=8.0, path=str(out / "final" / "adapter"))
    settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, lora=again))
    begun = setups.set_up_online(setups.plan_online("ppo", settings)).actor.params
    jax.tree_util.tree_map_with_path(  # twice the alpha, so half of b: the same function
        lambda at, ours, theirs: np.testing.assert_array_equal(ours, theirs / 2 if at[-1].key == "lora_b" else theirs),
        begun,
        exported.params,
    )
    wrong = dataclasses.replace(settings.model, lora=dataclasses.replace(again, rank=3))
    with pytest.raises(UserError, match=r"rank or targets are not those of model\.lora"):
        setups.set_up_online(setups.plan_online("ppo", dataclasses.replace(settings, model=wrong)))


@pytest.mark.usefixtures("one_device")
def test_reward_model_and_critic_are_adapters_on_the_actor_s_base(base: Path, tmp_path: Path) -> None:
    """One copy of the base in memory, and the same scores and values as those of the merged reward model."""
    start = base / "sft" / "final"
    adapted = config.Model(path=str(start), lora=config.Lora(rank=2, alpha=4.0))
    offline.run("reward", reward_run(tmp_path / "reward", start, model=adapted, steps=2))
    scorer = tmp_path / "reward" / "final" / "adapter"
    setup = setups.set_up_online(setups.plan_online("ppo", ppo_run(tmp_path / "ppo", start, scorer, model=adapted)))
    trees = (setup.actor.base, setup.actor.params, setup.critic.params, lora.load_adapter(scorer, setup.actor.spec).params)
    sizes = [sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in trees]
    leaves = jax.tree.leaves((setup.actor.params, setup.critic.params, setup.frozen))
    held = sum({id(x): x.nbytes for x in leaves}.values())
    sys.stdout.write(f"held {held:,} B: base, adapters of actor, critic, reward model: {', '.join(map(str, sizes))}\n")
    assert held == sum(sizes)
    whole = setups.set_up_online(setups.plan_online("ppo", ppo_run(tmp_path / "whole", start, scorer.parent)))
    prompts, key = setup.place(setup.prompts(0)), jax.random.key(0)
    rollout = setup.do["rollout"](setup.do["sync"](setup.actor.params, setup.actor.base), prompts, key)
    found = [
        (do["reward"](each.frozen.reward, rollout), do["score"](each.actor.params, each.critic.params, each.frozen, rollout))
        for each, do in ((setup, setup.do), (whole, whole.do))
    ]
    (ours, ours_scored), (theirs, theirs_scored) = found
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    np.testing.assert_allclose(ours_scored.values, theirs_scored.values, atol=1e-4, rtol=0)
    assert np.std(np.asarray(ours)) > 1e-3
    with pytest.raises(UserError, match=r"is an adapter of .*; to share the actor's base give model\.lora"):
        setups.set_up_online(setups.plan_online("ppo", ppo_run(tmp_path / "none", start, scorer)))


@pytest.mark.usefixtures("one_device")
def test_the_quickstart_chains_its_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "STEPS", {"sft": 4, "reward": 4, "ppo": 2, "hacked": 2, "addition": 2})
    monkeypatch.setattr(quickstart, "MODEL", TINY)
    monkeypatch.setattr(quickstart, "HELD_OUT", 64)
    text = quickstart.run(out=tmp_path / "q", demo=None, task="reviews", seed=0)
    assert "gold reward" in text
    assert "next    rlhf-jax" in text
    for name in ("report.html", "metrics.jsonl", "samples.jsonl", "final/config.json", "pairs.jsonl"):
        assert (tmp_path / "q" / name).is_file(), name
    stages = {row["stage"] for row in metrics.read_rows(tmp_path / "q" / metrics.METRICS)}
    assert stages == {"sft", "reward", "ppo"}
    for task, seed in (("addition", 0), ("reviews", 8)):
        with pytest.raises(UserError, match=rf"task reviews, seed 0 there; task {task}, seed {seed} here. Give another --out"):
            quickstart.run(out=tmp_path / "q", demo=None, task=task, seed=seed)
    monkeypatch.setattr(quickstart, "write_pairs", lambda *_: pytest.fail("pairs that are there are not sampled again"))
    assert quickstart.run(out=tmp_path / "q", demo=None, task="reviews", seed=0) == text


@pytest.mark.parametrize("task", ["reviews", "addition"])
@pytest.mark.parametrize("count", [1, 3, 5, 6, 8, 64])
def test_the_quickstart_takes_any_number_of_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, task: str
) -> None:
    found: list[Any] = []
    for loop in (offline, online):
        monkeypatch.setattr(loop, "run", lambda stage, settings: found.append(settings) or Path(settings.out))
    monkeypatch.setattr(jax, "device_count", lambda: count)
    for name in ("write_pairs", "collect", "summary"):
        monkeypatch.setattr(quickstart, name, lambda *_: None)
    quickstart.run(out=tmp_path, demo=None, task=task, seed=0)
    for run in found:
        fsdp = count // run.mesh.data
        assert (run.mesh.data * fsdp, run.mesh.fsdp, quickstart.MODEL.width % fsdp) == (count, -1, 0)
        checks.check_batch(run, count)
    if count in (1, 8):
        assert [run.batch_size for run in found] == ([64, 96, 128] if task == "reviews" else [64, 128])
        assert {run.mesh for run in found} == {config.Mesh()}


@pytest.mark.parametrize("name", ["run.json", "final", "metrics.jsonl", "samples.jsonl", "report.html"])
def test_the_quickstart_writes_over_nothing_that_is_not_its_own(tmp_path: Path, name: str) -> None:
    (tmp_path / "sft").mkdir()
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=rf"--out .* holds {name}, not from a quickstart"):
        quickstart.run(out=tmp_path, demo=None, task="reviews", seed=0)
    with pytest.raises(UserError, match="cannot write there"):
        quickstart.run(out=tmp_path / name / "q", demo=None, task="reviews", seed=0)
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(["sft", name])


def test_the_demo_of_over_optimisation_compares_two_runs_that_differ_in_the_kl_penalty_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What README and `--help` say of it: one reward model, one policy, without a penalty and with one."""
    policies: list[config.PPORun] = []

    def trained(stage: str, settings: Any) -> Path:
        out = Path(settings.out)
        (out / "final").mkdir(parents=True)
        if stage == "ppo":
            policies.append(settings)
            row = {"stage": stage, "eval/score": 2.0, "eval/kl_per_sequence_nats": 20.0}
            rows = [row | {"step": step, "eval/gold": gold} for step, gold in ((0, 0.3), (8, 0.8), (9, 9 * settings.ppo.kl_coef))]
            metrics.write_atomic(out / metrics.METRICS, "".join(json.dumps(each) + "\n" for each in rows))
        return out

    monkeypatch.setattr(offline, "run", trained)
    monkeypatch.setattr(online, "run", trained)
    monkeypatch.setattr(quickstart, "write_pairs", lambda *_: None)
    text = quickstart.run(out=tmp_path / "q q", demo="overoptimization", task="reviews", seed=3)
    without, held = policies
    assert (without.ppo.kl_coef, held.ppo.kl_coef) == (0.0, 0.1)
    assert dataclasses.replace(without, out=held.out, ppo=dataclasses.replace(without.ppo, kl_coef=0.1)) == held
    assert [Path(run.out).name for run in policies] == ["ppo-without-kl", "ppo-with-kl"]
    assert re.search(r"ppo-without-kl\ngold reward +0\.30 -> 0\.00 .*; highest 0\.80 at step 8\)", text)
    assert re.search(r"ppo-with-kl\ngold reward +0\.30 -> 0\.90 .*; highest 0\.90 at step 9\)", text)
    assert text.endswith(f"next    rlhf-jax quickstart --task addition --out '{tmp_path / 'q q-addition'}'")
    page = (tmp_path / "q q" / "report.html").read_text(encoding="utf-8")
    assert "without-kl" in page


@pytest.mark.skipif(jax.device_count() < 8, reason="one simulated device: the mesh asks for eight")
def test_a_packed_run_is_the_plain_run(base: Path, tmp_path: Path) -> None:
    """Same scores, losses and evaluations; fewer tokens computed."""
    found: dict[bool, list[dict[str, Any]]] = {}
    for packing in (False, True):
        settings = ppo_run(
            tmp_path / f"packing-{packing}",
            base / "sft" / "final",
            base / "reward" / "final",
            batch_size=64,
            mesh=config.Mesh(fsdp=4, tensor=2),
            data=dataclasses.replace(DATA, packing=packing, max_tokens=64),
            sampling=config.Sampling(max_new_tokens=24),
            ppo=config.PPO(epochs=1, minibatches=2, micro_batches=4, kl_coef=0.02),
        )
        found[packing] = metrics.read_rows(online.run("ppo", settings) / metrics.METRICS)
    for packed, plain in zip(found[True], found[False], strict=True):
        assert set(packed) == set(plain)
        for key in set(plain) - {"data/padded_fraction"}:
            if key.partition("/")[0] in ("reward", "kl", "policy", "value", "update", "eval", "response"):
                assert packed[key] == pytest.approx(plain[key], rel=2e-3, abs=2e-5), key
    for packed, plain in zip(*(rows_of(tmp_path / f"packing-{each}", "reward/score") for each in (True, False)), strict=True):
        assert packed["data/padded_fraction"] < 0.75 * plain["data/padded_fraction"]
