"""All algorithms on the same sums from the same start at equal compute, with error bars over seeds.

    python scripts/compare_algorithms.py --out runs/compare --seeds 5 --passes 600

fine-tunes once on the `addition` task (half of whose answers are wrong), then trains with every algorithm until the model has
made `passes` passes over a batch of answers (generation 1, forward 1, backward 2; docs/algorithms.md). Sampling, checking the
answers and updating are one pure function, so that a run is one program and its seeds a `vmap`. Prints and writes a Markdown
table of the share of right answers to 1,000 sums that this training has not seen; mean and standard error over seeds.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import build, config, metrics, offline, parallel, programs, sampling, scoring
from rlhf_jax.algorithms import ALGORITHMS, OFFLINE, training
from rlhf_jax.data.tasks import addition
from rlhf_jax.types import Frozen, Model, Moments, Preferences, Prompts, Rollout, RunState, Sequences, TrainState

Learn = Callable[[jax.Array], Any]  # key -> trained parameters
ANSWER = 5  # R, tokens
HELD_OUT = 1000
CASES: list[tuple[str, str, Any, float]] = [  # row of the table, stage, settings, passes of one step over an answer
    ("PPO", "ppo", config.PPO(epochs=1, kl_coef=0.01), 10),
    ("PPO, 4 epochs", "ppo", config.PPO(kl_coef=0.01), 28),
    ("GRPO", "grpo", config.GRPO(), 6),
    ("Dr.GRPO", "grpo", config.GRPO(advantage_scale="none", aggregation="sequence_mean_token_sum_norm", kl_coef=0.0), 5),
    ("DAPO", "grpo", config.GRPO(aggregation="token_mean", clip_high=0.28, drop_uninformative=True, kl_coef=0.0), 5),
    ("GSPO", "gspo", config.GSPO(), 5),
    ("RLOO", "rloo", config.RLOO(kl_coef=0.01), 6),
    ("REINFORCE++", "reinforce_pp", config.ReinforcePP(kl_coef=0.01), 6),
    ("REINFORCE++, group baseline", "reinforce_pp", config.ReinforcePP(baseline="group", group_size=4, kl_coef=0.01), 6),
    ("ReMax", "remax", config.ReMax(kl_coef=0.01), 7),
    ("DPO", "dpo", config.DPO(), 4),
    ("IPO", "dpo", config.DPO(loss="ipo"), 4),
    ("KTO", "kto", config.KTO(), 6),
]


class Sums:
    """All sums of two summands below 100 as tokens; the last `HELD_OUT` of a random order are for evaluation."""

    def __init__(self, seed: int) -> None:
        tokenizer = addition.tokenizer()
        order = np.random.default_rng(seed).permutation(10**4)
        texts = [(f"{n // 100}+{n % 100}=", str(n // 100 + n % 100)) for n in order]
        self.eos, self.pad = tokenizer.eos_id, tokenizer.pad_id
        prompts = [tokenizer.encode(prompt, start=True) for prompt, _ in texts]
        answers = [[*tokenizer.encode(answer), self.eos] for _, answer in texts]
        self.width = max(map(len, prompts))
        self.prompts = jnp.asarray([[self.pad] * (self.width - len(ids)) + ids for ids in prompts], jnp.int32)
        self.answers = jnp.asarray([ids + [self.pad] * (ANSWER - len(ids)) for ids in answers], jnp.int32)

    def draw(self, key: jax.Array, count: int) -> Prompts:
        return self.rows(jax.random.randint(key, (count,), 0, len(self.prompts) - HELD_OUT))

    def rows(self, index: jax.Array) -> Prompts:
        tokens = self.prompts[index]
        return Prompts(tokens=tokens, mask=tokens != self.pad, index=index.astype(jnp.int32))

    def right(self, rollout: Rollout) -> jax.Array:
        """1 for the right sum, ended: f32[B]."""
        answer = jnp.where(rollout.action_mask, rollout.tokens[:, -ANSWER:], self.pad)
        return (jnp.all(answer == self.answers[rollout.index], 1) & rollout.finished).astype(jnp.float32)

    def pairs(self, key: jax.Array, count: int) -> Preferences:
        """Right answers, and the same with one digit replaced."""
        index, place, digit = (jax.random.fold_in(key, i) for i in range(3))
        index = jax.random.randint(index, (count,), 0, len(self.prompts) - HELD_OUT)
        prompt, chosen = self.prompts[index], self.answers[index]
        zero = addition.tokenizer().encode("0")[0]
        place = jax.random.randint(place, (count, 1), 0, 60) % jnp.sum((chosen != self.pad) & (chosen != self.eos), 1)[:, None]
        other = zero + (chosen - zero + jax.random.randint(digit, (count, 1), 1, 10)) % 10
        rejected = jnp.where(jnp.arange(ANSWER) == place, other, chosen)
        return Preferences(chosen=self._sequences(prompt, chosen), rejected=self._sequences(prompt, rejected))

    def _sequences(self, prompt: jax.Array, answer: jax.Array) -> Sequences:
        tokens = jnp.concatenate([prompt, answer], 1)
        mask = tokens != self.pad
        return Sequences(tokens=tokens, mask=mask, target_mask=mask & (jnp.arange(tokens.shape[1]) >= self.width)[None])


def online(
    case: tuple[str, str, Any, float], sums: Sums, model: Model, start: Any, critic: Any, args: argparse.Namespace
) -> Learn:
    """key -> trained params: the loop of `online.py` as one pure function."""
    _, stage, settings, cost = case
    algorithm = ALGORITHMS[stage](settings)
    critic = critic if "critic" in algorithm.needs else None
    stop = {"stop_ids": (sums.eos,), "pad_id": sums.pad}
    sample = sampling.make_sampler(model, config.Sampling(max_new_tokens=ANSWER), samples=algorithm.group_size, **stop)
    greedy = sampling.make_sampler(model, config.Sampling(max_new_tokens=ANSWER, temperature=0.0), **stop)
    judge = scoring.make_scorer(model, None if critic is None else model, needs=algorithm.needs)
    txs = (optax.adam(args.learning_rate, b2=0.99), optax.adam(3 * args.learning_rate, b2=0.99))
    update = algorithm.make_update(
        scoring.make_policy_apply(model), None if critic is None else scoring.make_value_apply(model), *txs
    )
    frozen, zero = Frozen(reference=start), jnp.float32(0.0)

    def step(state: RunState, key: jax.Array) -> tuple[RunState, None]:
        prompts = sums.draw(key, args.batch_size // algorithm.group_size)
        rollout = sample(state.actor.params, prompts, key)
        scored = judge(state.actor.params, None if state.critic is None else state.critic.params, frozen, rollout)
        if "greedy" in algorithm.needs:
            scored = scored.replace(greedy_score=sums.right(greedy(state.actor.params, prompts, key)))
        experience, _ = algorithm.make_experience(rollout, sums.right(rollout), scored, state.kl_coef)
        return update(state, experience, key, frozen)[0], None

    def learn(key: jax.Array) -> Any:
        state = RunState(
            step=jnp.int32(0),
            cursor=jnp.int32(0),
            actor=programs.init_train_state(txs[0], start),
            critic=None if critic is None else programs.init_train_state(txs[1], critic),
            ema=None,
            kl_coef=jnp.float32(settings.kl_coef),
            scores=Moments(count=zero, mean=zero, m2=zero),
            best=zero,
            bad_steps=jnp.int32(0),
            alarms=jnp.zeros(programs.ALARMS, jnp.int32),
        )
        return jax.lax.scan(step, state, jax.random.split(key, int(args.passes / cost)))[0].actor.params

    return learn


def from_pairs(case: tuple[str, str, Any, float], sums: Sums, model: Model, start: Any, args: argparse.Namespace) -> Learn:
    """key -> trained params, for the offline algorithms; half as many pairs a batch, so that answers are as many."""
    _, stage, settings, cost = case
    algorithm, tx = OFFLINE[stage](settings), optax.adam(args.learning_rate, b2=0.99)
    inner = scoring.make_sequence_apply(model)

    def apply(params: Any, frozen: Frozen, batch: Sequences) -> jax.Array:
        return inner(params, frozen.actor, batch)

    loss, prepare = (functools.partial(f, apply) for f in (algorithm.loss, algorithm.prepare))
    update = training.make_offline_update(loss, algorithm.denominators, tx, prepare=prepare)

    def step(state: TrainState, key: jax.Array) -> tuple[TrainState, None]:
        return update(state, sums.pairs(key, args.batch_size // 2), Frozen(reference=start))[0], None

    def learn(key: jax.Array) -> Any:
        state = programs.init_train_state(tx, start)
        return jax.lax.scan(step, state, jax.random.split(key, int(args.passes / cost)))[0].params

    return learn


def accuracy(sums: Sums, model: Model) -> Callable[[Any, jax.Array], jax.Array]:
    sample = sampling.make_sampler(model, config.Sampling(max_new_tokens=ANSWER), stop_ids=(sums.eos,), pad_id=sums.pad)
    prompts = sums.rows(jnp.arange(len(sums.prompts) - HELD_OUT, len(sums.prompts)))
    return lambda params, key: sums.right(sample(params, prompts, key)).mean()


def fine_tune(args: argparse.Namespace) -> Path:
    settings = config.SFTRun(
        out=str(Path(args.out) / "sft"),
        steps=args.tuning_steps,
        batch_size=128,
        model=config.Model(scratch=config.Scratch(width=args.width, layers=2, mlp_width=256, max_length=64)),
        data=config.Data(task="addition", max_tokens=16),
        optimizer=config.Optimizer(learning_rate=3e-3, beta2=0.99, eps=1e-8, warmup_steps=20),
        save=config.Save(every=0),
    )
    return offline.run("sft", settings) / "final"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/compare")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--passes", type=float, default=600)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--tuning-steps", type=int, default=1500)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--only", nargs="*", help="rows of the table")
    args = parser.parse_args()
    path = str(fine_tune(args))
    mesh = parallel.make_mesh(config.Mesh())
    load = functools.partial(
        build.load, config.Model(path=path), mesh, key=jax.random.key(0), real_vocab=addition.tokenizer().vocab_size, path=path
    )
    actor, critic = load(head="lm"), load(head="value", zero_head=True)
    sums, model = Sums(seed=0), actor.model
    measure = accuracy(sums, model)
    keys = jax.random.split(jax.random.key(1), args.seeds)
    before = float(jax.jit(measure)(actor.params, keys[0]))
    rows = {"fine-tuned start": {"accuracy": before, "error": 0.0, "steps": 0, "seconds": 0.0}}
    for case in CASES:
        name, stage, _, cost = case
        if args.only and name not in args.only:
            continue
        if stage in OFFLINE:
            learn = from_pairs(case, sums, model, actor.params, args)
        else:
            learn = online(case, sums, model, actor.params, critic.params, args)
        run = jax.jit(jax.vmap(lambda key, learn=learn: measure(learn(key), jax.random.fold_in(key, 1)))).lower(keys).compile()
        began = time.perf_counter()
        found = np.asarray(run(keys))
        seconds, error = (time.perf_counter() - began) / args.seeds, found.std(ddof=min(1, args.seeds - 1)) / args.seeds**0.5
        rows[name] = {
            "accuracy": float(found.mean()),
            "error": float(error),
            "steps": int(args.passes / cost),
            "seconds": seconds,
        }
        print(name, rows[name], flush=True)
    lines = ["| algorithm | steps | right answers | seconds per seed |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {row['steps']} | {row['accuracy']:.1%} ± {row['error']:.1%} | {row['seconds']:.0f} |"
        for name, row in rows.items()
    ]
    print("\n".join(lines))
    metrics.write_atomic(Path(args.out) / "table.md", "\n".join(lines) + "\n")
    metrics.write_atomic(Path(args.out) / "table.json", json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
