"""`rlhf-jax data`: what it says, and that it needs no JAX."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax.config import OFFLINE, STAGES, Data, GRPORun, Model, PPORun, RewardRun, Run, Sampling, Scratch, SFTRun
from rlhf_jax.data.corpus import run_tokenizer
from rlhf_jax.data.validate import histogram, validate
from rlhf_jax.errors import UserError

HERE = Path(__file__).parent
MODEL = Model(scratch=Scratch(vocabulary=300))


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"question {n} \x1b[31m", "chosen": f" yes {n}", "rejected": f" no {n}"} for n in range(40)]
    rows.append(rows[0] | {"rejected": " yes 0"})
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_report_of_pairs(pairs: str):
    report = validate(RewardRun(model=MODEL, data=Data(path=pairs), batch_size=8))
    (record,) = report.rows
    assert record["counts"] == {"rows": 41, "dropped: chosen equals rejected": 1, "kept": 40}
    assert record["train"] + record["eval"] == 40
    assert record["columns"] == {"prompt": "str", "chosen": "str", "rejected": "str"}
    for piece in (
        "41 rows read",
        "1 dropped: chosen equals rejected",
        f"{pairs}:1",
        "chosen: <bos>question 0",
        "⟦ yes 0<eos>⟧",
        "█",
    ):
        assert piece in report.text, report.text
    assert "\x1b" not in report.text
    json.dumps(report.rows)


def test_report_of_fine_tuning_and_prompts(pairs: str):
    sft = validate(SFTRun(model=MODEL, data=Data(path=pairs), batch_size=8))
    assert "with data.packing=true" in sft.text
    ppo = validate(PPORun(model=MODEL, data=Data(path=pairs), ptx_data=Data(task="reviews"), batch_size=8))
    assert [record["stage"] for record in ppo.rows] == ["prompts", "sft"]
    with pytest.raises(UserError, match="cannot be checked"):
        validate(Run(model=MODEL, data=Data(path=pairs)))


def test_fewer_rows_than_a_batch_are_told_as_the_stage_tells_them(pairs: str):
    data = Data(path=pairs, eval_fraction=0.0)
    for cls, rows in ((RewardRun, "40 pairs"), (PPORun, "41 prompts")):
        with pytest.raises(UserError, match=rf"{pairs}: {rows} for training, fewer than batch_size = 64 .*set batch_size to at"):
            validate(cls(model=MODEL, data=data, batch_size=64))
    assert validate(GRPORun(model=MODEL, data=data, batch_size=64)).rows[0]["steps_per_epoch"] == 5.1  # of 8 groups
    with pytest.raises(UserError, match=r"\d packed rows for training, fewer than batch_size = 40 "):
        validate(SFTRun(model=MODEL, data=Data(path=pairs, eval_fraction=0.0, packing=True), batch_size=40))


def test_what_widths_of_prompts_leave_of_padding_and_cost_in_programs(tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "ab " * (1 + n % 30)}) for n in range(90)))
    data = Data(path=str(path), max_prompt_tokens=96, length_buckets=2)
    told = validate(PPORun(model=MODEL, data=data, sampling=Sampling(max_new_tokens=24), batch_size=8))
    rows = told.rows[0]["padding_buckets"]
    assert [(len(row["widths"]), row["programs"], row["chosen"]) for row in rows][:2] == [(1, 4, False), (2, 7, True)]
    assert [row["prompts"] for row in rows] == sorted((row["prompts"] for row in rows), reverse=True)
    assert all(row["with_answers"] < row["prompts"] for row in rows)
    assert f" 2: {rows[1]['prompts']:>6.1%}, {rows[1]['with_answers']:>6.1%},  7 programs; " in told.text
    assert told.text.count("(this run)") == 1


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_can_be_checked_and_is_read_as_it_will_train(pairs: str, stage: str):
    purpose = "sft" if stage == "sft" else "preferences" if stage in OFFLINE else "prompts"  # as `build.tokenizer_for` does
    report = validate(STAGES[stage](model=MODEL, data=Data(path=pairs), batch_size=8))
    assert [record["stage"] for record in report.rows] == [purpose]


def test_validation_imports_no_jax(pairs: str):
    code = (
        "import sys; from rlhf_jax.config import *; from rlhf_jax.data.validate import validate; "
        "validate(SFTRun(model=Model(scratch=Scratch(vocabulary=300)), data=Data(path=sys.argv[1]), batch_size=8)); "
        "print('jax' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code, pairs], capture_output=True, text=True, check=True, cwd=HERE.parents[1])
    assert run.stdout.strip() == "False"


def test_histogram():
    lines = histogram(np.asarray([1, 1, 1, 2, 99]))
    assert len(lines) == 10
    assert lines[0].split()[-1] == "4"
    assert lines[-1].split()[-1] == "1"
    assert histogram(np.asarray([3]))[-1].split()[-1] == "1"


def test_the_tokenizer_of_a_run(pairs: str, tmp_path: Path):
    data = Data(path=pairs)
    trained = run_tokenizer(MODEL, data, "preferences", out_dir=tmp_path / "tokenizer")
    assert trained.vocab_size <= 300
    again = run_tokenizer(Model(path="nowhere", tokenizer=str(tmp_path / "tokenizer")), data, "preferences")
    assert again.hash == trained.hash
    assert run_tokenizer(Model(), Data(task="addition"), "sft").vocab_size == 16
    with pytest.raises(UserError, match=r"model.path .*model.scratch"):
        run_tokenizer(Model(), data, "sft")
