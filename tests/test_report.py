"""The report: whatever the run left, one inert page; and what it says is what the files say."""

import itertools
import json
import math
import os
import random
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path

import headless
import pytest
import synthetic_runs as runs

from rlhf_jax.errors import UserError
from rlhf_jax.metrics import Recorder
from rlhf_jax.report import check_run_dirs, write_report
from rlhf_jax.report.curves import PathPoint, gao_fit, peak, reward_path, steadied
from rlhf_jax.report.data import load_runs, text
from rlhf_jax.report.plots import Line, line_chart
from rlhf_jax.report.scales import number, smooth, spread, thin, tick_labels, ticks
from rlhf_jax.session import Session

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Refuses what is not balanced, what could run, what would be fetched; collects what is read."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.idents: list[str] = []
        self.references: list[str] = []
        self.words: list[str] = []
        self.tags: list[str] = []
        self.policy = ""
        self.feed(source)
        self.close()
        assert self.open == []
        assert len(set(self.idents)) == len(self.idents)
        assert set(self.references) <= set(self.idents)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        assert tag not in {"script", "iframe", "object", "embed", "img", "form", "base"}
        assert not [name for name in found if name.startswith("on") or name == "style"]
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert found.get(name, "data:,") == "data:,"
        self.idents += [found.get("id") or ""] if "id" in found else []
        self.references += (found.get("aria-labelledby") or "").split()
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"]
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def prose(self) -> str:
        return " ".join(" ".join(self.words).split())


def report(paths: list[Path], out: Path) -> Page:
    write_report(paths, out / "report.html")
    source = (out / "report.html").read_text(encoding="utf-8")
    assert "NaN" not in source
    assert not re.search(r"\b(nan|inf|None|undefined)\b", re.sub(r"<style>.*?</style>", "", source, flags=re.S))
    return Page(source)


# Whole runs.


def test_the_quickstart_shows_everything_it_promises(tmp_path):
    page = report(runs.quickstart(tmp_path / "quickstart"), tmp_path)
    for heading in (
        *("quickstart", "Gold against proxy reward", "Before and after", "Supervised fine-tuning", "Reward model", "PPO"),
        *("How far to trust the reward model", "Time and memory", "Configuration"),
    ):
        assert heading in page.prose
    assert "√KL to the reference, √nats" in page.prose
    assert "i hated the case" in page.prose
    assert "liked the pool" in page.prose
    assert "before training" in page.prose
    assert "after 30 steps" in page.prose
    assert "learning_rate: 0.003" in page.prose
    assert "compile update" in page.prose
    assert page.tags.count("svg") > 25


def test_the_numbers_are_those_of_the_files(tmp_path):
    path = runs.ppo(tmp_path / "ppo", steps=10)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    page = report([path], tmp_path)
    first, last = rows[0]["reward/gold"], rows[-1]["reward/gold"]
    assert f"Gold reward {number(last)} +{number(last - first)} from {number(first)}" in page.prose
    assert f"KL to the reference {number(rows[-1]['kl/per_sequence_nats'])} nats per sequence" in page.prose


def test_numbers_of_the_summary_are_shown_once(tmp_path):
    path = runs.reward(tmp_path / "reward", steps=20)
    summary = json.loads((path / "summary.json").read_text())
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    accuracy = rows[-1]["reward_model/eval_accuracy"]
    numbers = {"accuracy on held-out pairs": accuracy, "calibration error": 0.0815}
    (path / "summary.json").write_text(json.dumps(summary | {"numbers": numbers}))
    page = report([path], tmp_path)
    assert f"Reward model {accuracy:.0%} right on held-out pairs" in page.prose
    assert "accuracy on held-out pairs" not in page.prose
    assert "calibration error 0.081" in page.prose or "calibration error 0.082" in page.prose


def test_a_noisy_distance_does_not_fold_the_curve():
    def back(values: list[float]) -> float:
        return sum(max(0.0, a - b) for a, b in itertools.pairwise(values))

    kl = [0.0, 1.0, 2.0, 3.0, 5.2, 5.0, 5.3, 5.1, 6.0, 5.9, 6.2, 7.0]
    steady = steadied([PathPoint(i, d, d, d) for i, d in enumerate(kl)])
    distances = [p.distance for p in steady]
    assert back(distances) < 0.2 * back(kl)
    assert (distances[0], distances[-1]) == (0.0, 7.0)
    assert [p.gold for p in steady] == kl


def test_the_distance_is_averaged_over_a_fifth_of_the_path_in_no_time():
    rng = random.Random(0)  # noqa: S311
    distances = [rng.random() for _ in range(20_000)]
    path = [PathPoint(i, d, d, d) for i, d in enumerate(distances)]
    began = time.process_time()
    steady = steadied(path)
    assert time.process_time() - began < 0.5
    assert steady[0].distance == distances[0]
    assert steady[1000].distance == pytest.approx(sum(distances[:2001]) / 2001)
    assert steady[10_000].distance == pytest.approx(sum(distances[8000:12_001]) / 4001)


def test_pointing_at_the_reward_path_tells_the_kl_of_the_step_and_not_the_average_that_it_is_placed_at(tmp_path):
    path = runs.ppo(tmp_path / "ppo", steps=30)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    page = report([path], tmp_path)
    for row in rows:
        assert f"step {row['step']}, KL {number(row['kl/per_sequence_nats'])} nats · proxy" in page.prose
    assert "Steps stand at their √KL averaged over neighbouring steps" in page.prose


def test_hacking_is_called_by_its_name(tmp_path):
    weak = runs.ppo(tmp_path / "weak" / "ppo", hacked=True, steps=90, kl_coef=0.0)
    strong = runs.ppo(tmp_path / "strong" / "ppo", steps=90, seed=1)
    page = report([weak, strong], tmp_path)
    assert "weak and strong" in page.prose
    assert re.search(r"Over-optimisation, gold falling while the proxy rises, in weak \(peak 1\.\d+ at step \d+\)\.", page.prose)
    alone = report([weak], tmp_path)
    assert re.search(r"Gold peaked at step \d+ \(1\.\d+\), then fell while the proxy rose: over-optimisation\.", alone.prose)
    assert "In no run did gold fall" in report([strong, runs.ppo(tmp_path / "other" / "ppo", seed=2)], tmp_path).prose
    assert "PPO: what differs Key weak strong" in page.prose
    assert re.search(r"ppo\.kl_coef 0\.0 0\.05", page.prose)
    assert "ppo.epochs 4 4" not in page.prose
    assert "weak, after 90 steps" in page.prose


def test_a_directory_of_stages_stands_for_them(tmp_path):
    runs.quickstart(tmp_path / "quickstart")
    found = load_runs([tmp_path / "quickstart"])
    assert [run.stage for run in found] == ["sft", "reward", "ppo"]
    assert {run.label for run in found} == {"quickstart"}
    both = load_runs([tmp_path / "quickstart", tmp_path / "quickstart" / "ppo"])
    assert len(both) == 3


def test_labels_are_what_tells_paths_apart(tmp_path):
    for name in ("a/seed0/out/ppo", "a/seed1/out/ppo", "b/seed0/out/ppo"):
        runs.ppo(tmp_path / name, steps=2)
    paths = [tmp_path / name for name in ("a/seed0/out/ppo", "a/seed1/out/ppo")]
    assert [run.label for run in load_runs(paths)] == ["seed0", "seed1"]
    paths.append(tmp_path / "b/seed0/out/ppo")
    labels = [run.label for run in load_runs(paths)]
    assert len(set(labels)) == 3
    assert [run.tone for run in load_runs(paths)] == [0, 1, 2]


def as_stage(path, stage):
    """The same run as if another algorithm had made it."""
    for name in ("metrics.jsonl", "samples.jsonl", "summary.json"):
        file = path / name
        file.write_text(file.read_text(encoding="utf-8").replace('"stage": "ppo"', f'"stage": "{stage}"'), encoding="utf-8")
    return path


def test_algorithms_in_one_directory_are_told_apart_by_their_names(tmp_path):
    runs.sft(tmp_path / "a" / "sft", steps=4)
    for stage in ("ppo", "grpo", "rloo"):
        as_stage(runs.ppo(tmp_path / "a" / stage, steps=4), stage)
    found = load_runs([tmp_path / "a"])
    assert [(run.stage, run.label) for run in found] == [(stage, stage) for stage in ("sft", "ppo", "grpo", "rloo")]
    assert len({run.tone for run in found}) == 4
    write_report([tmp_path / "a"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(f"<tr><td>{stage}</td>" in page for stage in ("ppo", "grpo", "rloo"))
    as_stage(runs.ppo(tmp_path / "b" / "grpo", steps=4), "grpo")
    labels = [run.label for run in load_runs([tmp_path / "a", tmp_path / "b"])]
    assert labels == ["a", "a ppo", "a grpo", "a rloo", "b"]


def test_long_labels_lose_what_they_share(tmp_path):
    paths = [runs.ppo(tmp_path / f"a-long-name-kl-0.{i}-seed-{i}-final", steps=2) for i in range(2)]
    assert [run.label for run in load_runs(paths)] == ["0.0-seed-0", "0.1-seed-1"]
    odd = [runs.ppo(tmp_path / name, steps=2) for name in ("the-same-long-beginning", "the-same-long-beginning-b")]
    assert len({run.label for run in load_runs(odd)}) == 2
    near = [runs.ppo(tmp_path / name, steps=2) for name in ("the-same-long-beginning-x_", "the-same-long-beginning-x-")]
    assert len({run.label for run in load_runs(near)}) == 2


# Runs with holes.


def test_fine_tuning_alone(tmp_path):
    page = report([runs.sft(tmp_path / "sft", steps=3)], tmp_path)
    assert "Supervised fine-tuning" in page.prose
    assert "Gold" not in page.prose


def test_a_run_without_gold_still_shows_reward_against_distance(tmp_path):
    page = report([runs.ppo(tmp_path / "ppo", gold=False)], tmp_path)
    assert "Reward against KL" in page.prose
    assert "gold" not in page.prose.lower().replace("gold against", "")


@pytest.mark.parametrize("missing", ["metrics.jsonl", "samples.jsonl", "summary.json", "config.resolved.yaml"])
def test_any_file_may_be_missing(tmp_path, missing):
    paths = runs.quickstart(tmp_path / "quickstart")
    for path in paths:
        (path / missing).unlink(missing_ok=True)
    assert "PPO" in report(paths, tmp_path).prose


def test_a_run_that_has_just_begun(tmp_path):
    for name in ("sft", "reward"):
        (tmp_path / name).mkdir()
    (tmp_path / "sft" / "metrics.jsonl").touch()
    page = report([tmp_path / "sft", tmp_path / "reward", tmp_path / "ppo"], tmp_path)
    assert "Supervised fine-tuning · running · step 0" in page.prose
    shutil.rmtree(tmp_path / "sft")
    assert "Nothing is recorded yet." in report([tmp_path / "reward"], tmp_path).prose


def test_no_directory_at_all_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no run directory among .*nowhere"):
        write_report([tmp_path / "nowhere"], tmp_path / "report.html")
    with pytest.raises(UserError, match="nowhere: no such directory"):
        check_run_dirs([tmp_path, tmp_path / "nowhere"][1:])
    with pytest.raises(UserError, match=r"no metrics\.jsonl in it or one level below"):
        check_run_dirs([tmp_path])
    runs.sft(tmp_path / "a" / "sft", steps=1)
    check_run_dirs([tmp_path / "a", tmp_path / "a" / "sft"])


def test_metrics_that_are_not_finite_are_named(tmp_path):
    path = tmp_path / "ppo"
    path.mkdir()
    row = {"stage": "ppo", "step": 4, "reward/score": None, "not_finite": ["reward/score"]}
    rows = [{"stage": "ppo", "step": 3, "reward/score": 1.0}, row, row | {"step": 5, "alarms": ["KL above 100 nats"]}]
    runs.write_jsonl(path / "metrics.jsonl", rows)
    page = report([path], tmp_path)
    assert "reward/score was not finite at 2 steps from step 4 on." in page.prose
    assert "PPO, step 5 : KL above 100 nats" in page.prose
    assert "Reward 1 0 from 1, until step 3" in page.prose, "beside a figure that is not of the run's end"
    shutil.copytree(path, tmp_path / "b" / "ppo")
    runs.write_jsonl(tmp_path / "b/ppo/metrics.jsonl", [row, {"stage": "ppo", "step": 5, "reward/score": 2.0}])
    both = report([path, tmp_path / "b"], tmp_path).prose
    assert "1 → 1, until step 3" in both
    assert "2 → 2," not in both


def test_a_stage_and_metrics_nobody_foresaw_are_drawn(tmp_path):
    path = tmp_path / "dpo"
    path.mkdir()
    rows = [{"stage": "dpo", "step": step, "dpo/loss_nats": 0.7 - 0.01 * step, "dpo/margin": step} for step in range(1, 9)]
    runs.write_jsonl(path / "metrics.jsonl", rows)
    page = report([path], tmp_path)
    assert "DPO" in page.prose
    assert "dpo/loss_nats nats" in page.prose
    assert "dpo/margin" in page.prose


def test_junk_in_every_file_breaks_nothing(tmp_path):
    junk = [
        None,
        True,
        -1,
        1e300,
        -1e300,
        5e-324,
        "x",
        "<b>",
        [],
        {},
        [1],
        {"a": 1},
        float("nan"),
        float("inf"),
        "\ud800\x00\u202e",
    ]
    rng = random.Random(0)  # noqa: S311
    keys = [
        "stage",
        "step",
        "reward/score",
        "reward/gold",
        "kl/per_sequence_nats",
        "policy/ratio_max",
        "a/b",
        "not_finite",
        "alarms",
    ]
    words = ["stage", "step", "index", "prompt", "response", "score", "gold", "kl_nats", "length_tokens", "finished"]
    about = ["stage", "status", "step", "total_steps", "wall_s", "phases", "peak_rss_mb", "calibration", "numbers"]
    path = tmp_path / "run"
    path.mkdir()
    for turn in range(60):
        rows = [{key: rng.choice([*junk, step, 0.5]) for key in rng.sample(keys, 6)} | {"step": step} for step in range(12)]
        rows = [row | ({"stage": "ppo"} if turn % 3 else {}) for row in rows]
        runs.write_jsonl(path / "metrics.jsonl", rows)
        runs.write_jsonl(path / "samples.jsonl", [{key: rng.choice(junk) for key in rng.sample(words, 7)} for _ in range(9)])
        listed = [
            [{"name": rng.choice(junk), "wall_s": rng.choice(junk), "predicted": 0.5, "observed": rng.choice(junk), "count": 3}]
        ]
        summary = {key: rng.choice([*junk, *listed]) for key in about} | ({"stage": "ppo"} if turn % 3 else {})
        (path / "summary.json").write_text(json.dumps(summary))
        (path / "config.resolved.yaml").write_text(rng.choice(["a: [", "- 1", "x: <script>", ": :", "\t"]))
        write_report([path], tmp_path / "report.html")
        Page((tmp_path / "report.html").read_text(encoding="utf-8"))


# Inert.


def test_what_models_write_is_inert(tmp_path):
    path = runs.ppo(tmp_path / "<img src=x onerror=alert(1)>" / "ppo", nasty=True)
    page = report([path], tmp_path)
    assert runs.NASTY in page.prose  # shown to the reader, letter by letter
    source = (tmp_path / "report.html").read_text()
    assert "<script" not in source.lower()
    assert "<img" not in source
    assert "default-src 'none'" in page.policy
    assert "script-src" not in page.policy
    assert "unsafe-inline" not in page.policy
    assert "hunter2" not in source
    twin = runs.ppo(tmp_path / "<b>twin" / "ppo", nasty=True)
    (twin / "summary.json").write_text(json.dumps({"stage": "ppo", "status": runs.NASTY, "numbers": {runs.NASTY: runs.NASTY}}))
    for found in ([twin], [path, twin]):
        assert runs.NASTY in report(found, tmp_path).prose


def test_text_shows_what_would_act_in_silence():
    assert text("a\x00b\x1b[31m\u202ec\ud800\x7f") == "a␀b␛[31m�c?␡"
    assert text("é 漢 🙂 \t\n") == "é 漢 🙂 \t\n"
    assert text("&<>\"'") == "&amp;&lt;&gt;&quot;&#x27;"
    assert "900 more characters" in text("x" * 1000, 100)


def test_secrets_in_a_configuration_stay_out(tmp_path):
    path = runs.sft(tmp_path / "sft", steps=1)
    config = "reward:\n  url: https://me:pa55@host/score\nhub_token: abc123\napi_key: 'k3y'\nsampling:\n  max_new_tokens: 64\n"
    (path / "config.resolved.yaml").write_text(config)
    page = report([path], tmp_path)
    for secret in ("pa55", "abc123", "k3y"):
        assert secret not in page.prose
    assert "max_new_tokens: 64" in page.prose


# Safe to redraw while the run goes on.


def test_a_thousand_rows_take_less_than_a_third_of_a_second(tmp_path):
    path = runs.ppo(tmp_path / "ppo", steps=1000)
    took = []
    for _ in range(3):
        began = time.process_time()
        write_report([path], tmp_path / "report.html")
        took.append(time.process_time() - began)
    assert min(took) < 0.3
    assert (tmp_path / "report.html").stat().st_size < 1_000_000


def test_a_page_that_has_cost_a_twentieth_of_the_time_is_not_redrawn_until_more_has_passed(tmp_path, monkeypatch):
    drawn: list[int] = []
    monkeypatch.setattr(Session, "show", lambda session: (drawn.append(1), time.sleep(0.02)))
    with Recorder(tmp_path, "ppo", total_steps=9, console=False, process=0) as recorder:
        session = Session(*[None] * 3, recorder, *[None] * 3, False)
        for elapsed_s, drawings in ((0.1, 1), (0.2, 1), (0.3, 1), (100.0, 2), (100.1, 3)):
            monkeypatch.setattr(recorder, "elapsed_s", lambda now=elapsed_s: now)
            session.redraw()
            assert len(drawn) == drawings
    assert [(phase["name"], phase["calls"]) for phase in recorder.summary()["phases"]] == [("report", 3)]


def test_a_report_is_replaced_whole(tmp_path, monkeypatch):
    path = runs.sft(tmp_path / "sft", steps=2)
    write_report([path], tmp_path / "report.html")
    before = (tmp_path / "report.html").read_text()
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"report\.html: cannot be written \(No space left on device\)"):
        write_report([path], tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == before
    assert [found.name for found in tmp_path.iterdir() if "partial" in found.name] == []


# Arithmetic of the drawings.


def test_ticks_are_round_and_inside():
    rng = random.Random(1)  # noqa: S311
    for _ in range(300):
        low = rng.uniform(-1, 1) * 10 ** rng.uniform(-6, 6)
        high = low + 10 ** rng.uniform(-6, 6)
        found = ticks(low, high, 4)
        assert 1 <= len(found) <= 12
        assert all(low - 1e-6 * (high - low) <= value <= high + 1e-6 * (high - low) for value in found)
        assert len(set(tick_labels(found))) == len(found) or high - low < 1e-3 * abs(low)
    assert tick_labels(ticks(0, 1)) == ["0.00", "0.25", "0.50", "0.75", "1.00"]
    assert ticks(1, 3, 4, whole=True) == [1.0, 2.0, 3.0]


def test_numbers_for_people():
    given = (0, -0.3, 1.0, 2.8712, 49.31, 1340.0, 12_345, 4.2e6, 0.0213, 2e-6, None, math.nan)
    assert [number(value) for value in given] == [
        "0",
        "−0.30",
        "1",
        "2.87",
        "49.3",
        "1340",
        "12.3k",
        "4.2M",
        "0.021",
        "2.0e−6",
        "–",
        "–",
    ]


def test_thinning_keeps_every_spike_and_both_ends():
    points = [(float(i), 0.0) for i in range(5000)]
    points[1234], points[4321] = (1234.0, 50.0), (4321.0, -50.0)
    kept = thin(points)
    assert len(kept) <= 300
    assert {points[0], points[1234], points[4321], points[-1]} <= set(kept)
    assert kept == sorted(kept)


def test_smoothing_keeps_a_constant_and_the_mean():
    assert smooth([(i, 2.5) for i in range(100)]) == [(i, 2.5) for i in range(100)]
    rng = random.Random(2)  # noqa: S311
    noisy = [(i, rng.gauss(0, 1)) for i in range(400)]
    assert max(abs(y) for _, y in smooth(noisy)[20:-20]) < 0.8


@pytest.mark.parametrize("wanted", [[50, 50, 51, 90, 200], [20, 20, 22], [200, 199, 200, 120], [100]])
def test_labels_never_lie_on_each_other(wanted):
    placed = spread(wanted, 13.5, 20, 200)
    gaps = [b - a for a, b in zip(sorted(placed), sorted(placed)[1:], strict=False)]
    assert min(gaps, default=99) >= 13.49
    assert min(placed) >= 20
    assert max(placed) <= 200


@pytest.mark.parametrize("points", [[(1.0, 2.0)], [(1.0, 2.0), (2.0, 2.0)], [(3.0, -1e-9), (3.0, 1e9)], [(0.0, 0.0), (1.0, 0.0)]])
def test_flat_and_single_curves_are_drawn(points):
    drawn = line_chart([Line("a", points)], ident="x", title="t", x_label="step")
    numbers = [float(found) for found in re.findall(r"[MLV ](-?\d+\.\d)", drawn)]
    assert all(-1 <= value <= 400 for value in numbers)


def test_lines_differ_without_colour():
    lines = [Line(f"run{i}", [(0.0, float(i)), (1.0, float(i))], tone=i, mark=i) for i in range(4)]
    drawn = line_chart(lines, ident="x", title="t", x_label="step")
    assert len(set(re.findall(r'class="line t\d"( stroke-dasharray="[^"]+")? d', drawn))) == 4
    assert all(f">run{i} {i}</text>" in drawn for i in range(4))


def contrast(a: str, b: str) -> float:
    """Contrast of two colours, as WCAG 2.2 defines it."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_every_text_can_be_read_in_both_schemes():
    style = (Path(runs.__file__).parents[1] / "rlhf_jax" / "report" / "style.css").read_text()
    schemes = re.findall(r":root \{(.*?)\}", style, flags=re.S)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--([\w]+): (#[0-9a-f]{6})", scheme))
        for name in ("ink", "soft", *(f"t{i}" for i in range(8))):
            for ground in ("paper", "wash"):
                assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)


def test_the_fit_of_gao_recovers_its_own_law():
    d = [0.1 + 0.1 * i for i in range(60)]
    path = [PathPoint(i, x, x, 0.3 + x * (1.2 - 0.62 * math.log(x))) for i, x in enumerate(d)]
    found = gao_fit(path)
    assert found is not None
    (g, alpha, beta), r2 = found
    assert (g, alpha, beta, r2) == pytest.approx((0.3, 1.2, 0.62, 1.0), abs=1e-9)
    assert gao_fit(path[:5]) is None
    assert peak(path[:40]) is None  # past the peak, but a quarter of the gain is not lost yet
    top = peak(path)
    assert top is not None
    assert top.distance == pytest.approx(math.exp(1.2 / 0.62 - 1), abs=0.1)


def test_gold_of_the_evaluations_serves_where_the_metrics_have_none(tmp_path):
    path = runs.ppo(tmp_path / "ppo", gold=True, steps=10)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    runs.write_jsonl(path / "metrics.jsonl", [{k: v for k, v in row.items() if k != "reward/gold"} for row in rows])
    (run,) = load_runs([path])
    found = reward_path(run)
    assert [point.step for point in found] == [0, 5, 10]
    assert found[-1].distance == pytest.approx(math.sqrt(7.4))
    assert found[-1].gold == pytest.approx(2.3, abs=0.3)


# In a browser.


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    if headless.chromium() is None:
        if os.environ.get("RLHF_JAX_NO_CHROMIUM") == "1":
            pytest.skip("RLHF_JAX_NO_CHROMIUM=1: the report is not looked at in a browser")
        pytest.fail("Chromium is missing: apt-get install chromium, or set RLHF_JAX_NO_CHROMIUM=1 to go without these tests")
    root = tmp_path_factory.mktemp("drawn")
    write_report(runs.quickstart(root / "quickstart", nasty=True), root / "report.html")
    return root / "report.html"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [380, 1280], ids=["phone", "desktop"])
def test_it_looks_right_in_a_browser(drawn, width, dark):
    with headless.opened(drawn, width=width, height=1000 if width < 500 else 640, dark=dark) as page:
        wide = page.evaluate("document.documentElement.scrollWidth")
        title = page.evaluate("document.title")
        smallest = page.evaluate(
            "Math.min(...[...document.querySelectorAll('svg.chart')].filter(s => s.getClientRects().length)"
            ".map(s => s.getBoundingClientRect().width / s.viewBox.baseVal.width)) * 12"
        )
        picture = page.screenshot(full=False)
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        overflowing = []
        for across in (width, 320, 704, 800):
            page.call("Emulation.setDeviceMetricsOverride", width=across, height=900, deviceScaleFactor=1, mobile=False)
            overflowing += [across] if page.evaluate("document.documentElement.scrollWidth") > across else []
        faults, requests = page.faults(), page.requests()
    assert wide <= width
    assert overflowing == []
    assert title == "quickstart – rlhf_jax"  # no script of a sample changed it
    assert faults == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert smallest >= 9.5, "letters in the charts are too small to read"
    across, channels, rows = headless.png_rows(picture)
    assert across == width
    pixels = [row[i : i + 3] for row in rows[::3] for i in range(0, len(row), 3 * channels)]
    ground = max(set(pixels), key=pixels.count)
    assert (sum(ground) < 150) == dark
    assert len(set(pixels)) > 50
    assert 0.03 < 1 - pixels.count(ground) / len(pixels) < 0.6
    blues = [p for p in pixels if p[2] > p[0] + 40]
    assert len(blues) > 20, "the curve of the proxy is not drawn"


def test_many_runs_with_long_names_fit_a_phone(drawn, tmp_path):
    paths = [path for i in range(5) for path in runs.quickstart(tmp_path / f"{'w' * 40}{i}", seed=i, hacked=i % 2 == 0)]
    write_report(paths, tmp_path / "report.html")
    with headless.opened(tmp_path / "report.html", width=380, height=900) as page:
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        wide = page.evaluate("document.documentElement.scrollWidth")
        narrowest = page.evaluate("Math.min(...[...document.querySelectorAll('td:first-child')].map(c => c.clientWidth))")
    assert wide <= 380
    assert narrowest > 80


def test_a_chart_is_read_by_pointing_at_it(drawn):
    with headless.opened(drawn, width=1280, height=900) as page:
        place = page.evaluate(
            "(() => { const r = document.querySelectorAll('.hero .wide-only .hit')[9].getBoundingClientRect();"
            " return [r.x + r.width / 2, r.y + r.height / 2] })()"
        )
        visible = (
            "[...document.querySelectorAll('.show')]"
            ".filter(g => getComputedStyle(g).visibility === 'visible').map(g => g.textContent)"
        )
        before = page.evaluate(visible)
        page.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
        after = page.evaluate(visible)
    assert before == []
    assert len(after) == 1
    assert re.fullmatch(r"step \d+, KL [\d.]+ nats · proxy −?[\d.]+ · gold −?[\d.]+", after[0])
