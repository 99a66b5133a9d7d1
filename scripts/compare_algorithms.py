"""All algorithms on the same task from the same start at equal compute, with error bars over seeds made by one `vmap`.

    python scripts/compare_algorithms.py --task addition --out runs/compare          minutes an algorithm on 2 cores
    python scripts/compare_algorithms.py --task addition --out runs/compare --only PPO GRPO
    python scripts/compare_algorithms.py --task reviews --out runs/compare --seeds 3
    python scripts/compare_algorithms.py --table --out runs/compare                   the table of what is there

Settings are those of the run files in configs/, the start is that of sft_TASK.yaml. Compute is counted in passes of the model
over an answer (generation 1, forward 1, backward 2; docs/algorithms.md), and every algorithm gets as many steps as the budget
pays for. Sampling, scoring and updating are one pure function, so that a run is one program and its seeds a `vmap`. Sums are
checked; reviews are scored by a reward model trained on the task's pairs, and measured by the gold reward that no training sees.
Offline algorithms learn from the pairs. What a reward model costs is not counted. Each row is a file OUT/TASK/NAME.json: the
score of answers to prompts that training does not see, of every seed.
"""

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_jax import environment

environment.prepare()  # before JAX is imported

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import build, config, config_file, metrics, offline, parallel, programs, sampling, scoring
from rlhf_jax.algorithms import ALGORITHMS, OFFLINE, training
from rlhf_jax.data.batches import make_preference_data, make_prompt_data
from rlhf_jax.data.tasks import TASKS, reviews
from rlhf_jax.types import Frozen, Model, Preferences, Prompts, Rollout, RunState, TrainState

CONFIGS = Path(__file__).parent.parent / "configs"
HELD_OUT = 1024  # answers that measure a policy
SCORER_STEPS = 100  # of the reward model
BUDGET = {"addition": 100_000, "reviews": 30_000}  # passes over an answer; an answer of reviews is four times as long
CASES = {  # row of the table -> (run file, changes to it)
    "PPO": ("ppo_addition", ()),
    "PPO, 4 epochs": ("ppo_addition", ("ppo.epochs=4",)),
    "GRPO": ("grpo_addition", ()),
    "Dr.GRPO": ("dr_grpo_addition", ()),
    "DAPO": ("dapo_addition", ()),
    "GSPO": ("gspo_addition", ()),
    "RLOO": ("rloo_addition", ()),
    "REINFORCE++": ("reinforce_pp_addition", ()),
    "REINFORCE++, group baseline": ("reinforce_pp_addition", ("reinforce_pp.baseline=group", "reinforce_pp.group_size=4")),
    "ReMax": ("remax_addition", ()),
    "DPO": ("dpo_reviews", ()),
    "IPO": ("ipo_reviews", ()),
    "KTO": ("kto_reviews", ()),
}


class Task(NamedTuple):
    """A task as arrays, so that a whole run is one program. Rows of the data are numbered from 0 to N - 1."""

    prompts: jax.Array  # i32[N, P], left-padded
    train: jax.Array  # i32[·], rows for training
    held_out: jax.Array  # i32[HELD_OUT], rows for measuring
    length: int  # R
    score: Callable[[Rollout], jax.Array]  # f32[B], reward units
    pairs: Preferences  # of training prompts
    eos: int
    pad: int

    def ask(self, rows: jax.Array) -> Prompts:
        """Prompts numbered by their place, so that a row drawn twice is answered twice."""
        tokens = self.prompts[rows]
        return Prompts(tokens=tokens, mask=tokens != self.pad, index=jnp.arange(len(rows), dtype=jnp.int32))


def load_task(started: config.SFTRun) -> Task:
    """The task of a fine-tuning run, with the same prompts held out."""
    name: Any = started.data.task
    tokenizer = TASKS[name].tokenizer()
    settings = dataclasses.replace(started.data, max_prompt_tokens=8)
    data = make_prompt_data(settings, tokenizer, seed=0, batch_size=1)
    pairs = make_preference_data(settings, tokenizer, seed=0, batch_size=1).tables.tables[0].train
    pairs = make_preference_data(settings, tokenizer, seed=0, batch_size=len(pairs)).batch(0)  # an epoch: all of them
    every, held_out = np.arange(len(data.tables.tables[0].numbers)), data.tables.eval_index()
    prompts = jnp.asarray(data.prompts(every).tokens)
    length = {"addition": 6, "reviews": reviews.RESPONSE_TOKENS}[name]
    if name == "addition":
        texts = [str(answer) for answer in data.columns(every)["answer"]]
        answers = np.full((len(texts), length), tokenizer.pad_id)
        for row, text in enumerate(texts):
            ids = [*tokenizer.encode(text), tokenizer.eos_id]
            answers[row, : len(ids)] = ids
        score = functools.partial(right_sum, jnp.asarray(answers), tokenizer.pad_id)
    else:
        score = functools.partial(gold, prompts)
    return Task(
        prompts=prompts,
        train=jnp.asarray(np.setdiff1d(every, held_out)),
        held_out=jnp.asarray(np.resize(held_out, HELD_OUT)),
        length=length,
        score=score,
        pairs=jax.tree.map(jnp.asarray, pairs),
        eos=tokenizer.eos_id,
        pad=tokenizer.pad_id,
    )


def right_sum(answers: jax.Array, pad: int, rollout: Rollout) -> jax.Array:
    """1 for the right sum, ended: f32[B]. The same as the task's reward function, on tokens."""
    given = jnp.where(rollout.action_mask, rollout.tokens[:, -answers.shape[1] :], pad)
    return (jnp.all(given == answers[rollout.index], 1) & rollout.finished).astype(jnp.float32)


def gold(prompts: jax.Array, rollout: Rollout) -> jax.Array:
    """`reviews.gold` on tokens (one a word), f32[B]."""
    number = {word: i for i, word in enumerate(reviews.WORDS)}
    size = len(reviews.WORDS)

    def table(words: Any, value: float = 1.0) -> np.ndarray:
        return np.bincount([number[word] for word in words], minlength=size).astype(np.float32) * value

    nouns = np.stack([table(reviews.NOUNS[topic]) for topic in reviews.TOPICS])  # f32[topics, V]
    feeling = jnp.asarray(table((*reviews.GOOD, *reviews.LIKED)) - table((*reviews.BAD, *reviews.HATED)))
    eos = number["<eos>"]
    said = rollout.action_mask & (rollout.tokens[:, -rollout.action_mask.shape[1] :] != eos)
    words = jnp.where(said, rollout.tokens[:, -said.shape[1] :], 0)
    one_hot = jax.nn.one_hot(words, size) * said[..., None]
    value = feeling[words] * said
    negated = jnp.pad(words[:, :-1] == number["not"], ((0, 0), (1, 0)))
    seen = (jnp.cumsum(one_hot, 1) - one_hot)[jnp.arange(len(words))[:, None], jnp.arange(words.shape[1])[None], words] > 0
    sentiment = jnp.where(value == 0, 0.0, jnp.where(seen, -0.25, jnp.where(negated, -value, value))).sum(1)
    asked = jax.nn.one_hot(prompts[rollout.index], size).max(1)  # f32[B, V]
    own = asked @ jnp.asarray(np.stack([table([topic]) for topic in reviews.TOPICS]).T) @ jnp.asarray(nouns)
    counts = one_hot.sum(1)
    on, off = ((counts > 0) * own).sum(1), (counts * (jnp.asarray(nouns.sum(0))[None] - own)).sum(1)
    same = (words[:, 1:] == words[:, :-1]) & said[:, 1:]
    again = (words[:, 3:] == words[:, :-3]) & said[:, 3:]
    triples = again[:, :-2] & again[:, 1:-1] & again[:, 2:]
    return (
        3.0 * jnp.tanh(sentiment / 3.0)
        + 0.5 * jnp.minimum(on, 3)
        - 0.5 * off
        - 0.7 * (same.sum(1) + triples.sum(1))
        - jnp.where(rollout.finished, 0.0, 1.5)
        - 0.1 * jnp.maximum(0, said.sum(1) - 16)
    )


def train_scorer(out: Path, tuned: str, mesh: Any) -> Callable[[Rollout], jax.Array]:
    """A reward model from the pairs of reviews: rollout -> f32[B], reward units."""
    run = config.RewardRun(
        out=str(out),
        steps=SCORER_STEPS,
        batch_size=96,
        model=config.Model(path=tuned),
        data=config.Data(task="reviews", max_tokens=40),
        optimizer=config.Optimizer(learning_rate=6e-4, beta2=0.99, eps=1e-8, warmup_steps=10),
        reward_model=config.RewardModelLoss(centering_coef=0.01),
        save=config.Save(every=0),
    )
    path = str(offline.run("reward", run) / "final")
    vocabulary = TASKS["reviews"].tokenizer().vocab_size
    scorer = build.load(config.Model(path=path), mesh, head="score", key=None, real_vocab=vocabulary, path=path)
    return functools.partial(scoring.make_reward_scorer(scorer.model, scorer.calibration), scorer.params)


def passes_per_answer(stage: str, settings: Any) -> int:
    """Passes of the model over an answer that a step makes of each of its answers: the page's table, and generation."""
    if stage == "dpo":
        return 3 + 1
    if stage == "kto":
        return 3 + 1 + 2
    needs = ALGORITHMS[stage](settings).needs
    models = 1 + ("critic" in needs)
    scoring_passes = ("entropy" in needs) + ("critic" in needs) + ("reference" in needs)
    return 1 + ("greedy" in needs) + scoring_passes + 3 * models * settings.epochs


def online(
    stage: str, run: Any, steps: int, task: Task, model: Model, start: Any, critic: Any, reward: Callable[[Rollout], jax.Array]
) -> Callable[[jax.Array], Any]:
    """key -> trained params: the loop of `online.py` as one pure function."""
    settings = getattr(run, stage)
    algorithm = ALGORITHMS[stage](settings)
    critic = critic if "critic" in algorithm.needs else None
    stop = {"stop_ids": (task.eos,), "pad_id": task.pad}
    sample = sampling.make_sampler(model, config.Sampling(max_new_tokens=task.length), samples=algorithm.group_size, **stop)
    greedy = sampling.make_sampler(model, config.Sampling(max_new_tokens=task.length, temperature=0.0), **stop)
    judge = scoring.make_scorer(model, None if critic is None else model, needs=algorithm.needs)
    optimizers = (run.actor_optimizer, getattr(run, "critic_optimizer", run.actor_optimizer))
    actor_tx, critic_tx = (training.make_optimizer(each, steps * settings.epochs * settings.minibatches) for each in optimizers)
    value = None if critic is None else scoring.make_value_apply(model)
    update = algorithm.make_update(scoring.make_policy_apply(model), value, actor_tx, critic_tx)
    frozen = Frozen(reference=start)
    count = run.batch_size // algorithm.group_size

    def step(state: RunState, key: jax.Array) -> tuple[RunState, None]:
        rows = jax.random.choice(jax.random.fold_in(key, 1), task.train, (count,))
        prompts, params = task.ask(rows), state.actor.params
        rollout = sample(params, prompts, key).replace(index=jnp.repeat(rows, algorithm.group_size))
        scored = judge(params, None if state.critic is None else state.critic.params, frozen, rollout)
        if "greedy" in algorithm.needs:
            scored = scored.replace(greedy_score=reward(greedy(params, prompts, key).replace(index=rows)))
        experience, _ = algorithm.make_experience(rollout, reward(rollout), scored, state.kl_coef)
        return update(state, experience, key, frozen)[0], None

    def learn(key: jax.Array) -> Any:
        state = programs.init_run_state(actor_tx, critic_tx, start, critic, settings.kl_coef)
        return jax.lax.scan(step, state, jax.random.split(key, steps))[0].actor.params

    return learn


def from_pairs(stage: str, run: Any, steps: int, task: Task, model: Model, start: Any) -> Callable[[jax.Array], Any]:
    """key -> trained params, for the offline algorithms."""
    algorithm, tx = OFFLINE[stage](getattr(run, stage)), training.make_optimizer(run.optimizer, steps)
    inner = scoring.make_sequence_apply(model)
    loss, prepare = (
        functools.partial(f, lambda params, frozen, batch: inner(params, frozen.actor, batch))
        for f in (algorithm.loss, algorithm.prepare)
    )
    update = training.make_offline_update(loss, algorithm.denominators, tx, prepare=prepare)
    count = task.pairs.chosen.tokens.shape[0]

    def step(state: TrainState, key: jax.Array) -> tuple[TrainState, None]:
        rows = jax.random.randint(key, (run.batch_size,), 0, count)
        return update(state, jax.tree.map(lambda x: x[rows], task.pairs), Frozen(reference=start))[0], None

    def learn(key: jax.Array) -> Any:
        return jax.lax.scan(step, programs.init_train_state(tx, start), jax.random.split(key, steps))[0].params

    return learn


def measure(task: Task, model: Model) -> Callable[[Any, jax.Array], jax.Array]:
    """(params, key) -> mean score of answers to the held-out prompts, sampled at temperature 1."""
    settings = config.Sampling(max_new_tokens=task.length)
    sample = sampling.make_sampler(model, settings, stop_ids=(task.eos,), pad_id=task.pad)
    prompts = task.ask(task.held_out)
    return lambda params, key: task.score(sample(params, prompts, key).replace(index=task.held_out)).mean()


def of_seeds(score: Any, learn: Any, start: Any, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Score of the start, f32[], and of what is learnt from every key, f32[seeds]."""
    return score(start, keys[0]), jax.vmap(lambda key: score(learn(key), jax.random.fold_in(key, 1)))(keys)


def smaller(task: str, stage: str) -> tuple[str, ...]:
    """Changes to a run file: reviews have fewer answers a step, so that their smaller budget pays for enough steps."""
    return ("batch_size=128",) if task == "reviews" and stage not in OFFLINE else ()


def compare(args: argparse.Namespace, out: Path) -> None:
    started = config_file.load(CONFIGS / f"sft_{args.task}.yaml", [f"out={out / 'sft'}", *args.start], config.SFTRun)
    path = str(offline.run("sft", started) / "final")
    task, mesh = load_task(started), parallel.make_mesh(config.Mesh())
    reward = train_scorer(out / "reward", path, mesh) if args.task == "reviews" else task.score
    load = functools.partial(
        build.load,
        config.Model(path=path),
        mesh,
        key=jax.random.key(0),
        real_vocab=TASKS[args.task].tokenizer().vocab_size,
        path=path,
    )
    actor, critic = load(head="lm"), load(head="value", zero_head=True)
    score, keys = measure(task, actor.model), jax.random.split(jax.random.key(1), args.seeds)
    for name, (file, changes) in CASES.items():
        if args.only and name not in args.only:
            continue
        stage = config_file.stage_of(CONFIGS / f"{file}.yaml")
        run: Any = config_file.load(
            CONFIGS / f"{file}.yaml", [*changes, *smaller(args.task, stage), *args.change], config.STAGES[stage]
        )
        answers = run.batch_size * (2 if stage in OFFLINE else 1)
        budget = args.budget or BUDGET[args.task]
        steps = max(1, round(budget / (answers * passes_per_answer(stage, getattr(run, stage)))))
        more = () if stage in OFFLINE else (critic.params, reward)
        learn = (from_pairs if stage in OFFLINE else online)(stage, run, steps, task, actor.model, actor.params, *more)
        program = jax.jit(functools.partial(of_seeds, score, learn, actor.params)).lower(keys).compile()
        began = time.perf_counter()
        before, found = jax.device_get(program(keys))
        row = {"before": float(before), "after": found.tolist(), "steps": steps, "seconds": time.perf_counter() - began}
        print(args.task, name, row, flush=True)
        metrics.write_atomic(out / f"{name}.json", json.dumps(row) + "\n")


def table(folder: Path) -> str:
    """What the files below `folder` hold: passes per answer, then a column a task."""
    tasks = [task for task in TASKS if list((folder / task).glob("*.json"))]
    rows = [["", "passes per answer", *tasks], ["---"] * (2 + len(tasks))]
    for name, (file, changes) in CASES.items():
        stage = config_file.stage_of(CONFIGS / f"{file}.yaml")
        run = config_file.load(CONFIGS / f"{file}.yaml", changes, config.STAGES[stage])
        cells = [_cell(task, folder / task / f"{name}.json") for task in tasks]
        rows.append([name, f"{passes_per_answer(stage, getattr(run, stage))}", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(task: str, file: Path) -> str:
    """Mean over seeds and its standard error; sums in per cent."""
    if not file.is_file():
        return ""
    found = json.loads(file.read_text())
    scale, digits = (100, 1) if task == "addition" else (1, 2)
    after = scale * np.asarray(found["after"])
    error = after.std(ddof=1) / len(after) ** 0.5
    return f"{scale * found['before']:.{digits}f} -> {after.mean():.{digits}f} ± {error:.{digits}f} in {found['steps']} steps"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/compare")
    parser.add_argument("--task", choices=sorted(TASKS), default="addition")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budget", type=float, help=f"passes over an answer; default: {BUDGET}")
    parser.add_argument("--only", nargs="*", help="rows of the table")
    parser.add_argument("--change", nargs="*", default=[], metavar="KEY=VALUE", help="changes to every algorithm's run file")
    parser.add_argument("--start", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the fine-tuning's run file")
    parser.add_argument("--table", action="store_true", help="print what is there, run nothing")
    args = parser.parse_args()
    if not args.table:
        compare(args, Path(args.out) / args.task)
    print(table(Path(args.out)))


if __name__ == "__main__":
    main()
