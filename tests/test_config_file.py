"""Run files: what is read, what is refused, and that each message names position, key, value, rule and remedy."""

import dataclasses
import typing
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from rlhf_jax import checks, config, config_file, config_table, strict_yaml
from rlhf_jax.config_file import fields, without_none
from rlhf_jax.errors import UserError

ROOT = Path(__file__).parent.parent
GOOD = """\
model:
  path: some/model
data: {path: prompts.jsonl}
reward: {model: some/reward}
"""


def load(text, *overrides, cls=config.PPORun):
    return config_file.loads(text, overrides, cls, name="run.yaml")


def refusal(text, *overrides, cls: type = config.PPORun):
    with pytest.raises(UserError) as caught:
        load(text, *overrides, cls=cls)
    return str(caught.value)


# What is read


def test_defaults_values_and_overrides():
    run = load(GOOD + "ppo: {kl_coef: 0.2}\n", "ppo.kl_coef=0.3", "seed=7", "reward.functions=[{function: length}]")
    assert run.model == config.Model(path="some/model")
    assert (run.ppo.kl_coef, run.seed, run.ppo.epochs) == (0.3, 7, config.PPO().epochs)
    assert run.reward.functions == (config.RewardFunction(function="length"),)


@pytest.mark.parametrize(
    ("text", "value"), [("1e-5", 1e-5), ("1E+2", 100.0), (".5", 0.5), ("3", 3.0), ("1.", 1.0), ("+0.25", 0.25), ("2.5e3", 2500.0)]
)
def test_floats_as_people_write_them(text, value):
    read = load(GOOD, f"actor_optimizer.weight_decay={text}").actor_optimizer.weight_decay
    assert isinstance(read, float)
    assert read == value


@pytest.mark.parametrize("text", ["no", "12:30", "off", "a b", "1_000 runs", "é:è", "'010'", '"1e-5"', "10-11-12"])
def test_plain_words_stay_text(text):
    assert load(GOOD, f"out={text}").out == text.strip("'\"")


def test_options_keep_the_types_of_yaml_1_2():
    text = "reward.functions=[{function: f, options: {a: 1e-5, b: no, c: true, d: null, e: [1, x], f: '3', g: 12:30, h: {i: 2}}}]"
    options = load(GOOD, text).reward.functions[0].options
    assert options == {"a": 1e-5, "b": "no", "c": True, "d": None, "e": [1, "x"], "f": "3", "g": "12:30", "h": {"i": 2}}


@pytest.mark.parametrize("group", ["ppo:\n  adaptive_kl: {}\n", "ppo: {adaptive_kl: {horizon: 10000}}\n"])
def test_group_that_is_off_by_default_is_switched_on_by_its_keys(group):
    assert load(GOOD).ppo.adaptive_kl is None
    assert load(GOOD + group).ppo.adaptive_kl == config.AdaptiveKL()
    assert load(GOOD, "ppo.adaptive_kl.target=3").ppo.adaptive_kl == config.AdaptiveKL(target=3.0)
    assert load(GOOD + group, "ppo.adaptive_kl=null").ppo.adaptive_kl is None


def test_bom_crlf_comments_and_aliases_are_accepted(tmp_path):
    path = tmp_path / "run.yaml"
    text = "# comment\n" + GOOD + "actor_optimizer: &fast {learning_rate: 1e-3}\ncritic_optimizer: *fast\n"
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    run = config_file.load(path, [], config.PPORun)
    assert run.actor_optimizer == run.critic_optimizer == config.Optimizer(learning_rate=1e-3)


# What is refused: row 27 of the fault matrix


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        ("ppo:\n  kl_coeff: 0.1\n", "seed=1", "run.yaml:6: unknown key 'ppo.kl_coeff'; did you mean 'ppo.kl_coef'?"),
        ("", "critic_optimizer.learning_rat=1", "; did you mean 'critic_optimizer.learning_rate'?"),
        ("stepz: 3\n", "seed=1", "run.yaml:5: unknown key 'stepz'; did you mean 'steps'?"),
        ("kl_coef: 3\n", "seed=1", "run.yaml:5: unknown key 'kl_coef'; did you mean 'ppo.kl_coef'?"),
        ("", "ppo.kl_coeff=1", "override 'ppo.kl_coeff=1': unknown key 'ppo.kl_coeff'; did you mean 'ppo.kl_coef'?"),
        ("", "model.scratch.widht=64", "unknown key 'model.scratch.widht'; did you mean 'model.scratch.width'?"),
        (
            "learning_rate: 1\n",
            "seed=1",
            "unknown key 'learning_rate'; did you mean 'actor_optimizer.learning_rate' or 'critic_optimizer.learning_rate'?",
        ),
        ("mesh: {zebra: 1}\n", "seed=1", "run.yaml:5: unknown key 'mesh.zebra'; mesh knows data, fsdp, tensor"),
        ("ppo:\n  <<: {gamma: 1}\n", "seed=1", "unknown key 'ppo.<<': merge keys are not read"),
    ],
)
def test_unknown_key_names_the_nearest(text, override, message):
    assert message in refusal(GOOD + text, override)


def test_stage_has_its_own_keys():
    told = refusal("ppo: {gamma: 1}\n", cls=config.SFTRun)
    assert "unknown key 'ppo': a key of ppo; start the file with rlhf-jax ppo, or take the key out" in told


# Row 28: traps of YAML, and types


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "run.yaml:6: the key 'seed' stands here a second time (first: run.yaml:5)"),
        ("ppo:\n\tgamma: 1\n", "run.yaml:6: a tab; YAML is indented with spaces"),
        ("ppo:\n  lam: 1\n\tgamma: 1\n", "run.yaml:7: a tab; YAML is indented with spaces"),
        ("steps: 1_0\n", "run.yaml:5: steps is 1_0; it must be a whole number; write 10"),
        ("steps: 010\n", "run.yaml:5: steps is 010; it must be a whole number; write 10"),
        ("steps: 1e3\n", "run.yaml:5: steps is 1e3; it must be a whole number; write 1000"),
        ("steps: 12:30\n", "run.yaml:5: steps is 12:30; it must be a whole number"),
        ("steps: '10'\n", 'run.yaml:5: steps is "10"; it must be a whole number; write 10'),
        ("steps: yes\n", "run.yaml:5: steps is yes; it must be a whole number"),
        ("steps: 99999999999999999999\n", "steps is 99999999999999999999; it must be a whole number of at most 18 digits"),
        ("steps: 1e30\n", "it must be a whole number of at most 18 digits"),
        ("steps:\n", "run.yaml:5: steps has no value; it must be a whole number"),
        ("steps: [1]\n", "run.yaml:5: steps is a list; it must be a whole number"),
        ("ppo: {clip_low: no}\n", "run.yaml:5: ppo.clip_low is no; it must be a number"),
        ("ppo: {gamma: .nan}\n", "ppo.gamma is .nan; it must be a number"),
        ("ppo: {gamma: 1e999}\n", "ppo.gamma is 1e999; it must be a number"),
        ("ppo: {bootstrap_truncated: no}\n", "ppo.bootstrap_truncated is no; it must be true or false; write false"),
        ("ppo: {bootstrap_truncated: 1}\n", "ppo.bootstrap_truncated is 1; it must be true or false; write true"),
        ("ppo: {kl_estimator: k4}\n", "ppo.kl_estimator is k4; it must be one of k1, k2, k3, exact; did you mean k"),
        (
            "ppo: 3\n",
            "run.yaml:5: ppo is a single value; it must be a group of keys (epochs, minibatches, micro_batches, gamma, ...)",
        ),
        ("out: 12\n", 'run.yaml:5: out is 12; it must be text; write "12"'),
        ("out: true\n", 'out is true; it must be text; write "true"'),
        ("reference: 0x10\n", 'reference is 0x10; it must be text or null; write "0x10"'),
        ("log: {backends: wandb}\n", "log.backends is a single value; it must be a list, such as [a, b]"),
        ("log: {backends: [wandb, wbd]}\n", "log.backends.1 is wbd; it must be one of tensorboard, wandb, trackio, mlflow"),
        ("log:\n  backends:\n  - wandb\n  - 3\n", "run.yaml:8: log.backends.1 is 3; it must be one of"),
        ("ptx_data: {sources: [{weight: 2}]}\n", "run.yaml:5: ptx_data.sources.0.path is missing; it has no default"),
        ("ptx_data: {columns: [a]}\n", "ptx_data.columns is a list; it must be a mapping, such as {a: b}"),
        ("ptx_data: {columns: {a: 3}}\n", 'ptx_data.columns.a is 3; it must be text; write "3"'),
        ("ppo: {gamma: 1\n", "run.yaml:6: "),
        ("just words\n", "run.yaml:6: a line without 'key: value'"),
        ("? [a]\n: b\n", "run.yaml:5: a key is a word, not a list or a mapping"),
        (
            "out: !!python/object/apply:os.system [ls]\n",
            "run.yaml:5: the tag tag:yaml.org,2002:python/object/apply:os.system is not",
        ),
        ("out: *nowhere\n", "run.yaml:5: found undefined alias"),
        ("out: 'a\x00b'\n", "run.yaml:5: the character '\\x00' is not allowed"),
        ("--- \nseed: 1\n", "run.yaml:5: "),
    ],
)
def test_wrong_values_are_refused_with_their_line(text, message):
    assert message in refusal(GOOD + text)


def test_all_problems_come_at_once_and_at_most_fifteen_lines():
    message = refusal(GOOD + "ppo: {gamma: x, lam: y}\nstepz: 1\n", "seed=a")
    assert [line.split(" is ")[0] for line in message.splitlines()] == [
        "run.yaml:5: ppo.gamma",
        "run.yaml:5: ppo.lam",
        "run.yaml:6: unknown key 'stepz'; did you mean 'steps'?",
        "override 'seed=a': seed",
    ]
    many = refusal(GOOD + "".join(f"zz{i}: 1\n" for i in range(40)))
    assert len(many.splitlines()) == config_file.MAX_SHOWN + 1 <= 15
    assert many.endswith("... and 30 more")


def test_long_values_are_cut():
    assert max(map(len, refusal(GOOD + f"steps: {'x' * 5000}\n{'k' * 5000}: 1\n").splitlines())) < 400


@pytest.mark.parametrize("override", ["seed", "=1", "a b=1", ".seed=1", "seed.=1"])
def test_override_without_key_and_value(override):
    assert refusal(GOOD, override) == f"override {override!r}: write key=value, such as ppo.kl_coef=0.1"


def test_a_comment_in_an_override_is_refused_and_a_quoted_or_joined_number_sign_is_text():
    told = "override 'out=exp #3': '#3' would be a comment and be lost; quote the value, such as 'out=\"a #b\"'"
    assert refusal(GOOD, "out=exp #3") == told
    for text in ("# 3", "'a' # b", "[a, b] #c", "{a: b} #", "a: b #c"):
        assert "would be a comment" in refusal(GOOD, f"log.backends={text}")
    assert [load(GOOD, f"out={text}").out for text in ("'exp #3'", '"exp #3"', "exp#3")] == ["exp #3", "exp #3", "exp#3"]
    assert load(GOOD, "data.columns={a: 'b # c', d: 'it''s #1'}").data.columns == {"a": "b # c", "d": "it's #1"}


def test_override_inside_a_value():
    assert "override 'steps.x=3': steps.x lies inside run.yaml:5, which is no group" in refusal(GOOD + "steps: 4\n", "steps.x=3")
    assert "override 'seed=[1': " in refusal(GOOD, "seed=[1")


def test_unreadable_files(tmp_path):
    def message(path):
        with pytest.raises(UserError) as caught:
            config_file.load(path, [], config.PPORun)
        return str(caught.value)

    path = tmp_path / "run.yaml"
    assert message(path) == f"{path}: there is no such file"
    assert "cannot be read: Is a directory" in message(tmp_path)
    path.write_bytes(b"seed: 1\nout: caf\xe9\n")
    assert message(path) == f"{path}:2: byte 0xe9 is not UTF-8; save the file as UTF-8"
    path.write_bytes(b"#" * (strict_yaml.MAX_BYTES + 1))
    assert "at most 1,000,000 bytes" in message(path)
    path.write_bytes(b"")
    assert "exactly one of model.path, model.scratch is needed" in message(path)


BOMB = "".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9) if i else 'x'}]\n" for i in range(12))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "too large once aliases are followed"),
        ("out: &a [*a]\n", "too large once aliases are followed"),
        ("out: " + "[" * 3000, "nested more than 20 deep"),
        ("out:\n" + "".join(" " * i + f"k{i}:\n" for i in range(1, 60)), "nested more than 20 deep"),
    ],
    ids=["bomb", "recursive", "brackets", "blocks"],
)
def test_size_depth_and_aliases_are_bounded(text, message):
    assert message in refusal(text)


# Row 29 and other rules between keys


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["batch_size=60", "ppo.minibatches=7"],
            "batch_size is 60; it must be a multiple of 7 minibatches = 7 (60 / 7 = 8.571); nearest: 56 or 63",
        ),
        (
            ["batch_size=12", "ppo.minibatches=2", "ppo.micro_batches=2", "mesh.data=2", "mesh.fsdp=4"],
            "2 minibatches x 2 micro-batches x 8 devices (mesh.data x mesh.fsdp) = 32 (12 / 32 = 0.375); nearest: 32",
        ),
        (["batch_size=900000000000000000"], "batch_size is 900000000000000000; it must be at least 1 and at most 2147483647"),
        (["batch_size=1000000007", "score_parts=2"], "score_parts is 2; it must divide batch_size; these do: 1, 1000000007"),
        (["reference=''"], 'override "reference=\'\'": reference is "", which is no name; write one, or leave the key out'),
        (["model.tokenizer=''"], 'model.tokenizer is "", which is no name'),
        (['out="a\\0b"'], 'out is "a\\u0000b", which is no name'),
        (['reward.functions=[{function: "a\\ud800"}]'], 'reward.functions.0.function is "a\\ud800", which is no name'),
        (["reward.timeout_s=1e30"], "reward.timeout_s is 1e+30; it must be above 0 and at most 1000000"),
        (["model.lora.targets=[]"], "model.lora.targets is empty; name at least one matrix, such as [q, v]"),
        (["batch_size=0"], "override 'batch_size=0': batch_size is 0; it must be at least 1"),
        (["ppo.gamma=1.5"], "override 'ppo.gamma=1.5': ppo.gamma is 1.5; it must be at least 0 and at most 1"),
        (["sampling.top_p=0"], "sampling.top_p is 0; it must be above 0 and at most 1"),
        (["sampling.temperature=0"], "sampling.temperature is 0; ppo needs samples, so it must be at least 0.0001"),
        (["sampling.temperature=1e-10"], "sampling.temperature is 1e-10; ppo needs samples, so it must be at least 0.0001"),
        (["sampling.rows=128"], "sampling.rows is 128; it must be at most batch_size = 64; nearest: 64"),
        (
            ["sampling.rows=4", "mesh.data=2", "mesh.fsdp=4"],
            "at most batch_size = 64 and a multiple of 8 devices (mesh.data x mesh.fsdp) = 8; nearest: 8",
        ),
        (["sampling.min_new_tokens=65"], "sampling.min_new_tokens is 65; it must be at most max_new_tokens = 64"),
        (["sampling.repetition_penalty=1.1"], "in training it must be 1"),
        (["ppo.dual_clip=1"], "ppo.dual_clip is 1; it must be above 1"),
        (["ppo.kl_coef=0", "ppo.adaptive_kl.target=1"], "ppo.kl_coef is 0 and ppo.adaptive_kl multiplies it"),
        (["ppo.adaptive_kl.target=0"], "ppo.adaptive_kl.target is 0; it must be above 0"),
        (["ppo.critic_warmup=101"], "ppo.critic_warmup is 101; it must be at most steps = 100"),
        (["ppo.ptx_coef=1"], "ppo.ptx_coef is 1, so ptx_data is needed; write ptx_data.path=FILE"),
        (
            ["model.scratch.width=64"],
            "exactly one of model.path, model.scratch is needed; model.path and model.scratch are given",
        ),
        (["model.path=null"], "exactly one of model.path, model.scratch is needed; none is given"),
        (["data.task=reviews"], "exactly one of data.path, data.sources, data.task is needed; data.path and data.task are given"),
        (["data.path=null", "data.sources=[{path: a, weight: 0}]"], "data.sources.0.weight is 0; it must be above 0"),
        (["reward.model=null"], "no reward is given; write reward.model=DIRECTORY, reward.functions or reward.url"),
        (["reward.url=ftp://a"], "it must start with http:// or https://"),
        (["reward.url=https://me:secret@host/score"], "reward.url holds a password"),
        (["mesh.fsdp=0"], "mesh.fsdp is 0; it must be at least 1, or -1"),
        (["mesh.data=-1"], "mesh has 2 sizes of -1"),
        (["score_parts=3"], "score_parts is 3; it must divide batch_size; these do: 1, 2, 4, 8, 16, 32, 64"),
    ],
)
def test_rules_between_keys(overrides, message):
    text = refusal(GOOD, *overrides)
    assert message in text
    assert "secret" not in text.partition(": ")[2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["width=250"],
            "model.scratch.width / heads = 250 / 4 = 62.5; a head must have an even whole width; nearest: 248 or 256",
        ),
        (["kv_heads=3"], "model.scratch.kv_heads is 3; it must divide heads = 4; these do: 1, 2, 4"),
        (
            ["max_length=300"],
            "data.max_prompt_tokens + sampling.max_new_tokens = 256 + 64 = 320, but the model is made for 300 tokens",
        ),
    ],
)
def test_rules_of_a_model_from_scratch(overrides, message):
    text = GOOD.replace("path: some/model", "scratch: {width: 256}")
    assert message in refusal(text, *(f"model.scratch.{override}" for override in overrides))
    assert "mesh.tensor is 3; it must divide the model's 4 heads; these do: 1, 2, 4" in refusal(text, "mesh.tensor=3")


def test_length_and_heads_of_a_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 300, "num_attention_heads": 4}')
    message = refusal(GOOD, f"model.path={tmp_path}", "mesh.tensor=8")
    assert "mesh.tensor is 8; it must divide the model's 4 heads" in message
    assert "= 320, but the model is made for 300 tokens; make them 20 shorter" in message
    text = "model: {path: x}\ndata: {path: a}\n"
    assert "data.max_tokens = 512, but" in refusal(text, f"model.path={tmp_path}", cls=config.SFTRun)
    (tmp_path / "config.json").write_text("{")
    assert "config.json: not JSON" in refusal(GOOD, f"model.path={tmp_path}")
    (tmp_path / "config.json").write_text("[1]")
    assert "config.json: must be a JSON object, is list" in refusal(GOOD, f"model.path={tmp_path}")


def test_batch_over_the_devices_of_the_real_mesh():
    run = load(GOOD, "batch_size=12", "ppo.minibatches=3")
    checks.check_batch(run, 4)
    with pytest.raises(UserError, match=r"3 minibatches x 8 devices .* = 24 \(12 / 24 = 0.5\); nearest: 24"):
        checks.check_batch(run, 8)


def test_rules_apply_inside_fine_tuning_and_reward_runs():
    text = "model: {path: x}\ndata: {path: a}\n"
    assert "multiple of 3 micro-batches" in refusal(text, "micro_batches=3", cls=config.SFTRun)
    assert "label_smoothing is 0.5; it must be at least 0 and below 0.5" in refusal(
        text, "reward_model.label_smoothing=0.5", cls=config.RewardRun
    )


GROUPS = [cls for cls in vars(config).values() if isinstance(cls, type) and dataclasses.is_dataclass(cls)]
FREE = {"model_weight", "url_weight", "weight"} | {field.name for field in dataclasses.fields(config.Mesh)}  # any sign; own rule


def test_every_number_has_a_range():
    numbers = {(cls, field.name) for cls in GROUPS for field, kind in fields(cls) if without_none(kind) in (int, float)}
    assert {f"{cls.__name__}.{name}" for cls, name in numbers if name not in FREE and checks.range_of(cls, name) is None} == set()
    known = {name for cls, name in numbers} | {f"{cls.__name__}.{name}" for cls, name in numbers}
    assert checks.RANGES.keys() <= known


def test_defaults_are_in_range():
    assert {
        cls.__name__: list(checks._ranges(cls(), "")) for cls in config.STAGES.values() if list(checks._ranges(cls(), ""))
    } == {}


@pytest.mark.parametrize(
    ("stage", "overrides", "message"),
    [
        ("grpo", ["grpo.group_size=5"], "grpo.group_size is 5; it must divide batch_size = 64; nearest: 4 or 8"),
        ("grpo", ["grpo.group_size=1"], "grpo.group_size is 1; it must be at least 2"),
        *((name, [f"{name}.group_size=0"], f"{name}.group_size is 0; it must be at") for name in ("grpo", "gspo", "rloo")),
        ("grpo", ["sampling.rows=20"], "a multiple of grpo.group_size 8 = 8; nearest: 16 or 24"),
        (
            "grpo",
            ["sampling.rows=16", "batch_size=24", "mesh.fsdp=2"],
            "batch_size is 24; with sampling.rows it must be a multiple of grpo.group_size 8 x 2 devices",
        ),
        ("grpo", ["grpo.minibatches=5"], "batch_size is 64; it must be a multiple of 5 minibatches"),
        ("grpo", ["grpo.overlong_buffer=65"], "grpo.overlong_buffer is 65; it must be at most max_new_tokens = 64"),
        (
            "reinforce_pp",
            ["reinforce_pp.baseline=group"],
            "reinforce_pp.group_size is 1; reinforce_pp.baseline: group needs at least 2",
        ),
        ("dpo", ["dpo.beta=0", "reward=null"], "unknown key 'reward'"),
        ("dpo", ["dpo.beta=0"], "dpo.beta is 0; it must be above 0"),
        ("dpo", ["data.task_options={digits: 2}"], "data.task_options belong to an embedded task and data.task is not given"),
        ("kto", ["batch_size=1"], "batch_size is 1; kto pairs every prompt with another row's answer"),
    ],
)
def test_rules_of_the_other_algorithms(stage, overrides, message):
    text = GOOD if stage not in ("dpo", "kto") else GOOD.partition("reward")[0]
    assert message in refusal(text, *overrides, cls=config.STAGES[stage])


# Descriptions, and back to YAML

WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["no", "1e-5", "010", "null", "~", "a: b", "#", "é\u2028"]
)


def values(kind: typing.Any) -> typing.Any:
    inner, args = without_none(kind), typing.get_args(without_none(kind))
    if inner is not kind:
        return st.none() | values(inner)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return st.builds(kind, **{field.name: values(inner) for field, inner in fields(kind)})
    if typing.get_origin(kind) is tuple:
        return st.lists(values(args[0]), max_size=2).map(tuple)
    if typing.get_origin(kind) is dict:
        return st.dictionaries(WORDS, values(args[1]), max_size=2)
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from(args)
    numbers = {bool: st.booleans(), int: st.integers(-(10**17), 10**17), float: st.floats(allow_nan=False, allow_infinity=False)}
    if kind is typing.Any:
        scalars = st.none() | st.booleans() | numbers[int] | numbers[float] | WORDS
        return scalars | st.lists(scalars, max_size=2) | st.dictionaries(WORDS, scalars, max_size=2)
    return numbers.get(kind, WORDS)


@settings(max_examples=40, deadline=None, derandomize=True, database=None, phases=[Phase.generate])  # shrinking takes minutes
@given(st.data())
def test_dump_and_load_are_inverse(data):
    run = data.draw(values(data.draw(st.sampled_from(list(config.STAGES.values())))))
    root = strict_yaml.parse(config_table.dump(run), str)
    reader = config_file._Reader(type(run))
    assert reader.read(type(run), root, "") == run
    assert reader.problems == []


@pytest.mark.parametrize("stage", config.STAGES)
def test_every_key_is_described(stage):
    rows = list(config_table.describe(config.STAGES[stage]))
    assert [row.name.replace("[]", "") for row in rows] == list(config_file.dotted_names(config.STAGES[stage]))
    assert [row.name for row in rows if not row.effect or not row.type] == []


def test_every_key_has_a_sentence_beside_it():
    bare = [
        f"{cls.__name__}.{field.name}" for cls in GROUPS for field in dataclasses.fields(cls) if "effect" not in field.metadata
    ]
    assert bare == []


def test_the_page_of_keys_is_current():
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert page == config_table.markdown(), "run: rlhf-jax config --markdown > docs/configuration.md"
    assert "| `kl_coef` | a number | reward units per nat | `0.05` |" in page


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_run_files_of_the_project_load(path):
    config_file.load(path, [], config.STAGES[config_file.stage_of(path)])


def test_stage_is_told_from_the_keys(tmp_path):
    for stage, text in {
        "sft": "optimizer: {}\n",
        "reward": "optimizer: {}\nreward_model: {}\n",
        "dpo": "dpo: {}\n",
        "ppo": "ppo: {}\n",
    }.items():
        path = tmp_path / f"{stage}.yaml"
        path.write_text("steps: 3\n" + text)
        assert config_file.stage_of(path) == stage
