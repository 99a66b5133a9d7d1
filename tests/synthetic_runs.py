"""Runs that never ran: directories with the files of each stage, for the tests of the report. Shapes follow Gao et al. 2022."""

import json
import math
import random
from pathlib import Path
from typing import Any

NASTY = "<script>document.title='pwned'</script><img src=x onerror=alert(1)>"
PLACES = ("hotel", "phone", "café", "film", "train", "laptop", "garden", "museum")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _finish(
    path: Path, stage: str, rows: list[dict], samples: list[dict], phases: list[tuple[str, float, int]], **extra: Any
) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    write_jsonl(path / "metrics.jsonl", rows)
    if samples:
        write_jsonl(path / "samples.jsonl", samples)
    listed = [
        {"name": name, "wall_s": wall, "calls": calls, "peak_rss_mb": 600 + 90 * i}
        for i, (name, wall, calls) in enumerate(phases)
    ]
    steps = rows[-1]["step"] if rows else 0
    summary = {"stage": stage, "status": "finished", "step": steps, "total_steps": steps, "phases": listed, "peak_rss_mb": 1340.5}
    summary |= {"wall_s": sum(wall for _, wall, _ in phases) * 1.03, "peak_device_mb": None} | extra
    (path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return path


def sft(path: Path, *, steps: int = 220, seed: int = 0) -> Path:
    rng = random.Random(seed)  # noqa: S311
    rows = []
    for step in range(1, steps + 1):
        loss = 1.1 + 2.9 * math.exp(-step / 30) + rng.gauss(0, 0.05)
        row = {
            "stage": "sft",
            "step": step,
            "time_s": 0.18 * step,
            "sft/loss_nats": loss,
            "sft/accuracy": 0.62 - 0.5 * math.exp(-step / 35),
        }
        if step % 20 == 0 or step == 1:
            row["sft/eval_loss_nats"] = loss + 0.06
        rows.append(
            row
            | {
                "time/step_s": 0.18 + rng.random() * 0.02,
                "throughput/tokens_per_s": 21_000 + rng.random() * 900,
                "memory/peak_mb": 700.0,
            }
        )
    (path).mkdir(parents=True, exist_ok=True)
    (path / "config.resolved.yaml").write_text(
        f"seed: {seed}\nsteps: {steps}\noptimizer:\n  learning_rate: 0.003\n", encoding="utf-8"
    )
    return _finish(
        path, "sft", rows, [], [("load data", 1.1, 1), ("compile", 5.2, 2), ("train", 34.0, steps), ("export", 0.8, 1)]
    )


def reward(path: Path, *, steps: int = 120, seed: int = 0, accuracy: float = 0.64) -> Path:
    rng = random.Random(seed)  # noqa: S311
    rows = []
    for step in range(1, steps + 1):
        train = accuracy + 0.12 - 0.22 * math.exp(-step / 40) + rng.gauss(0, 0.03)
        row = {
            "stage": "reward",
            "step": step,
            "time_s": 0.3 * step,
            "reward_model/loss": 0.52 + 0.17 * math.exp(-step / 40),
            "reward_model/accuracy": train,
        }
        if step % 10 == 0 or step == 1:
            row["reward_model/eval_accuracy"] = accuracy - 0.12 * math.exp(-step / 30)
        rows.append(row | {"time/step_s": 0.3, "memory/peak_mb": 900.0})
    bins = [
        {
            "predicted": 0.05 + 0.1 * i,
            "observed": min(max(0.12 + 0.078 * i + rng.gauss(0, 0.02), 0), 1),
            "count": 14 + (i * 37) % 90,
        }
        for i in range(10)
    ]
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.resolved.yaml").write_text(
        f"seed: {seed}\nsteps: {steps}\nreward_model:\n  loss: bradley_terry\n", encoding="utf-8"
    )
    return _finish(
        path, "reward", rows, [], [("compile", 7.0, 2), ("train", 52.0, steps), ("calibrate", 1.4, 1)], calibration=bins
    )


def ppo(
    path: Path,
    *,
    steps: int = 30,
    seed: int = 0,
    hacked: bool = False,
    gold: bool = True,
    nasty: bool = False,
    kl_coef: float = 0.05,
) -> Path:
    rng = random.Random(seed)  # noqa: S311
    rows = []
    for step in range(1, steps + 1):
        kl = 17 * (step / steps) ** 2 * (3 if hacked else 0.45)
        d = math.sqrt(kl)
        worth = 0.35 + d * (1.20 - 0.62 * math.log(d + 1e-6)) * (1 if hacked else 0.62) + rng.gauss(0, 0.05)
        row: dict[str, Any] = {
            "stage": "ppo",
            "step": step,
            "time_s": 3.1 * step,
            "reward/score": -0.3 + 1.15 * d + rng.gauss(0, 0.06),
        }
        row |= {"reward/gold": worth} if gold else {}
        row |= {"reward/" + 12 * "name": worth} if nasty else {}
        row |= {
            "kl/per_sequence_nats": kl,
            "kl/per_token_nats": kl / 18,
            "kl/coef": kl_coef,
            "policy/approx_kl_nats": 0.012 + rng.random() * 0.006,
            "policy/clip_fraction": 0.11 + rng.random() * 0.05,
            "value/clip_fraction": 0.02 + rng.random() * 0.02,
            "policy/ratio_mean": 1 + rng.gauss(0, 0.002),
            "policy/ratio_max": 1.5 + rng.random(),
            "policy/entropy_nats": 1.6 - 0.9 * step / steps,
            "value/loss": 0.6 * math.exp(-step / 9) + 0.08,
            "value/explained_variance": 0.7 - 0.9 * math.exp(-step / 6),
            "response/length_tokens": 15 + 4 * step / steps + rng.random(),
            "response/eos_rate": 0.93 + 0.06 * step / steps,
            "time/rollout_s": 1.1 + rng.random() * 0.1,
            "time/score_s": 0.5,
            "time/update_s": 1.4,
            "time/step_s": 3.1,
            "throughput/tokens_per_s": 900 + rng.random() * 90,
            "memory/peak_mb": 1340.0,
            "rollout/logprob_mismatch_max_nats": 2e-6 + rng.random() * 1e-6,
        }
        rows.append(row)
    samples = []
    for step in (0, steps // 2, steps):
        for index in range(12):
            place = PLACES[index % len(PLACES)]
            hated, hacks = "hated the case . it was really stale", "it was not lovely . it was not superb"
            mood = hated if step == 0 else hacks if hacked else "liked the pool . the staff was lovely"
            good = -1.2 + 3.5 * step / steps
            samples.append(
                {
                    "stage": "ppo",
                    "step": step,
                    "index": index,
                    "prompt": f"the {place} :",
                    "response": f"i {mood} ." + (NASTY if nasty else ""),
                    "score": good + rng.gauss(0, 0.3),
                    "gold": (-good if hacked else good) + rng.gauss(0, 0.2) if gold else None,
                    "kl_nats": 7.4 * step / steps,
                    "length_tokens": 14,
                    "finished": index % 5 != 3 or step > 0,
                }
            )
    path.mkdir(parents=True, exist_ok=True)
    config = (
        f"# resolved\nseed: {seed}\nsteps: {steps}\nreward:\n  url: http://user:hunter2@example.com/score\n"
        f"ppo:\n  kl_coef: {kl_coef}\n  epochs: 4\n"
    )
    (path / "config.resolved.yaml").write_text(config + (f"note: {NASTY!r}\n" if nasty else ""), encoding="utf-8")
    phases = [
        ("load models", 2.1, 1),
        ("compile sampler", 8.2, 1),
        ("compile update", 11.9, 1),
        ("rollout", 33.0, steps),
        ("score", 15.0, steps),
    ]
    return _finish(path, "ppo", rows, samples, [*phases, ("update", 42.0, steps), ("evaluate", 6.0, 3)])


def quickstart(root: Path, **options: Any) -> list[Path]:
    """The three directories that the quickstart leaves."""
    return [sft(root / "sft"), reward(root / "reward"), ppo(root / "ppo", **options)]
