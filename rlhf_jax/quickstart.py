"""RLHF in miniature, in minutes, with nothing downloaded: fine-tuning, a reward model from pairs, PPO against it, a report.

The set-up of Gao, Schulman and Hilton 2022 (arXiv:2210.10760): a gold reward function, which training never sees, labels pairs
of sampled answers; a reward model learns from the labels; PPO optimises the reward model; gold is only logged. Without a KL
penalty the reward model is hacked before one's eyes (`--demo overoptimization`).
"""

import dataclasses
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax import config, generate, metrics, offline, online, parallel, report, rundir
from rlhf_jax.data.tasks import reviews
from rlhf_jax.errors import UserError

MODEL = config.Scratch(width=96, layers=2, heads=4, kv_heads=4, mlp_width=256, max_length=64)
RESPONSE = 24  # tokens
HELD_OUT = 256  # pairs that only measure a reward model
COLLECTED = (metrics.METRICS, metrics.SAMPLES)
STEPS = {"sft": 220, "reward": 100, "ppo": 24, "hacked": 40, "addition": 60}


def run(*, out: Path, demo: str | None, task: str, seed: int) -> str:
    """Run all stages below `out`; what is finished is not run again. Returns three numbers a policy and the next command.

    Errors: `UserError` for an `out` with a run of its own, another quickstart, or files that `collect` would write over.
    """
    require_ours(out, task, seed)
    if task == "addition":
        stages = run_addition(out, seed)
    elif demo == "overoptimization":
        stages = run_overoptimization(out, seed)
    else:
        stages = run_reviews(out, seed)
    collect(out, stages)
    return summary(out, [stage for stage in stages if stage.name.startswith("ppo")])


def require_ours(out: Path, task: str, seed: int) -> None:
    """The first stage's record tells whose the files in `out` are: `collect` writes them after all stages alone."""
    remedy = "Give another --out, or delete it"
    earlier = None if (out / "run.json").exists() else rundir.read_record(out / "sft") if (out / "sft").is_dir() else None
    if earlier is None:
        taken = [name for name in ("run.json", "final", *COLLECTED, "report.html") if (out / name).exists()]
        if taken:
            raise UserError(f"--out {out} holds {', '.join(taken)}, not from a quickstart. {remedy}.")
        return
    there = (earlier["config"].get("data", {}).get("task"), earlier["config"].get("seed"))
    if there != (task, seed):
        raise UserError(
            f"--out {out} holds another run: task {there[0]}, seed {there[1]} there; task {task}, seed {seed} here. {remedy}."
        )


def run_reviews(out: Path, seed: int) -> list[Path]:
    """Fine-tune, sample and label pairs, train a reward model, PPO."""
    tuned = fine_tune(out, "reviews", seed)
    scorer = train_scorer(out / "reward", tuned, out / "pairs.jsonl", 4096, seed)
    return [out / "sft", out / "reward", train_policy(out / "ppo", tuned, scorer, seed)]


def run_overoptimization(out: Path, seed: int) -> list[Path]:
    """PPO against one reward model, without a KL penalty and with one."""
    tuned = fine_tune(out, "reviews", seed)
    scorer = train_scorer(out / "reward-2048", tuned, out / "pairs-2048.jsonl", 2048, seed)
    runs = (("ppo-without-kl", 0.0), ("ppo-with-kl", 0.1))
    policies = [train_policy(out / name, tuned, scorer, seed, kl_coef=kl_coef, steps=STEPS["hacked"]) for name, kl_coef in runs]
    return [out / "sft", out / "reward-2048", *policies]


def run_addition(out: Path, seed: int) -> list[Path]:
    """Fine-tune on sums of which half are wrong, then PPO on a reward that is checked."""
    tuned = fine_tune(out, "addition", seed)
    data = config.Data(task="addition", max_prompt_tokens=8)
    settings = policy_settings(out / "ppo", tuned, seed, data=data, response=5, steps=STEPS["addition"])
    return [out / "sft", online.run("ppo", settings)]


def batch(least: int) -> int:
    """The next multiple of the devices: whatever their number, they share a batch evenly."""
    return least + -least % jax.device_count()


def mesh() -> config.Mesh:
    return parallel.spread(MODEL.width, jax.device_count())


def fine_tune(out: Path, task: Any, seed: int) -> Path:
    settings = config.SFTRun(
        out=str(out / "sft"),
        seed=seed,
        steps=STEPS["sft"],
        batch_size=batch(64),
        mesh=mesh(),
        model=config.Model(scratch=MODEL),
        data=config.Data(task=task, max_tokens=40, eval_fraction=0.03),
        optimizer=config.Optimizer(learning_rate=3e-3, beta2=0.99, eps=1e-8, warmup_steps=10),
        save=config.Save(every=0),
        log=config.Log(eval_every=STEPS["sft"] // 2),
    )
    return offline.run("sft", settings) / "final"


def train_scorer(out: Path, tuned: Path, pairs: Path, count: int, seed: int) -> Path:
    """A reward model from `count` training pairs (and HELD_OUT more that only measure it)."""
    if not pairs.is_file():
        write_pairs(pairs, tuned, count + HELD_OUT, seed)
    settings = config.RewardRun(
        out=str(out),
        seed=seed,
        steps=STEPS["reward"],
        batch_size=batch(96),
        mesh=mesh(),
        model=config.Model(path=str(tuned)),
        data=config.Data(path=str(pairs), max_tokens=40, eval_fraction=HELD_OUT / (count + HELD_OUT)),
        optimizer=config.Optimizer(learning_rate=6e-4, beta2=0.99, eps=1e-8, warmup_steps=10),
        reward_model=config.RewardModelLoss(centering_coef=0.01),
        save=config.Save(every=0),
        log=config.Log(eval_every=STEPS["reward"] // 2),
    )
    return offline.run("reward", settings) / "final"


def write_pairs(path: Path, tuned: Path, count: int, seed: int) -> None:
    """Two answers of the fine-tuned model to each prompt, ordered by a noisy annotator who knows the gold reward."""
    prompts = [row["prompt"] for row in reviews.prompts(seed + 1, count)]
    model = generate.open_model(tuned)
    ids = [model.tokenizer.encode(prompt, start=True) for prompt in prompts]
    settings = config.Sampling(max_new_tokens=RESPONSE)
    answers = list(generate.answer(model, [*ids, *ids], settings, seed=seed, batch_size=256))
    first, second = answers[:count], answers[count:]
    gold = [reviews.gold(prompts, [a.text for a in side], [a.finished for a in side]) for side in (first, second)]
    wins = reviews.label_pairs(gold[0], gold[1], np.random.default_rng((seed, 5)))
    rows = []
    for prompt, a, b, better in zip(prompts, first, second, wins, strict=True):
        chosen, rejected = (a, b) if better else (b, a)
        row = {"prompt": prompt, "chosen": chosen.text, "rejected": rejected.text}
        rows.append(row | {"chosen_finished": chosen.finished, "rejected_finished": rejected.finished})
    metrics.write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def policy_settings(
    out: Path,
    tuned: Path,
    seed: int,
    *,
    data: config.Data,
    response: int,
    steps: int,
    kl_coef: float = 0.1,
    scorer: Path | None = None,
) -> config.PPORun:
    optimizer = config.Optimizer(learning_rate=3e-4, schedule="constant", beta2=0.99, eps=1e-8)
    return config.PPORun(
        out=str(out),
        seed=seed,
        steps=steps,
        batch_size=2 * batch(64),
        mesh=mesh(),
        model=config.Model(path=str(tuned)),
        data=data,
        reward=config.Reward(model=None if scorer is None else str(scorer)),
        sampling=config.Sampling(max_new_tokens=response),
        ppo=config.PPO(epochs=4, minibatches=2, kl_coef=kl_coef),
        actor_optimizer=optimizer,
        critic_optimizer=dataclasses.replace(optimizer, learning_rate=1e-3),
        save=config.Save(every=0),
        log=config.Log(eval_every=8),
    )


def train_policy(out: Path, tuned: Path, scorer: Path, seed: int, *, kl_coef: float = 0.1, steps: int | None = None) -> Path:
    data = config.Data(task="reviews", max_prompt_tokens=8)
    settings = policy_settings(
        out, tuned, seed, data=data, response=RESPONSE, steps=steps or STEPS["ppo"], kl_coef=kl_coef, scorer=scorer
    )
    return online.run("ppo", settings)


def collect(out: Path, stages: list[Path]) -> None:
    """The files of all stages side by side: metrics.jsonl, samples.jsonl, the last model, one report."""
    for name in COLLECTED:
        rows = [line for stage in stages if (stage / name).is_file() for line in (stage / name).read_text().splitlines()]
        metrics.write_atomic(out / name, "".join(line + "\n" for line in rows))
    if (out / "final").exists():
        shutil.rmtree(out / "final")
    shutil.copytree(stages[-1] / "final", out / "final")
    report.write_report(stages, out / "report.html")


def summary(out: Path, policies: list[Path]) -> str:
    """Three numbers a policy, and what to try next."""
    lines = []
    for policy in policies:
        lines += ["", *([policy.name] if len(policies) > 1 else []), *numbers(policy)]
    name, other = ("addition", "--task addition") if len(policies) > 1 else ("hacked", "--demo overoptimization")
    following = f"next    rlhf-jax quickstart {other} --out {shlex.quote(str(out.with_name(f'{out.name}-{name}')))}"
    return "\n".join([*lines, f"report  {out / 'report.html'}", f"model   {out / 'final'}", following])


def numbers(policy: Path) -> list[str]:
    """What the first and the last evaluation of a policy found."""
    rows = [row for row in metrics.read_rows(policy / metrics.METRICS) if "eval/score" in row]
    first, last = rows[0], rows[-1]
    kl = f"KL to the fine-tuned model {last['eval/kl_per_sequence_nats']:.1f} nats per answer"
    if "eval/gold" in first:
        top = max(rows, key=lambda row: row["eval/gold"])
        return [
            f"gold reward   {first['eval/gold']:6.2f} -> {last['eval/gold']:.2f}   "
            f"(never seen in training; highest {top['eval/gold']:.2f} at step {top['step']})",
            f"proxy reward  {first['eval/score']:6.2f} -> {last['eval/score']:.2f}   (what PPO maximised)",
            kl,
        ]
    return [
        f"right answers {first['eval/score']:6.0%} -> {last['eval/score']:.0%}",
        f"answers ended {first['eval/eos_rate']:6.0%} -> {last['eval/eos_rate']:.0%}",
        kl,
    ]
