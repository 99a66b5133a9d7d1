"""What README.md and docs/ say is so: their Python runs, their commands run or parse, their keys, metrics, links and files exist.

A command in a block of a page is executed here on tiny settings. Only parsed, their run files read and their overrides applied,
are those on pages in `NEEDS_A_CLUSTER`, and the commands in `ELSEWHERE`, which the named test executes. `OWN_TEST` names pages
with a test of their own that runs all of them. What a sentence mentions
(`rlhf-jax report RUN`) is parsed.
"""

import ast
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from rlhf_jax import algorithms, cli, config, config_file, config_table, models, testing
from rlhf_jax.config import Reward, RewardFunction
from rlhf_jax.data.formats import FORMATS
from rlhf_jax.rewards import REWARDS, TAKEN, make_reward
from rlhf_jax.types import RewardInput
from tests import synthetic_runs

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "PAPERS.md", *sorted((ROOT / "docs").glob("*.md"))]
BY_NAME = {page.name: page for page in PAGES}
NEEDS_A_CLUSTER = {"tpu.md", "fit.md"}
OWN_TEST = {
    "five_stages.md": "tests/algorithms/test_deepspeed_chat.py",
    "using_a_model.md": "tests/test_using_a_model.py",
}
ELSEWHERE = {
    "quickstart": "tests/test_runs_end_to_end.py::test_the_quickstart_chains_its_stages",
    "fit": "tests/test_fit.py",
    "evaluate": OWN_TEST["using_a_model.md"],
    "chat": OWN_TEST["using_a_model.md"],
    "serve": OWN_TEST["using_a_model.md"],
}
TINY = {  # what makes a stage of the pages small
    "sft": "steps=2 batch_size=8 data.max_tokens=64 data.max_prompt_tokens=40 model.scratch.width=32 model.scratch.layers=1 "
    "model.scratch.heads=2 model.scratch.kv_heads=1 model.scratch.mlp_width=48 model.scratch.vocabulary=300",
    "reward": "steps=1 batch_size=8 data.max_tokens=64 data.max_prompt_tokens=40",
    "ppo": "steps=4 batch_size=16 data.max_prompt_tokens=40 sampling.max_new_tokens=8",
}


def blocks(page: Path, *languages: str) -> list[str]:
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def shell_lines(page: Path) -> list[str]:
    """Commands in the blocks of a page, without comments and prompts, continued lines joined."""
    text = "\n".join(blocks(page, "", "sh", "bash", "shell")).replace("\\\n", " ")
    lines = (line.split("   #")[0].strip().removeprefix("$ ") for line in text.splitlines())
    return [line for line in lines if re.match(r"(\w+=\S* )*(rlhf-jax|scripts/|\.venv/|python )", line)]


def commands(page: Path) -> list[list[str]]:
    """The `rlhf-jax` commands in the blocks of a page, as words."""
    words = [shlex.split(line, comments=True) for line in shell_lines(page)]
    return [line[line.index("rlhf-jax") + 1 :] for line in words if "rlhf-jax" in line]


def mentioned(page: Path) -> list[list[str]]:
    """Those within a sentence, `rlhf-jax report RUN`, that leave nothing out."""
    found = re.findall(r"`(?:[A-Z_]+=\S+ )*rlhf-jax ([^`…]+)`", re.sub(r"\s+", " ", page.read_text(encoding="utf-8")))
    return [words for text in found if len(words := shlex.split(re.sub(r"\bN\b", "1", text))) > 1 and "..." not in text]


# ------------------------------------------------------------------------------------------------- Python and YAML

PYTHON = [page.name for page in PAGES if blocks(page, "python") and page.name not in (*OWN_TEST, "rewards.md")]


@pytest.mark.parametrize("name", PYTHON)
def test_python_blocks_run(name, tmp_path, monkeypatch):
    """Each block by itself."""
    monkeypatch.chdir(tmp_path)
    tokens = testing.random_rollout(0, 2, 3, 2, 64)
    spec = models.scratch_spec(testing.tiny_scratch(64), 64)
    for block in blocks(BY_NAME[name], "python"):
        given = {"tokens": tokens.tokens, "mask": tokens.mask}
        if "path/to/" in block:
            source = tmp_path / "model"
            import jax

            models.save_checkpoint(source, spec, models.make_model(spec).init(jax.random.key(0)), source=None)
            block = re.sub(r"path/to/[\w.-]+", str(source), block)
        exec(compile(block, name, "exec"), given)  # noqa: S102 - our own page


def test_the_reward_page_tells_the_truth(tmp_path):
    page = BY_NAME["rewards.md"]
    (settings,) = [yaml.safe_load(block)["reward"] for block in blocks(page, "yaml")]
    function, tried = blocks(page, "python")
    exec(compile(tried, "rewards.md", "exec"), {})  # noqa: S102
    (tmp_path / "my_rewards.py").write_text(function)
    entries = [RewardFunction(**entry) for entry in settings["functions"][:2]]
    entries.append(RewardFunction(function=str(tmp_path / "my_rewards.py") + ":polite", options={"bonus": 2.0}))
    total, parts = make_reward(Reward(functions=tuple(entries)))(RewardInput(["p"], ["Please: 4"], [True], {"answer": ["4"]}))
    assert total.tolist() == [3.0]
    assert set(parts) == {"reward/math_answer", "reward/length", "reward/polite"}
    text = page.read_text(encoding="utf-8")
    for name, shipped in REWARDS.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        for option in list(inspect.signature(shipped).parameters)[1:]:
            assert option == "tokenizer" or f"`{option}`" in line, (name, option)


def test_the_data_page_tells_the_truth():
    text = BY_NAME["data.md"].read_text(encoding="utf-8")
    for key in config.Data.__dataclass_fields__:
        assert key in text or key == "limit", key
    for formats in FORMATS.values():
        for _, columns in formats:
            assert all(f"`{column}`" in text for column in columns)


FILE_ENDINGS = ("py", "md", "yaml", "jsonl")
KEYS = {row.name.replace("[]", "") for cls in config.STAGES.values() for row in config_table.describe(cls)}


def keys_of(value, prefix=""):
    for key, inner in value.items():
        yield f"{prefix}{key}"
        if f"{prefix}{key}" in ("data.columns", "ptx_data.columns", "reward.functions"):
            continue
        for each in inner if isinstance(inner, list) else [inner]:
            if isinstance(each, dict):
                yield from keys_of(each, f"{prefix}{key}.")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_that_a_page_names_are_keys(page):
    text = page.read_text(encoding="utf-8")
    unknown = [key for block in blocks(page, "yaml") for key in keys_of(yaml.safe_load(block)) if key not in KEYS]
    groups = {key.partition(".")[0] for key in KEYS if "." in key}
    modules = ("data.batches", "data.tokenizer", "models.")
    for name in re.findall(r"`([a-z_]+\.[a-z_0-9]+(?:\.[a-z_0-9]+)*)(?=[:=`\]])", text):
        head, _, rest = name.partition(".")
        function = hasattr(getattr(algorithms, head, None), rest)
        if head in groups and rest not in FILE_ENDINGS and not name.startswith(modules) and name not in KEYS and not function:
            unknown.append(name)
    assert unknown == []


def test_metrics_that_a_page_names_are_logged():
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "rlhf_jax").rglob("*.py"))
    groups = sorted({name.partition("/")[0] for name in re.findall(r'"([a-z_]+/[a-z_]+)"', source)})
    for page in PAGES:
        for group, name in re.findall(rf"`({'|'.join(groups)})/([a-z_0-9]+)`", page.read_text(encoding="utf-8")):
            known = f"/{name}" in source or (group == "reward" and name in (*REWARDS, *TAKEN))
            assert known or (ROOT / group).exists() or (ROOT / "rlhf_jax" / group).exists(), f"{page.name}: {group}/{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere_and_no_place_is_left_to_fill(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        if anchor and found.suffix == ".md":
            titles = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}, target
    assert re.findall(r"^(?:[A-Z]+_?[A-Z]*|TODO.*|TBD.*)$", text, re.MULTILINE) == []


# ------------------------------------------------------------------------------------------------- commands


def parse(words):
    """The command as the command line understands it; an error where it does not."""
    group = typer.main.get_command(cli.app)
    name, rest = words[0], words[1:]
    assert name in group.commands, f"rlhf-jax {name}: no such command"
    return group.commands[name].make_context(name, list(rest)).params


def check_run_file(words):
    """A stage's run file, where it is one of ours, with its overrides."""
    path = next((word for word in words if word.startswith("configs/")), None)
    if path is None:
        return
    stage = words[0] if words[0] in config.STAGES else config_file.stage_of(ROOT / path)
    config_file.load(ROOT / path, [word for word in words[1:] if re.match(r"[a-z_.]+=", word)], config.STAGES[stage])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_parses_and_its_files_exist(page):
    for words in commands(page):
        parse(words)
        check_run_file(words)
        assert words[0] in ELSEWHERE or words[0] in EXECUTED or page.name in {*NEEDS_A_CLUSTER, *OWN_TEST}, words
    for words in mentioned(page):
        parse(words)
    for line in shell_lines(page):
        for script in re.findall(r"(?<!\S)((?:scripts|tests|examples)/[\w./]+\.(?:sh|py))", line):
            assert (ROOT / script).exists(), line


def test_what_is_executed_elsewhere_is():
    assert ELSEWHERE.keys() <= typer.main.get_command(cli.app).commands.keys()
    for where in [*ELSEWHERE.values(), *OWN_TEST.values()]:
        path, _, test = where.partition("::")
        assert (ROOT / path).exists(), where
        assert not test or test in {node.name for node in ast.walk(ast.parse((ROOT / path).read_text())) if hasattr(node, "name")}


EXECUTED = ("sft", "reward", "ppo", "generate", "export", "report", "runs", "data", "config", "models", "doctor")


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """What a reader of the pages has at hand: pairs, prompts, our run files, two earlier runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    shutil.copytree(ROOT / "configs", "configs")
    human = "\n\nHuman: say {}\n\nAssistant:"
    rows = [{"chosen": f"{human.format(n)} yes , {n}", "rejected": f"{human.format(n)} no"} for n in range(40)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("prompts.txt").write_text("say one\n")
    (written,) = re.findall(r"^printf .* > prompts\.jsonl$", (ROOT / "README.md").read_text(), re.MULTILINE)
    subprocess.run(["bash", "-c", written], check=True, timeout=10)
    for name in ("quickstart", "seed0", "seed1"):
        synthetic_runs.ppo(tmp_path / "runs" / name, steps=4)
    return tmp_path


def test_the_commands_of_the_pages_run_one_after_the_other(workplace, monkeypatch, capfd):
    todo = [words for page in PAGES if page.name not in {*NEEDS_A_CLUSTER, *OWN_TEST} for words in commands(page)]
    todo = sorted({tuple(words): None for words in todo if words[0] in EXECUTED}, key=lambda words: EXECUTED.index(words[0]))
    assert {words[0] for words in todo} == set(EXECUTED)
    for words in todo:
        tiny = TINY.get(words[0], "").split()
        monkeypatch.setattr(sys, "argv", ["rlhf-jax", *words, *tiny])
        with pytest.raises(SystemExit) as left:
            cli.main()
        printed = capfd.readouterr()
        assert left.value.code == 0, (words, printed.err)
    assert (workplace / "runs/hh/ppo/report.html").is_file()
    assert (workplace / "compare.html").is_file()
