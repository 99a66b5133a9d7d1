"""`rlhf-jax evaluate`: its numbers against the same thing done by hand."""

import dataclasses
import json
import re
import shutil
import sys
import typing

import directories
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import cli, config, estimates, evaluate, generate, models, parallel, sampling, scorer
from rlhf_jax.data.batches import make_prompt_data
from rlhf_jax.data.tokenizer import load_tokenizer, train_bpe
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate import Settings
from rlhf_jax.types import Prompts

QUESTIONS = ["what is 2 + 3 ?", "it is", "5 5 5"]
SETTINGS = Settings(samples=4, max_new_tokens=8, batch_size=8, seed=7)
FUNCTION = """
def count(batch, *, letter="e"):
    return [float(len(text) + len(answer)) for text, answer in zip(batch.responses, batch.columns["answer"])]

def even(responses, **rest):
    return [float(len(text) % 2 == 0) for text in responses]
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A data file with a column that rewards read, and rewards of one's own."""
    out = tmp_path_factory.mktemp("evaluate")
    rows = [{"prompt": prompt, "answer": "x" * place} for place, prompt in enumerate(QUESTIONS)]
    (out / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "mine.py").write_text(FUNCTION)
    return out


@pytest.fixture(scope="module")
def measured(files):
    """Everything at one time, and the answers that were written."""
    settings = dataclasses.replace(
        SETTINGS,
        rewards=(f"{files}/mine.py:even", f"{files}/mine.py:count", str(directories.reward_model())),
        reference=str(directories.language_model(5)),
        against=str(directories.language_model(5)),
        pass_at=(1, 4),
        best_of=(1, 2),
    )
    found = evaluate.evaluate(directories.language_model(), files / "prompts.jsonl", settings, out=files / "out/answers.jsonl")
    answers = [json.loads(line) for line in (files / "out/answers.jsonl").read_text().splitlines()]
    return found, answers, settings


def figure(found, name, of):
    (one,) = [f for f in found if f.name == name and f.of == of]
    return one.estimate


@pytest.fixture(scope="module")
def rollout():
    """The same answers, sampled in one batch."""
    generator = generate.open_model(directories.language_model())
    ids = [generator.tokenizer.encode(text, start=True) for text in QUESTIONS]
    batch = generate.left_padded([row for row in ids for _ in range(4)], 16, 16, generator.tokenizer.pad_id, 0)
    numbers = np.arange(16, dtype=np.int32)
    batch = Prompts(tokens=batch.tokens, mask=batch.mask, index=numbers // 4, sample=numbers % 4)
    stops, pad = generator.tokenizer.eos_ids, generator.tokenizer.pad_id
    sample = sampling.make_sampler(generator.loaded.model, config.Sampling(max_new_tokens=8), stop_ids=stops, pad_id=pad)
    return generator, parallel.fetch(parallel.compile_step(sample)(generator.loaded.params, batch, jax.random.key(7)))


def test_the_answers_are_those_of_the_sampler(measured, rollout):
    _, answers, _ = measured
    generator, found = rollout
    texts = [generator.tokenizer.decode(row[keep]) for row, keep in zip(found.tokens[:, 16:], found.action_mask, strict=True)]
    assert [row["response"] for row in answers] == texts[:12]
    assert [row["sample"] for row in answers] == [0, 1, 2, 3] * 3
    assert [row["prompt"] for row in answers] == [text for text in QUESTIONS for _ in range(4)]
    assert [row["finished"] for row in answers] == found.finished[:12].tolist()


def test_a_batch_that_the_devices_do_not_divide_is_rounded_up(measured, files):
    settings = dataclasses.replace(measured[2], batch_size=3)
    questions = evaluate.read_questions(files / "prompts.jsonl", config.Data())
    found = evaluate.answer(str(directories.language_model()), questions, settings)
    assert [text for row in found.texts for text in row] == [row["response"] for row in measured[1]]
    generator = generate.open_model(directories.language_model())
    ids = [generator.tokenizer.encode(text, start=True) for text in QUESTIONS]
    sizes = [list(generate.answer(generator, ids, config.Sampling(max_new_tokens=4), batch_size=size)) for size in (3, 16)]
    assert sizes[0] == [dataclasses.replace(one, logprob=pytest.approx(one.logprob, abs=1e-4)) for one in sizes[1]]


@pytest.mark.skipif(jax.device_count() < 6, reason="one simulated device: nothing to compare")
def test_any_number_of_devices_gives_the_same(measured, files, monkeypatch):
    """A width of 32: of five devices none splits the weights, of six two do, and all work."""
    devices = jax.devices()
    for count, shape in ((5, (5, 1, 1)), (6, (3, 2, 1))):
        monkeypatch.setattr(jax, "devices", lambda count=count: devices[:count])
        assert generate.open_model(directories.language_model()).mesh.devices.shape == shape
        assert scorer.open_scorer(directories.reward_model()).mesh.devices.shape == shape
    settings = dataclasses.replace(measured[2], against=None, pass_at=(), best_of=())
    found = evaluate.evaluate(directories.language_model(), files / "prompts.jsonl", settings, out=files / "six.jsonl")
    rows = [json.loads(line) for line in (files / "six.jsonl").read_text().splitlines()]
    assert [row["response"] for row in rows] == [row["response"] for row in measured[1]]
    for each in found:
        assert each.estimate.value == pytest.approx(figure(measured[0], each.name, each.of).value, abs=1e-5), each


def test_rewards_are_those_of_functions_and_models(measured, files, rollout):
    found, answers, settings = measured
    even, count, model = settings.rewards
    assert [row["rewards"][count] for row in answers] == [len(row["response"]) + n // 4 for n, row in enumerate(answers)]
    _, sampled = rollout
    rows = [tokens[mask].tolist() for tokens, mask in zip(sampled.tokens, sampled.mask, strict=True)][:12]
    values = scorer.open_scorer(model).score(rows)
    np.testing.assert_allclose([row["rewards"][model] for row in answers], values, atol=1e-6)
    for name in settings.rewards:
        scores = np.asarray([row["rewards"][name] for row in answers]).reshape(3, 4)
        assert figure(found, "reward", name) == estimates.bootstrap(scores, seed=7)
        best = estimates.best_of_n(np.asarray([row["rewards"][even] for row in answers]).reshape(3, 4), 2, scores)
        assert figure(found, "best_of_2", name) == estimates.bootstrap(best, seed=7)
        assert figure(found, "best_of_1", name).value == pytest.approx(scores.mean())
    right = np.asarray([row["rewards"][even] for row in answers]).reshape(3, 4).sum(1)
    assert figure(found, "pass@1", even).value == pytest.approx(right.mean() / 4)
    assert figure(found, "pass@4", even).value == pytest.approx((right > 0).mean())
    assert figure(found, "pass@4", even).count == 3


def test_kl_is_the_sum_of_that_of_every_token(measured, rollout):
    generator, sampled = rollout
    other = generate.open_model(directories.language_model(5))
    logprobs = []
    for each in (generator, other):
        model, params = each.loaded.model, each.loaded.params
        hidden, _ = jax.jit(model.prefill, static_argnums=3)(params, jnp.asarray(sampled.tokens), jnp.asarray(sampled.mask), 25)
        logits = np.asarray(model.logits(params, hidden), np.float64)[:, 15:23]
        logprobs.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    per_token = (np.exp(logprobs[0]) * (logprobs[0] - logprobs[1])).sum(-1)
    wanted = np.where(sampled.action_mask, per_token, 0).sum(1)[:12]
    found, _, settings = measured
    estimate = figure(found, "kl", settings.reference)
    assert estimate.value == pytest.approx(wanted.mean(), rel=1e-4)
    assert 0 < estimate.low < estimate.value < estimate.high
    assert estimate.count == 3


def test_a_model_is_as_good_as_itself(files):
    same = str(directories.language_model())
    settings = dataclasses.replace(SETTINGS, rewards=(f"{files}/mine.py:count",), reference=same, against=same)
    found = evaluate.evaluate(directories.language_model(), files / "prompts.jsonl", settings)
    assert figure(found, "win_rate", settings.rewards[0]).value == 0.5
    assert figure(found, "reward_gain", settings.rewards[0]) == estimates.Interval(0.0, 0.0, 0.0, 3)
    assert figure(found, "kl", same).value == pytest.approx(0.0, abs=1e-5)


def test_a_reward_model_with_another_tokenizer_reads_texts(files, tmp_path):
    tokenizer = train_bpe(["something else altogether"] * 4, 290)
    spec = models.scratch_spec(dataclasses.replace(config.Scratch(width=32, layers=2, heads=4, kv_heads=2, mlp_width=48)), 300)
    params = jax.jit(lambda key: models.make_model(spec).init(key, head="score"))(jax.random.key(3))
    models.save_checkpoint(tmp_path / "rm", spec, params, head="score", tokenizer=tokenizer)
    answers = evaluate.Answers(
        ids=[[[5], [6, 7]]],
        texts=[["five", "six"]],
        finished=np.asarray([[True, False]]),
        kl=None,
        prompts=[[1]],
        tokenizer=generate.load_tokenizer(directories.language_model()),
    )
    question = evaluate.Question("two + three", {}, lambda: "here:1")
    model = scorer.open_scorer(tmp_path / "rm")
    wanted = model.score([model.encode("two + three", "five"), model.encode("two + three", "six", False)])
    assert evaluate.score(str(tmp_path / "rm"), answers, [question]).tolist() == [pytest.approx(wanted.tolist())]
    long = evaluate.Question("two " * 1000, {}, lambda: "here:1")
    with pytest.raises(UserError, match="here:1: prompt and answer have .* tokens and the reward model takes 1 to 1024"):
        evaluate.score(str(tmp_path / "rm"), answers, [long])


def test_questions_come_in_every_form_that_prompts_have(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert [(q.prompt, q.where()) for q in evaluate.read_questions(tmp_path / "a.txt", None)] == [
        ("one", f"{tmp_path}/a.txt:1"),
        ("two", f"{tmp_path}/a.txt:3"),
    ]
    rows = [{"question": "2 + 3", "answer": "#### 5"}, {"question": "1 + 1", "answer": "#### 2"}]
    (tmp_path / "gsm.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (first,) = evaluate.read_questions(tmp_path / "gsm.jsonl", config.Data(limit=1))
    assert (first.prompt, first.columns) == ("Question: 2 + 3\nAnswer:", {"answer": "#### 5"})
    assert evaluate.read_questions(tmp_path / "gsm.jsonl")[1].where() == f"{tmp_path}/gsm.jsonl:2"


@pytest.mark.parametrize(
    ("row", "data"),
    [
        ({"question": "2 + 3", "answer": "#### 5"}, {}),
        ({"question": "2 + 3", "answer": "#### 5"}, {"chat": True}),
        ({"prompt": "2 + 3", "answer": "#### 5"}, {"chat": True}),
        ({"messages": [{"role": "user", "content": "2 + 3"}, {"role": "assistant", "content": "5"}], "answer": "#### 5"}, {}),
        ({"problem": "2 + 3", "solution": "5", "id": 7}, {"columns": {"prompt": "problem", "answer": "solution"}}),
        ({"problem": "2 + 3", "solution": "5"}, {"columns": {"question": "problem", "answer": "solution"}, "chat": True}),
    ],
)
def test_model_and_rewards_see_a_question_as_in_training(tmp_path, row, data):
    tokenizer = generate.load_tokenizer(directories.language_model())
    settings = config.Data(**data)
    trained = make_prompt_data(settings, tokenizer, seed=0, batch_size=1, rows=[row])
    prompts = trained.prompts(np.asarray([0]))
    (tmp_path / "asked.jsonl").write_text(json.dumps(row) + "\n")
    (question,) = evaluate.read_questions(tmp_path / "asked.jsonl", settings)
    assert generate.encode_prompt(tokenizer, question.prompt) == prompts.tokens[0][prompts.mask[0]].tolist()
    (tmp_path / "mine.py").write_text(f"def same(batch):\n    return [float(batch.prompts == {trained.texts([0])!r})]\n")
    answers = evaluate.Answers([[[5]]], [["5"]], np.asarray([[True]]), None, [[1]], tokenizer)
    assert evaluate.score(f"{tmp_path}/mine.py:same", answers, [question]) == 1.0
    assert {name: [value] for name, value in question.columns.items()} == trained.columns([0])


def test_a_line_of_text_can_be_a_users_message(tmp_path):
    (tmp_path / "a.txt").write_text("one\n")
    (found,) = evaluate.read_questions(tmp_path / "a.txt", config.Data(chat=True))
    assert found.prompt == [{"role": "user", "content": "one"}]


def test_a_servers_password_is_not_shown():
    name = "https://me:secret@host/score?key=secret"
    figure = evaluate.Figure("reward", name, "", estimates.Interval(0.0, 0.0, 0.0, 1))
    settings = Settings(rewards=(name,))
    for text in (evaluate.to_text([figure], "m", settings), evaluate.to_json([figure], "m", settings)):
        assert "secret" not in text
        assert "host/score" in text


# The command.


@pytest.fixture
def run(monkeypatch, capsys, files):
    def call(*options, model=None, prompts="prompts.jsonl"):
        model = model or directories.language_model()
        command = [
            "rlhf-jax",
            "evaluate",
            model,
            "--prompts",
            files / prompts,
            "--batch-size",
            8,
            "--max-new-tokens",
            8,
            *options,
        ]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        captured = capsys.readouterr()
        return exit_info.value.code, captured.out, captured.err

    return call


def test_the_command_prints_a_table_and_json(run, files, measured):
    options = ["--samples", 4, "--seed", 7, "--reward", f"{files}/mine.py:even", "--pass-at", "1,4", "--best-of", "2"]
    status, text, err = run(*options)
    assert (status, err) == (0, "")
    assert "3 prompts, 4 answers each, temperature 1, top-p 1, at most 8 tokens, seed 7; intervals of 95%" in text
    assert [line.split()[0] for line in text.splitlines()[1:]] == [
        "reward",
        "pass@1",
        "pass@4",
        "best_of_2",
        "length",
        "finished",
    ]
    assert "KL to the model at most 0.19 nats" in text
    status, text, err = run(*options, "--json")
    found = json.loads(text)
    assert found["settings"]["pass_at"] == [1, 4]
    row = found["figures"][0]
    assert row["name"] == "reward"
    assert row["value"] == figure(measured[0], "reward", f"{files}/mine.py:even").value
    assert row["low"] <= row["value"] <= row["high"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts", "missing.txt"], "--prompts missing.txt: no such file"),
        (["--prompts", "LATIN"], "latin.txt: byte 3 is not UTF-8"),
        (
            ["--reward", "wisdom"],
            "--reward wisdom: neither a directory with a reward model, nor one of exact, length, math_answer",
        ),
        (["--reward", "LM"], "is a language model, which gives no scores"),
        (["--reward", "missing.py:f"], "no file 'missing.py'"),
        (["--reward", "{function: length, maximum: 3}"], "it must look like {function: math_answer"),
        (["--reward", "math_answer"], "the data has no column 'answer'"),
        (["--reference", "RM"], "RM: is a reward model or a critic; name a language model"),
        (["--reference", "nowhere"], "nowhere: no such directory"),
        (["--reference", "LM", "--temperature", "0"], "--reference needs --temperature above 0"),
        (["--temperature", "1e-10"], "--temperature 1e-10: must be 0 (the likeliest token) or at least 0.0001"),
        (["--against", "LM"], "--against needs --reward"),
        (["--pass-at", "2", "--reward", "length"], "--pass-at 2 needs at least as many answers to each prompt; give --samples 2"),
        (["--pass-at", "two"], "--pass-at two: must be whole numbers"),
        (["--best-of", "0", "--reward", "length"], "--best-of 0 must be at least 1"),
        (["--confidence", "95"], "--confidence 95.0: must lie between 0 and 1"),
        (["--max-new-tokens", "128"], "the prompt has 3 tokens; with --max-new-tokens 128 that is more than the 128"),
        (["--columns", "prompt"], "--columns prompt: must be OURS=THEIRS, such as prompt=problem"),
        (["--columns", "prompt=text"], "short.txt is plain text and has no columns; leave it out"),
        (["--out", "/dev/full"], "--out /dev/full: cannot be written (No space left on device); free disk space, or name"),
    ],
)
def test_mistakes_are_one_message(run, files, options, message):
    (files / "short.txt").write_text("it\n")
    (files / "latin.txt").write_bytes(b"caf\xe9\n")
    names = {"LM": str(directories.language_model()), "RM": str(directories.reward_model()), "LATIN": str(files / "latin.txt")}
    options = [names.get(option, option) for option in options]
    message = message.replace("RM:", names["RM"] + ":")
    status, out, err = run(*options, prompts="short.txt")
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_place_for_the_answers_is_tried_before_there_are_any(files, monkeypatch):
    def answer(*args, **kwargs):
        raise RuntimeError("answered")

    monkeypatch.setattr(evaluate, "answer", answer)
    arguments = (directories.language_model(), files / "prompts.jsonl", SETTINGS)
    with pytest.raises(UserError, match="prompts.jsonl/answers.jsonl: cannot be written .*name another place"):
        evaluate.evaluate(*arguments, out=files / "prompts.jsonl" / "answers.jsonl")
    (files / "earlier.jsonl").write_text("{}\n")
    for name, left in (("earlier.jsonl", True), ("later.jsonl", False)):
        with pytest.raises(RuntimeError, match="answered"):
            evaluate.evaluate(*arguments, out=files / name)
        assert (files / name).exists() == left
    assert (files / "earlier.jsonl").read_text() == "{}\n"


def test_the_command_asks_as_a_run_with_data_chat_and_columns(run, files):
    (files / "gsm.jsonl").write_text(json.dumps({"problem": "2 + 3", "answer": "#### 5"}) + "\n")
    options = ["--chat", "--columns", "question=problem", "--reward", "math_answer", "--json", "--out", files / "gsm.out"]
    status, text, err = run(*options, prompts="gsm.jsonl")
    assert (status, err) == (0, "")
    assert (json.loads(text)["settings"]["chat"], json.loads(text)["settings"]["columns"]) == (True, {"question": "problem"})
    assert json.loads((files / "gsm.out").read_text())["prompt"] == [{"role": "user", "content": "2 + 3"}]
    status, _, err = run("--columns", "question=problems", prompts="gsm.jsonl")
    assert status == 2
    assert "gsm.jsonl:1: data.columns.question: problems names a column that is not there; found problem, answer" in err
    assert "on this command line --columns OURS=THEIRS" in err


def test_generate_reads_the_same_files(files, monkeypatch, capsys):
    (files / "gsm.jsonl").write_text(json.dumps({"problem": "2 + 3", "answer": "#### 5"}) + "\n")
    command = ["rlhf-jax", "generate", directories.language_model(), "--prompts", files / "gsm.jsonl", "--max-new-tokens", 4]
    monkeypatch.setattr(sys, "argv", [str(part) for part in [*command, "--chat", "--columns", "question=problem"]])
    with pytest.raises(SystemExit):
        cli.main()
    assert json.loads(capsys.readouterr().out)["prompt"] == [{"role": "user", "content": "2 + 3"}]


def test_a_reward_model_gives_no_answers(run):
    status, _, err = run("--max-new-tokens", "128", model=directories.reward_model())
    assert status == 2
    assert "is a reward model or a critic: it scores answers and gives none" in err


@pytest.fixture
def long(files):
    """A file of three prompts, of 3, 132 and 3 tokens; the model takes 128 with the answer."""
    (files / "long.txt").write_text("it\n" + "b" * 130 + "\nis\n")
    return "long.txt"


def test_prompts_that_are_too_long_follow_long_prompts(run, long, files):
    status, _, err = run("--long-prompts", "error", prompts=long)
    assert status == 2
    assert re.search(r"long.txt:2: the prompt has 13\d tokens; .*or give --long-prompts drop or truncate_left", err)
    tokenizer, told = load_tokenizer(directories.language_model()), []
    asked = evaluate.read_questions(files / long)
    dropped, ids = generate.fitted(tokenizer, 128, asked, 8, "drop", told.append)
    assert (dropped, ids) == ([asked[0], asked[2]], [generate.encode_prompt(tokenizer, text) for text in ("it", "is")])
    kept, ids = generate.fitted(tokenizer, 128, asked, 8, "truncate_left", told.append)
    whole = generate.encode_prompt(tokenizer, "b" * 130)
    assert (kept, ids[1]) == (asked, [tokenizer.bos_id, *whole[-119:]])
    limit = "with --max-new-tokens 8 the model takes 120 tokens of a prompt; --long-prompts chooses"
    assert told == [f"1 of 3 prompts dropped: {limit}", f"1 of 3 prompts cut on the left: {limit}"]
    assert generate.fitted(tokenizer, None, asked, 100, "error", told.append)[1][1] == whole
    assert len(told) == 2
    with pytest.raises(UserError, match=r"long.txt:1: .*lower --max-new-tokens$"):
        generate.fitted(tokenizer, 128, asked, 128, "truncate_left")


def test_a_prompt_is_asked_where_both_models_have_room(run, long, files, tmp_path):
    """Those that one of the two cannot take are dropped for both, before any of them answers."""
    shutil.copytree(directories.language_model(), tmp_path / "short")
    config_file = tmp_path / "short" / "config.json"
    content = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(content | {"max_position_embeddings": 11}))
    (files / "both.txt").write_text("it\nwhat is 2 + 3 ? it is 5 .\n" + "b" * 130)
    options = ["--against", tmp_path / "short", "--reward", "length", "--json"]
    status, text, err = run(*options, prompts="both.txt")
    assert (status, json.loads(text)["figures"][0]["count"]) == (0, 1)
    assert [line.split(":")[1] for line in err.splitlines()] == [" 1 of 3 prompts dropped", " 1 of 2 prompts dropped"]


def test_generate_drops_and_limits(long, files, monkeypatch, capsys):
    command = ["rlhf-jax", "generate", directories.language_model(), "--prompts", files / long, "--max-new-tokens", 8]
    monkeypatch.setattr("sys.argv", [*map(str, command), "--limit", "2"])
    with pytest.raises(SystemExit):
        cli.main()
    found = capsys.readouterr()
    assert [json.loads(line)["prompt"] for line in found.out.splitlines()] == ["it"]
    assert found.err.startswith("rlhf-jax: 1 of 2 prompts dropped")
    assert set(cli.cli_models.LongPrompts) == set(typing.get_args(typing.get_type_hints(config.Data)["long_prompts"]))
    assert config.Data().long_prompts == evaluate.Settings().long_prompts == "drop"


def test_generate_takes_no_more_tokens_than_the_model(files, monkeypatch, capsys):
    (files / "short.txt").write_text("it\n")
    command = ["rlhf-jax", "generate", directories.language_model(), "--prompts", files / "short.txt", "--max-new-tokens", 128]
    monkeypatch.setattr("sys.argv", [*map(str, command)])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    found = capsys.readouterr()
    assert (found.out, "short.txt:1: the prompt has 3 tokens; with --max-new-tokens 128 that is more than" in found.err) == (
        "",
        True,
    )
