"""Host rewards: shipped ones, a user's file, several with weights, and failures that are named and never scored."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax.config import Reward, RewardFunction
from rlhf_jax.data.tasks import TASKS
from rlhf_jax.errors import UserError
from rlhf_jax.rewards import REWARDS, RewardError, checked, load_function, make_reward
from rlhf_jax.types import RewardInput

ROOT = Path(__file__).parents[2]


def _batch(responses: list[str], finished: list[bool] | None = None, **columns: list) -> RewardInput:
    prompts = [f"prompt {n}" for n in range(len(responses))]
    return RewardInput(prompts, responses, np.asarray(finished or [True] * len(responses)), columns)


def _file(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def _run(target: str, batch: RewardInput, timeout_s: float = 20.0, **options: object) -> np.ndarray:
    entry = RewardFunction(function=target, options=options)
    return make_reward(Reward(functions=(entry,), timeout_s=timeout_s), TASKS["reviews"].tokenizer())(batch)[0]


def test_regex():
    batch = _batch(["<think>a\nb</think> c", "c"])
    assert _run("regex", batch, pattern="<think>.*</think>").tolist() == [1.0, 0.0]
    assert _run("regex", batch, pattern="c", full=True, match=0.5, otherwise=-0.5).tolist() == [-0.5, 0.5]
    with pytest.raises(RewardError, match="no regular expression"):
        _run("regex", batch, pattern="(")


def test_length():
    batch = _batch(["a b c d", "", "a b"])
    assert _run("length", batch, minimum=1, maximum=2, per_unit=0.5).tolist() == [-1.0, -0.5, 0.0]
    assert _run("length", batch, maximum=3, per_unit=1.0, unit="characters").tolist() == [-4.0, 0.0, 0.0]
    assert _run("length", _batch(["the hotel", "the"]), maximum=1, per_unit=1.0, unit="tokens").tolist() == [-1.0, 0.0]
    with pytest.raises(RewardError, match="none of words, characters, tokens"):
        _run("length", batch, unit="pages")
    with pytest.raises(RewardError, match="0 <= minimum <= maximum"):
        _run("length", batch, minimum=3, maximum=2)


def test_repetition():
    batch = _batch(["a b c a b c a b c", "a b c d", "a", "", "A b a B"])
    expected = [-(1 - 3 / 7), 0.0, 0.0, 0.0, 0.0]
    np.testing.assert_allclose(_run("repetition", batch), expected, rtol=1e-6)
    np.testing.assert_allclose(_run("repetition", batch, ngram=2, penalty=3.0)[-1], -1.0, rtol=1e-6)
    with pytest.raises(RewardError, match="at least 1"):
        _run("repetition", batch, ngram=0)


def test_exact():
    batch = _batch([" 46", "46", "45"], [True, False, True], answer=[46, "46", "46"])
    assert _run("exact", batch).tolist() == [1.0, 0.0, 0.0]
    assert _run("exact", batch, must_finish=False, wrong=-1.0).tolist() == [1.0, 1.0, -1.0]
    with pytest.raises(RewardError, match="no column 'answer'"):
        _run("exact", _batch(["1"], truth=["1"]))


def test_a_function_of_the_users_gets_columns_and_options(tmp_path: Path):
    target = _file(
        tmp_path / "mine.py",
        "from dataclasses import dataclass\n@dataclass\nclass Bonus:\n    size: float\n"
        "def score(batch, *, scale=1.0):\n"
        "    return [scale * len(r) + Bonus(d).size for r, d in zip(batch.responses, batch.columns['bonus'])]\n",
    )
    assert _run(f"{target}:score", _batch(["a", "bb"], bonus=[0.5, 0.25]), scale=2.0).tolist() == [2.5, 4.25]


@pytest.mark.parametrize(
    "signature",
    [
        "prompts, completions, **columns",
        "completions, answer, **rest",
        "responses, answer, scale=1.0",
        "prompts, responses, finished, answer",
    ],
)
def test_functions_written_for_other_libraries(tmp_path: Path, signature: str):
    answers = "columns['answer']" if "**columns" in signature else "answer"
    texts = "completions" if "completions" in signature else "responses"
    code = f"def score({signature}):\n    return [float(t == a) for t, a in zip({texts}, {answers})]\n"
    target = _file(tmp_path / "mine.py", code)
    batch = _batch(["4", "5"], answer=["4", "4"], source=["x", "y"])
    assert _run(f"{target}:score", batch).tolist() == [1.0, 0.0]
    given = "def all_of_it(completions, **kwargs): return [float(sorted(kwargs) == ['answer', 'prompts', 'source'])] * 2"
    assert _run(f"{_file(tmp_path / 'c.py', given)}:all_of_it", batch).tolist() == [1.0, 1.0]
    if "answer" in signature:
        with pytest.raises(RewardError, match=r"takes 'answer', which is neither a column of the data \(source\)"):
            _run(f"{target}:score", _batch(["4"], source=["x"]))
    with pytest.raises(UserError, match="takes no option 'typo'"):
        _run(f"{_file(tmp_path / 'b.py', 'def score(prompts): return [0.0]')}:score", batch, typo=1)


def test_a_reward_that_changes_its_input_changes_it_for_nobody_else(tmp_path: Path):
    code = (
        "def ranks(batch):\n    batch.responses.sort(); batch.finished[:] = False; batch.columns['tags'][0].append('seen')\n"
        "    return [float(len(batch.responses.pop())) for _ in batch.prompts]\n"
    )
    functions = (RewardFunction(function=f"{_file(tmp_path / 'mine.py', code)}:ranks"), RewardFunction(function="exact"))
    batch = _batch(["b", "aa"], answer=["b", "c"], tags=[[], []])
    _, parts = make_reward(Reward(functions=functions))(batch)
    assert parts["reward/ranks"].tolist() == [1.0, 2.0]
    assert parts["reward/exact"].tolist() == [1.0, 0.0]
    assert batch.responses == ["b", "aa"]
    assert batch.columns["tags"] == [[], []]


def test_several_rewards_with_weights_are_logged_apart(tmp_path: Path):
    target = _file(tmp_path / "mine.py", "def length(batch):\n    return [1.5] * len(batch.responses)\n")
    functions = (
        RewardFunction(function="length", weight=2.0, options={"maximum": 1, "per_unit": 0.5}),
        RewardFunction(function=f"{target}:length", weight=-1.0),
    )
    total, parts = make_reward(Reward(functions=functions))(_batch(["a b c", "a"]))
    assert {name: value.tolist() for name, value in parts.items()} == {
        "reward/length": [-1.0, 0.0],
        "reward/length_2": [1.5, 1.5],
    }
    assert total.tolist() == [-3.5, -1.5]
    assert total.dtype == np.float32
    assert make_reward(Reward())(_batch(["a"]))[0].tolist() == [0.0]
    score = RewardFunction(function=f"{_file(tmp_path / 'yours.py', 'def score(batch): return [1.0]')}:score")
    _, parts = make_reward(Reward(functions=(score,)))(_batch(["a"]))
    assert list(parts) == ["reward/score_2"]  # reward/score is the sum


@pytest.mark.parametrize(
    ("body", "pieces"),
    [
        ("return [1.0, float('nan'), 2.0]", ("sample 1 got nan", "'prompt 1'")),
        ("return [float('inf')] * 3", ("sample 0 got inf",)),
        ("return [1.0, 1e300, 0]", ("sample 1 got 1e+300",)),
        ("return [0, None, 1]", ("sample 1 got None",)),
        ("return [0, 1, '2']", ("sample 2 got '2'",)),
        ("return [0, 1, [2]]", ("sample 2 got list",)),
        ("return [0, 1]", ("returned 2 values for 3 samples",)),
        ("return None", ("returned None",)),
        ("return 3.0", ("returned float",)),
        ("return 'abc'", ("returned str",)),
        ("return {0: 1, 1: 2, 2: 3}", ("returned dict",)),
        ("return {1.0, 2.0, 3.0}", ("returned set",)),
        ("del batch.responses[1:]; return [5.0]", ("returned 1 values for 3 samples",)),
        (
            "return [1 / len(r) for r in batch.responses]",
            ("raised ZeroDivisionError", "mine.py:2", "sample 1, prompt 'prompt 1'"),
        ),
        ("raise KeyError('x')", ("raised KeyError", "sample 0")),
        ("import sys; sys.exit(0)", ("RuntimeError: raised SystemExit", "mine.py:2")),
        ("if len(batch.responses) > 1: raise RuntimeError('batch')", ("not on any one sample",)),
    ],
)
def test_what_is_no_reward_stops_the_run_and_is_never_zero(tmp_path: Path, body: str, pieces: tuple[str, ...]):
    target = _file(tmp_path / "mine.py", f"def score(batch):\n    {body}\n")
    with pytest.raises(RewardError) as caught:
        _run(f"{target}:score", _batch(["a", "", "c"]))
    assert all(piece in str(caught.value) for piece in pieces), str(caught.value)
    assert isinstance(caught.value, UserError)
    assert len(str(caught.value)) < 500


def test_a_reward_that_does_not_answer_is_left_behind(tmp_path: Path):
    target = _file(tmp_path / "mine.py", "import time\ndef score(batch):\n    time.sleep(3600)\n")
    begun = time.monotonic()
    with pytest.raises(RewardError, match=r"no answer for 1 samples within 0.2 s; raise reward.timeout_s"):
        _run(f"{target}:score", _batch(["a"]), timeout_s=0.2)
    assert time.monotonic() - begun < 10


def test_the_sample_to_blame_is_looked_for_no_longer_than_a_reward_may_take(tmp_path: Path):
    body = "if len(batch.responses) > 1: raise RuntimeError('batch')\n    time.sleep(3600)"
    target = _file(tmp_path / "mine.py", f"import time\ndef score(batch):\n    {body}\n")
    begun = time.monotonic()
    with pytest.raises(RewardError, match=r"raised RuntimeError: batch .*; on a batch of 100$"):
        _run(f"{target}:score", _batch(["a"] * 100), timeout_s=0.2)
    assert time.monotonic() - begun < 10


POOLS = """
import atexit, multiprocessing, sys, time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from rlhf_jax import cli
from rlhf_jax.errors import UserError
from rlhf_jax.rewards.call import call

def hang():
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(3600,)).start()
    list(ThreadPoolExecutor(2).map(time.sleep, [3600, 3600]))

def run(**options):
    sys.stdout.write("begun")
    raise UserError(f"late: {call(hang, timeout_s=0.5).late}")

atexit.register(print, ", ended")
sys.modules["rlhf_jax.quickstart"] = SimpleNamespace(run=run)
sys.argv = ["rlhf-jax", "quickstart"]
cli.main()
"""


def test_a_hung_reward_does_not_keep_the_process_alive():
    """Nor do its processes keep what the run printed into open. A command does at its end all that it always does."""
    run = subprocess.run([sys.executable, "-c", POOLS], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (run.returncode, run.stdout) == (2, "begun, ended\n")
    assert "rlhf-jax: late: True\n" in run.stderr


@pytest.mark.parametrize(
    ("content", "name", "pieces"),
    [
        (None, "score", ("no file",)),
        ("def score(batch:\n", "score", ("mine.py:1: not Python",)),
        ("x = 1\n\nraise ValueError('boom')\n", "score", ("does not run: ValueError: boom", "mine.py:3")),
        ("import no_such_module_here\n", "score", ("ModuleNotFoundError",)),
        ("def other(b): return []\ndef third(b): return []\n", "score", ("no function 'score'", "other, third")),
        ("score = 3\n", "score", ("is a int, not a function",)),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, content: str | None, name: str, pieces: tuple[str, ...]):
    path = tmp_path / "mine.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as caught:
        load_function(f"{path}:{name}")
    assert all(piece in str(caught.value) for piece in pieces), str(caught.value)


def test_only_an_explicit_path_is_run():
    with pytest.raises(UserError, match=r"neither a shipped reward nor path/to/file.py:function"):
        load_function("lenght")
    with pytest.raises(UserError, match="neither a shipped reward"):
        load_function("os.system:")
    with pytest.raises(UserError, match="shipped are exact, length, math_answer, regex, repetition"):
        make_reward(Reward(functions=(RewardFunction(function="lenght"),)))


@pytest.mark.parametrize(
    ("options", "piece"),
    [({"patern": "a"}, "takes no option 'patern'"), ({}, "needs the option 'pattern'")],
)
def test_options_are_checked_before_anything_runs(options: dict, piece: str):
    with pytest.raises(UserError, match=piece):
        make_reward(Reward(functions=(RewardFunction(function="regex", options=options),)))
    with pytest.raises(UserError, match="finite"):
        make_reward(Reward(functions=(RewardFunction(function="length", weight=float("nan")),)))


def test_checked_accepts_numbers_of_every_kind():
    values = [1, np.float32(2.5), np.int64(3), True]
    assert checked(values, 4, "x", ["p"] * 4).tolist() == [1.0, 2.5, 3.0, 1.0]
    assert checked(np.ones((2,), np.float16), 2, "x", ["p"] * 2).dtype == np.float32


def test_every_shipped_reward_takes_an_empty_batch():
    options = {"regex": {"pattern": "a"}}
    for name in REWARDS:
        assert _run(name, _batch([], answer=[]), **options.get(name, {})).shape == (0,)
