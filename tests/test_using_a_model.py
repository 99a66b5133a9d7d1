"""Every command and every block of Python in docs/using_a_model.md runs, and what its tables say is so."""

import io
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import directories
import pytest
from test_serving import Running

from rlhf_jax import chat, cli, evaluate, serving
from rlhf_jax.errors import UserError
from rlhf_jax.serving import schema, service

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/using_a_model.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def commands(program):
    """Commands of the page that begin with a program, continued lines joined, as lists of words."""
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line.rpartition(" | ")[2]) for line in lines if line.rpartition(" | ")[2].startswith(program)]


@pytest.fixture
def place(tmp_path, monkeypatch, one_device):
    """A directory in which the page's paths exist."""
    monkeypatch.chdir(tmp_path)
    for stage, directory in [("ppo", directories.language_model()), ("sft", directories.language_model(5))]:
        Path(f"runs/quickstart/{stage}").mkdir(parents=True)
        Path(f"runs/quickstart/{stage}/final").symlink_to(directory)
    Path("runs/quickstart/reward").mkdir()
    Path("runs/quickstart/reward/final").symlink_to(directories.reward_model())
    Path("runs/gsm8k/grpo").mkdir(parents=True)
    Path("runs/gsm8k/grpo/final").symlink_to(directories.language_model())
    Path("test.jsonl").write_text(json.dumps({"question": "2 + 3 ?", "answer": "#### 5"}) + "\n")
    Path("problems.jsonl").write_text(json.dumps({"problem": "2 + 3 ?", "solution": "5"}) + "\n")
    Path("sums.jsonl").write_text(json.dumps({"prompt": "what is 2 + 3 ?", "answer": "5"}) + "\n")
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys):
    """run(words, typed) -> standard output of a command of ours, which succeeds."""

    def call(words, typed=""):
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        captured = capsys.readouterr()
        assert (exit_info.value.code, captured.err) == (0, "")
        return captured.out

    return call


def test_the_page_has_every_command():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (extra,) = re.findall(r'^pip install "rlhf-jax\[(\w+)\]"$', blocks("sh")[2], re.MULTILINE)
    assert {"starlette", "uvicorn"} == {re.split(r"[<>=]", line)[0] for line in extras[extra]}
    assert {words[1] for words in commands("rlhf-jax")} == {command.__name__ for command in cli.cli_models.COMMANDS}


def test_chat(place, run, monkeypatch):
    *typed, piped = [command for command in commands("rlhf-jax") if command[1] == "chat"]
    assert len(run(piped, "what is 2 + 3 ?\nand 4 + 4 ?\n").splitlines()) == 2
    started = []
    monkeypatch.setattr(chat, "chat", lambda directory, **options: started.append(options))
    assert [run(words) for words in typed] == ["", ""]
    assert [options["system"] for options in started] == ["", "Answer in one sentence."]
    named = list(dict.fromkeys(re.findall(r"`(/[a-z]+)[ `]", PAGE)))
    assert named == ["/reset", "/system", "/quit"]
    for name in named:
        chat.command(chat.Conversation(None, 1, 1.0, 1.0, 0), name)


def test_evaluate(place, run):
    found = [command for command in commands("rlhf-jax") if command[1] == "evaluate"]
    assert len(found) == 6
    (loop,) = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("for ")]
    subprocess.run(["bash", "-c", loop], check=True, timeout=20)
    assert len(set(Path("prompts.txt").read_text().splitlines())) == 4
    texts = [run([*words, "--batch-size", "8", "--limit", "2"]) for words in found]
    shown = [line.split("  ")[0] for line in blocks("text")[0].splitlines()[1:]]
    assert [line.split("  ")[0] for line in texts[0].splitlines()[1:]] == shown
    assert [figure["of"] for figure in json.loads(texts[3])["figures"][:2]] == [found[3][-3], "repetition"]
    assert len(Path("answers.jsonl").read_text().splitlines()) == 1
    for option in re.findall(r"`(--[a-z-]+)", PAGE):
        named = option.removeprefix("--").replace("-", "_")
        assert any(named in command.__annotations__ for command in cli.cli_models.COMMANDS), option


def test_serve_and_its_clients(place, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(serving, "serve", lambda directory, **options: started.append((directory, options)))
    for words in commands("rlhf-jax"):
        if words[1] == "serve":
            monkeypatch.setattr(sys, "argv", words)
            with pytest.raises(SystemExit):
                cli.main()
    (language, options), (rewarding, others) = started
    running = Running(language, options["name"])
    (client,) = blocks("python")
    try:
        exec(compile(client.replace(f":{options['port']}/", f":{running.port}/"), "page", "exec"), {})  # noqa: S102
    finally:
        running.stop()
    assert len(capsys.readouterr().out.splitlines()) >= 2
    scoring = Running(rewarding, others["name"] or str(rewarding))
    try:
        found = [scoring.http("POST", *request_of(words, others["port"])) for words in commands("curl")]
    finally:
        scoring.stop()
    assert [(status, len(answer["scores"])) for status, answer in found] == [(200, 1), (200, 1), (200, 2)]


def request_of(words, port):
    """Path and body of a curl command."""
    assert words[1].startswith(f"http://127.0.0.1:{port}/")
    assert words[words.index("-H") + 1] == "Content-Type: application/json"
    return words[1].partition(str(port))[2], json.loads(words[words.index("-d") + 1])


def test_the_tables_name_every_route_and_key():
    for method, path, _ in service.ROUTES:
        assert f"`{method} {path.replace('{name:path}', 'NAME')}`" in PAGE
    keys = {**schema.ChatRequest.model_fields, **schema.CompletionRequest.model_fields, **schema.ScoreRequest.model_fields}
    for key in keys:
        assert re.search(rf'["`.]{key}["`.:(]', PAGE) or key == "columns", key
    for figure in ("reward", "kl", "win_rate", "reward_gain", "pass@k", "best_of_n", "length", "finished"):
        assert f"`{figure}`" in PAGE
    numbers = (service.AT_ONCE, service.WAITING, schema.MOST_STOPS, schema.SAMPLES, schema.TOP)
    assert numbers == (8, 64, 16, 16, 20), "the page says so"
    for entry in ("{function: math_answer, options: {strict: true}}",):
        assert entry in PAGE
        assert evaluate.host_reward(entry).functions[0].options == {"strict": True}
    with pytest.raises(UserError):
        evaluate.host_reward("{function}")
