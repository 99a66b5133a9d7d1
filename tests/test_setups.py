"""What stands beside the trained model: refused where it cannot stand there, begun where a run means it to begin."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import directories
import jax
import numpy as np
import pytest

from rlhf_jax import build, checks, config, models, offline, online, parallel, setups
from rlhf_jax.data.tokenizer import load_tokenizer, train_bpe
from rlhf_jax.errors import UserError
from rlhf_jax.metrics import METRICS, read_rows
from rlhf_jax.models import lora

pytestmark = pytest.mark.usefixtures("one_device")
STILL = config.Optimizer(learning_rate=1e-9, schedule="constant")
DATA = config.Data(task="reviews", max_prompt_tokens=16, max_tokens=48, limit=64)
ADAPTER = config.Lora(rank=2, alpha=4.0)


def ppo_run(out: Path, **changes) -> config.PPORun:
    run = config.PPORun(
        out=str(out),
        steps=1,
        batch_size=4,
        model=config.Model(path=str(directories.language_model())),
        data=DATA,
        reward=config.Reward(model=str(directories.reward_model())),
        sampling=config.Sampling(max_new_tokens=4),
        actor_optimizer=STILL,
    )
    return dataclasses.replace(run, **changes)


def changed(source: Path, out: Path, **keys) -> str:
    """A copy of a model directory whose config.json says something else."""
    shutil.copytree(source, out)
    content = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(content | keys))
    return str(out)


def foreign_reward_model(out: Path) -> str:
    """A reward model of the same size whose tokenizer was trained on other texts."""
    shutil.copytree(directories.reward_model(), out)
    train_bpe(["zygote quux vexed ; wizard kludge"] * 4, directories.VOCABULARY, out)
    return str(out)


def test_a_language_model_is_no_reward_model(tmp_path):
    run = ppo_run(tmp_path, reward=config.Reward(model=str(directories.language_model(2))))
    with pytest.raises(UserError, match=r"reward.model=.*: is a language model, which gives no scores"):
        setups.plan_online("ppo", run)


def test_runs_made_in_python_are_checked_as_files_are(tmp_path):
    both = "sampling.min_new_tokens is 5; it must be at most max_new_tokens = 4\nppo.ptx_coef is 1, so ptx_data is needed"
    sampling = config.Sampling(max_new_tokens=4, min_new_tokens=5)
    with pytest.raises(UserError, match=both):
        setups.plan_online("ppo", ppo_run(tmp_path, sampling=sampling, ppo=config.PPO(ptx_coef=1.0)))
    with pytest.raises(UserError, match="sampling.stop: 'zebra' is tokens"):
        setups.plan_online("ppo", ppo_run(tmp_path, sampling=config.Sampling(max_new_tokens=4, stop=("zebra",))))
    with pytest.raises(UserError, match="no reward is given"):
        setups.plan_online("ppo", ppo_run(tmp_path, reward=config.Reward(), data=config.Data(path="rows.jsonl")))
    data = dataclasses.replace(DATA, length_buckets=2)
    with pytest.raises(UserError, match="data.length_buckets is 2; widths are of prompts that are answered"):
        setups.plan_offline("sft", config.SFTRun(batch_size=4, data=data, model=ppo_run(tmp_path).model))


def test_data_of_a_mixture_without_weight_is_told(tmp_path):
    told = "ptx_data: not read, ppo.ptx_coef is 0"
    assert told in setups.plan_online("ppo", ppo_run(tmp_path, ptx_data=config.Data(path="nowhere.jsonl"))).notes
    assert told not in setups.plan_online("ppo", ppo_run(tmp_path, ptx_data=DATA, ppo=config.PPO(ptx_coef=0.1))).notes


def test_tokens_must_mean_the_same_to_all_models(tmp_path):
    path = foreign_reward_model(tmp_path / "foreign")
    message = r"has another tokenizer than the model: \d+ of \d+ tokens differ, the first is \d+, .* for the model and .* here"
    with pytest.raises(UserError, match=f"reward.model=.*{message}.*reward.url"):
        setups.plan_online("ppo", ppo_run(tmp_path, reward=config.Reward(model=path)))
    with pytest.raises(UserError, match=f"critic=.*{message}"):
        setups.plan_online("ppo", ppo_run(tmp_path, critic=path))
    run = config.DPORun(out=str(tmp_path), steps=1, batch_size=4, data=DATA, reference=path)
    with pytest.raises(UserError, match=f"reference=.*{message}"):
        setups.plan_offline("dpo", dataclasses.replace(run, model=ppo_run(tmp_path).model))


def test_a_reference_has_the_architecture_of_the_model(tmp_path):
    other = changed(directories.language_model(), tmp_path / "other", rms_norm_eps=0.1)
    with pytest.raises(UserError, match=r"reference=.*: its architecture is not the model's \(norm_eps differ\)"):
        setups.plan_online("ppo", ppo_run(tmp_path, reference=other))
    same = changed(directories.language_model(), tmp_path / "same", max_position_embeddings=99)
    setups.plan_online("ppo", ppo_run(tmp_path, reference=same))


def test_a_critic_from_a_language_model_begins_at_zero(tmp_path):
    setup = setups.set_up_online(setups.plan_online("ppo", ppo_run(tmp_path, critic=str(directories.language_model(2)))))
    assert setup.critic is not None
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(setup.critic.params["score"]))


def test_a_reward_model_keeps_the_tokens_that_end_an_answer(tmp_path):
    """Those of generation_config.json too: by them `serve` and `evaluate` know where the answer ends."""
    tokenizer = dataclasses.replace(load_tokenizer(directories.language_model()), eos_ids=(2, 7))
    found = models.load_checkpoint(directories.reward_model(), head="score")
    out = models.save_checkpoint(tmp_path / "rm", found.spec, found.params, head="score", tokenizer=tokenizer)
    assert load_tokenizer(out).eos_ids == (2, 7)


def test_a_model_by_hub_name_is_exported_as_its_directory_is(tmp_path, monkeypatch):
    """With the source's generation config; PEFT's base is the name, which others can fetch."""
    directory = directories.on_hub(tmp_path, directories.language_model())
    generation = json.loads((directory / "generation_config.json").read_text())
    (directory / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [2, 7], "top_k": 7}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", tmp_path)
    run = config.SFTRun(model=config.Model(path="org/tiny", lora=ADAPTER), data=DATA)
    tokenizer, mesh = build.tokenizer_for("sft", run), parallel.make_mesh(run.mesh)
    loaded = build.load(run.model, mesh, head="lm", key=jax.random.key(0), real_vocab=None, path=run.model.path)
    build.export(tmp_path / "out", loaded, loaded.params, head="lm", tokenizer=tokenizer)
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (found["eos_token_id"], found["top_k"]) == ([2, 7], 7)
    assert json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "org/tiny"


@pytest.fixture
def adapter(tmp_path) -> str:
    """An adapter on the language model that changes what it says."""
    base = directories.language_model()
    spec = models.read_spec(base)
    params = lora.init(spec, ADAPTER, jax.random.key(1))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    lora.save_adapter(tmp_path / "adapter", spec, params, ADAPTER, base=str(base), head="lm", calibration=None)
    return str(tmp_path / "adapter")


def test_training_that_goes_on_with_an_adapter_is_held_against_that_adapter(tmp_path, adapter):
    """At the first step policy and reference are one: DPO's loss is ln 2, the KL of GRPO 0."""
    model = config.Model(path=str(directories.language_model()), lora=dataclasses.replace(ADAPTER, path=adapter))
    run = config.DPORun(out=str(tmp_path / "dpo"), steps=1, batch_size=4, data=DATA, model=model, optimizer=STILL)
    rows = read_rows(offline.run("dpo", run) / METRICS)
    losses = [row["dpo/loss"] for row in rows if "dpo/loss" in row]
    assert losses == [pytest.approx(math.log(2), abs=1e-5)]
    plain = ppo_run(tmp_path / "grpo", model=model)
    shared = {field.name: getattr(plain, field.name) for field in dataclasses.fields(config.OnlineRun)}
    rows = read_rows(online.run("grpo", config.GRPORun(**shared, grpo=config.GRPO(group_size=2))) / METRICS)
    assert [row["kl/per_sequence_nats"] for row in rows if "kl/per_sequence_nats" in row] == [pytest.approx(0.0, abs=1e-4)]


def test_a_run_fixes_ropes_that_depend_on_the_length(tmp_path):
    """Phi-3's longrope, beyond its original length: sampled and scored log-probabilities are the same."""
    stretched = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 4.0, 8.0]}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    lengths = {"max_position_embeddings": 128, "original_max_position_embeddings": 12}
    spec = models.spec_of(
        {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "vocab_size": directories.VOCABULARY}
        | {**sizes, **lengths, "num_key_value_heads": 4, "rope_theta": 1e4, "rms_norm_eps": 1e-5, "hidden_act": "silu"}
        | {"tie_word_embeddings": False, "rope_scaling": stretched, "sliding_window": None}
    )
    params = models.make_model(spec).init(jax.random.key(0))
    params["embed"]["embedding"] *= 20
    tokenizer = load_tokenizer(directories.language_model())
    path = str(models.save_checkpoint(tmp_path / "phi", spec, params, tokenizer=tokenizer))
    plain = ppo_run(tmp_path / "grpo", model=config.Model(path=path), sampling=config.Sampling(max_new_tokens=16))
    assert build.longest(plain) == 32
    shared = {field.name: getattr(plain, field.name) for field in dataclasses.fields(config.OnlineRun)}
    shared["reward"] = config.Reward(functions=(config.RewardFunction(function="length", options={"maximum": 3}),))
    rows = read_rows(online.run("grpo", config.GRPORun(**shared, grpo=config.GRPO(group_size=2))) / METRICS)
    assert [row["rollout/logprob_gap_max_nats"] for row in rows if "reward/score" in row] == [pytest.approx(0.0, abs=1e-4)]


def test_a_reward_function_is_part_of_what_a_run_is(tmp_path):
    """A continued run whose reward file was edited says so: `rundir` compares these hashes."""
    file = tmp_path / "mine.py"
    prints = []
    for sign in ("", "-"):
        file.write_text(f"def score(responses, **_):\n    return [{sign}len(text) for text in responses]\n")
        functions = (config.RewardFunction(function=f"{file}:score"), config.RewardFunction(function="length"))
        prints.append(setups.plan_online("ppo", ppo_run(tmp_path, reward=config.Reward(functions=functions))).fingerprints)
    assert {name for name in prints[0] if prints[0][name] != prints[1][name]} == {"reward.functions"}


def test_the_file_of_the_pretraining_loss_is_part_of_what_a_run_is(tmp_path):
    file = tmp_path / "texts.jsonl"
    prints = []
    for word in ("good", "bad"):
        file.write_text(f'{{"text": "a {word} one"}}\n' * 8)
        run = ppo_run(tmp_path, ptx_data=config.Data(path=str(file)), ppo=config.PPO(ptx_coef=0.1))
        prints.append(setups.plan_online("ppo", run).fingerprints)
    assert {name for name in prints[0] if prints[0][name] != prints[1][name]} == {"ptx_data"}


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("math_answer", {"column": "nope"}, "column 'nope'"),
        ("regex", {"pattern": "(a"}, "pattern"),
        ("exact", {"column": "nope"}, "column 'nope'"),
    ],
)
def test_rewards_of_this_package_are_tried_before_anything_is_loaded(tmp_path, function, options, message):
    rewards = config.Reward(functions=(config.RewardFunction(function=function, options=options),))
    with pytest.raises(UserError, match=message) as caught:
        setups.plan_online("ppo", ppo_run(tmp_path, reward=rewards))
    assert len(str(caught.value).splitlines()) == 1


def test_keys_that_a_stage_does_not_read_are_refused():
    data = config.Data(path="pairs.jsonl", packing=True, length_buckets=2)
    found = {
        stage: [problem.key for problem in checks.find_problems(config.STAGES[stage](data=data))] for stage in config.OFFLINE
    }
    assert all("data.length_buckets" in keys for keys in found.values())
    assert {stage for stage, keys in found.items() if "data.packing" in keys} == {"reward", "dpo", "kto"}


@pytest.mark.parametrize(
    ("stage", "loss", "told"),
    [("reward", "bradley_terry", ""), ("reward", "deepspeed_chat", "deepspeed_chat"), ("dpo", "", "dpo")],
)
def test_margins_that_a_loss_leaves_out_are_told(tmp_path, stage, loss, told):
    rows = [{"prompt": f"how is hotel {n}?", "chosen": "good", "rejected": "bad", "margin": n} for n in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = config.Data(path=str(tmp_path / "pairs.jsonl"), max_tokens=48, eval_fraction=0.0)
    run = config.STAGES[stage](out=str(tmp_path), steps=1, batch_size=4, data=data, model=ppo_run(tmp_path).model)
    run = dataclasses.replace(run, reward_model=config.RewardModelLoss(loss=loss)) if loss else run
    notes = setups.plan_offline(stage, run).notes
    assert any("8 with a margin" in note for note in notes)
    assert [note for note in notes if "no margins" in note] == (
        [f"data: {told} takes no margins: they are left out"] if told else []
    )


@pytest.mark.parametrize("adapted", [False, True])
def test_no_second_copy_of_the_weights_stays(tmp_path, adapted):
    """What was loaded is in the state, or gone where an earlier state goes on: `fit` counts one copy."""
    lora_group = ADAPTER if adapted else None
    run = ppo_run(tmp_path, model=config.Model(path=str(directories.language_model()), lora=lora_group))
    run = dataclasses.replace(run, ppo=config.PPO(ema_decay=0.9))
    offline_run = config.SFTRun(out=str(tmp_path), steps=1, batch_size=4, data=DATA, model=run.model, optimizer=STILL)
    plans = (setups.plan_online("ppo", run), setups.plan_offline("sft", offline_run))
    for plan, set_up in zip(plans, (setups.set_up_online, setups.set_up_offline), strict=True):
        state = None
        for _ in range(2):  # from the start, then going on from that state
            setup = set_up(plan)
            state = setup.begin(state)
            held = (setup.actor, setup.critic) if isinstance(setup, setups.OnlineSetup) else (setup.trained,)
            assert all(leaf.is_deleted() for each in held for leaf in jax.tree.leaves(each.params))
            frozen = jax.tree.leaves((setup.frozen, state))
            assert not any(leaf.is_deleted() for leaf in frozen)
