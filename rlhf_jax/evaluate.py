"""How good a model is on a file of prompts: `rlhf-jax evaluate`. Every figure has its confidence interval.

    reward         mean over answers, of each reward                               bootstrap over prompts
    kl             sum over an answer's tokens of KL(model || reference), exact    bootstrap over prompts
    win_rate       share of pairs of answers of which the model's scores higher    Wilson
    pass@k         at least one of k answers is right (Chen et al. 2021)           Wilson
    best of n      reward of the answer, among n, that the first reward picks      bootstrap over prompts

Models are held one after the other (the model with its reference), so that several need no more memory than two.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import yaml

from rlhf_jax import config, estimates, generate, models, parallel, scoring
from rlhf_jax.data.encode import prompt_text
from rlhf_jax.data.questions import Question, read_questions
from rlhf_jax.data.tokenizer import load_tokenizer
from rlhf_jax.errors import UserError, without_secrets
from rlhf_jax.estimates import Interval
from rlhf_jax.generate import Generator, left_padded
from rlhf_jax.rewards import REWARDS, make_reward
from rlhf_jax.scorer import open_scorer
from rlhf_jax.types import Frozen, Prompts, RewardInput

Tell = Callable[[str], None]
Array = Any  # numpy, [prompts, answers of each]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured, and how the model answers."""

    rewards: tuple[str, ...] = ()  # directories of reward models, shipped names, path/to/file.py:function, {function: …}, URLs
    reference: str | None = None
    against: str | None = None
    samples: int = 1  # answers to each prompt
    pass_at: tuple[int, ...] = ()
    right_from: float = 1.0  # reward units: an answer is right from this score of the first reward on
    best_of: tuple[int, ...] = ()
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 16  # rounded up to a multiple of the devices
    limit: int | None = None
    seed: int = 0
    confidence: float = 0.95
    dtype: Any = "float32"
    chat: bool = False  # as data.chat of the run
    columns: dict[str, str] = dataclasses.field(default_factory=dict)  # as data.columns of the run
    long_prompts: str = "drop"  # as data.long_prompts: "drop", "truncate_left" or "error"


class Answers(NamedTuple):
    """What a model said."""

    ids: list[list[list[int]]]  # [prompts][answers][tokens], end-of-sequence included
    texts: list[list[str]]
    finished: Array  # bool
    kl: Array | None  # f64, nats per answer
    prompts: list[list[int]]  # the prompts as this model reads them
    tokenizer: Any


class Figure(NamedTuple):
    """One number of the result."""

    name: str
    of: str  # the reward, or the other model
    unit: str
    estimate: Interval
    note: str = ""


def evaluate(
    model: Path, prompts: Path, settings: Settings, *, out: Path | None = None, tell: Tell = lambda text: None
) -> list[Figure]:
    """Answer the prompts and measure; with `out` the answers are written there as JSON lines. `tell` hears of prompts left out.

    Raises `UserError` for settings that need what is not given, and wherever a file or a directory cannot be used.
    """
    check(settings)
    generate.require_answers(model)
    if out is not None:
        try_place(out)
    questions = read_questions(prompts, config.Data(columns=settings.columns, chat=settings.chat, limit=settings.limit))
    for path in filter(None, (str(model), settings.against)):  # those that every model can answer
        tokenizer, longest = load_tokenizer(path), models.read_spec(path).max_length
        questions, _ = generate.fitted(tokenizer, longest, questions, settings.max_new_tokens, settings.long_prompts, tell)
    answers = answer(str(model), questions, settings, reference=settings.reference)
    scores = {name: score(name, answers, questions) for name in settings.rewards}
    other = {}
    if settings.against is not None:
        theirs = answer(settings.against, questions, settings)
        other = {name: score(name, theirs, questions) for name in settings.rewards}
    if out is not None:
        write_answers(out, questions, answers, scores)
    return figures(answers, scores, other, settings)


def check(settings: Settings) -> None:
    """Raise `UserError` naming the option, its value, the rule and the remedy."""
    s = settings
    counts = [("--pass-at", k) for k in s.pass_at] + [("--best-of", n) for n in s.best_of]
    needs_reward = [option for option, given in (("--against", s.against), *counts) if given]
    if needs_reward and not s.rewards:
        raise UserError(f"{needs_reward[0]} needs --reward: it says which answers are better")
    for option, value in counts:
        if not 1 <= value <= s.samples:
            remedy = (
                f"needs at least as many answers to each prompt; give --samples {value}" if value > 0 else "must be at least 1"
            )
            raise UserError(f"{option} {value} {remedy}")
    if s.reference is not None and s.temperature == 0:
        raise UserError("--reference needs --temperature above 0: a greedy answer has no KL")
    if not 0 < s.confidence < 1:
        raise UserError(f"--confidence {s.confidence}: must lie between 0 and 1, such as 0.95")
    for name in s.rewards:
        if not Path(name).is_dir():
            make_reward(host_reward(name))
        elif not models.has_scalar_head(name):
            raise UserError(f"--reward {name}: is a language model, which gives no scores; name a reward model")
    for option, name in (("--reference", s.reference), ("--against", s.against)):
        if name is not None and models.has_scalar_head(name):
            raise UserError(f"{option} {name}: is a reward model or a critic; name a language model")


# ---------------------------------------------------------------------------------------------------- answers


def answer(model: str, questions: Sequence[Question], settings: Settings, *, reference: str | None = None) -> Answers:
    """Answer every prompt `samples` times. An answer depends on (seed, place of the prompt, number of the answer) alone."""
    generator = generate.open_model(model, config.Model(path=model, compute_dtype=settings.dtype))
    longest, policy = generator.loaded.spec.max_length, settings.long_prompts
    questions, ids = generate.fitted(generator.tokenizer, longest, questions, settings.max_new_tokens, policy)
    size = settings.batch_size + -settings.batch_size % parallel.axis_size(generator.mesh, "batch")
    sampling = config.Sampling(max_new_tokens=settings.max_new_tokens, temperature=settings.temperature, top_p=settings.top_p)
    sample, key = generator.sampler(sampling), jax.random.key(settings.seed)
    measure = None if reference is None else make_kl(generator, reference, settings)
    width = -(-max(map(len, ids)) // generate.ROUND) * generate.ROUND
    rows = [(place, number) for place in range(len(ids)) for number in range(settings.samples)]
    found: list[tuple[list[int], bool, float]] = []
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        batch = place_rows(generator, [ids[place] for place, _ in part], part, width, size)
        rollout = sample(generator.loaded.params, batch, key)
        kl = np.zeros(size) if measure is None else parallel.fetch(measure(rollout))
        tokens, chosen, finished = parallel.fetch((rollout.tokens[:, width:], rollout.action_mask, rollout.finished))
        found += [(tokens[row][chosen[row]].tolist(), bool(finished[row]), float(kl[row])) for row in range(len(part))]

    def grid(values: list[Any]) -> list[list[Any]]:
        return [values[first : first + settings.samples] for first in range(0, len(values), settings.samples)]

    return Answers(
        ids=grid([row[0] for row in found]),
        texts=grid([generator.tokenizer.decode(row[0]) for row in found]),
        finished=np.asarray(grid([row[1] for row in found])),
        kl=None if measure is None else np.asarray(grid([row[2] for row in found])),
        prompts=ids,
        tokenizer=generator.tokenizer,
    )


def place_rows(generator: Generator, ids: list[list[int]], rows: list[tuple[int, int]], width: int, batch_size: int) -> Prompts:
    """Prompts on the devices, each with its place and the number of its answer, which seed the answer."""
    batch = left_padded(ids, width, batch_size, generator.tokenizer.pad_id, 0)
    numbers: Any = np.zeros((2, batch_size), np.int32)
    numbers[:, : len(rows)] = np.asarray(rows, np.int32).T
    batch = batch.replace(index=numbers[0], sample=numbers[1])
    return parallel.place(batch, parallel.batch_sharding(generator.mesh))


def make_kl(generator: Generator, reference: str, settings: Settings) -> Any:
    """(rollout) -> f32[B], nats: exact KL(model || reference) summed over the answer's tokens, as they were sampled."""
    other = generate.open_model(reference, config.Model(path=reference, compute_dtype=settings.dtype))
    if other.tokenizer.hash != generator.tokenizer.hash:
        raise UserError(f"--reference {reference}: has another tokenizer than the model, so that there is no KL between them")
    sizes = (generator.loaded.model.vocab_size, other.loaded.model.vocab_size)
    if sizes[0] != sizes[1]:
        raise UserError(
            f"--reference {reference}: its embedding has {sizes[1]} rows, the model's {sizes[0]}; both must have as many"
        )
    apply = scoring.make_policy_apply(generator.loaded.model, temperature=settings.temperature, kl_model=other.loaded.model)

    def measure(params: Any, base: Any, rollout: Any) -> jax.Array:
        return apply({}, Frozen(actor=params, reference=base), rollout).kl.sum(-1)

    compiled = parallel.compile_step(measure)
    return lambda rollout: compiled(generator.loaded.params, other.loaded.params, rollout)


# ---------------------------------------------------------------------------------------------------- rewards


def host_reward(name: str) -> config.Reward:
    """A reward by its name: a shipped one, path/to/file.py:function, {function: …, options: {…}}, or a server's URL."""
    if name.startswith(("http://", "https://")):
        return config.Reward(url=name)
    if not name.startswith("{"):
        if name not in REWARDS and ".py:" not in name:
            raise UserError(
                f"--reward {name}: neither a directory with a reward model, nor one of {', '.join(sorted(REWARDS))}, "
                "nor path/to/file.py:function"
            )
        return config.Reward(functions=(config.RewardFunction(function=name),))
    try:
        entry = config.RewardFunction(**yaml.safe_load(name))
        if not isinstance(entry.function, str) or not isinstance(entry.options, dict):
            raise TypeError("function must be a name, options a group of keys")
        return config.Reward(functions=(entry,))
    except (yaml.YAMLError, TypeError) as error:
        form = "{function: math_answer, options: {column: answer}}"
        raise UserError(f"--reward {name}: {str(error).splitlines()[0]}; it must look like {form}") from None


def score(name: str, answers: Answers, questions: Sequence[Question]) -> Array:
    """Scores f64[prompts, answers] of one reward: of the very tokens where a reward model shares the tokenizer, else of texts."""
    samples = len(answers.texts[0])
    if Path(name).is_dir():
        return score_by_model(name, answers, questions)
    rows = [question for question in questions for _ in range(samples)]
    columns = {key: [row.columns.get(key) for row in rows] for key in dict.fromkeys(k for row in rows for k in row.columns)}
    batch = RewardInput(
        prompts=[prompt_text(row.prompt, answers.tokenizer) for row in rows],
        responses=[text for texts in answers.texts for text in texts],
        finished=answers.finished.reshape(-1),
        columns=columns,
    )
    total, _ = make_reward(host_reward(name), answers.tokenizer)(batch)
    return np.asarray(total, np.float64).reshape(-1, samples)


def score_by_model(directory: str, answers: Answers, questions: Sequence[Question]) -> Array:
    scorer = open_scorer(directory)
    same = scorer.tokenizer.hash == answers.tokenizer.hash
    rows = []
    for place, question in enumerate(questions):
        for number, text in enumerate(answers.texts[place]):
            try:
                if same:
                    rows.append(scorer.checked([*answers.prompts[place], *answers.ids[place][number]]))
                else:
                    rows.append(scorer.encode(question.prompt, text, bool(answers.finished[place][number])))
            except UserError as error:
                raise UserError(f"{question.where()}: {error}") from None
    return scorer.score(rows).astype(np.float64).reshape(len(questions), -1)


# ---------------------------------------------------------------------------------------------------- figures


def figures(answers: Answers, scores: dict[str, Array], other: dict[str, Array], settings: Settings) -> list[Figure]:
    """All numbers, in the order in which they are shown."""
    s = settings

    def mean(values: Array) -> Interval:
        return estimates.bootstrap(values, confidence=s.confidence, seed=s.seed)

    lengths = np.asarray([[len(ids) for ids in row] for row in answers.ids], np.float64)
    found = [Figure("reward", name, "reward units", mean(values)) for name, values in scores.items()]
    if answers.kl is not None:
        kept = "both on the tokens that top-p kept" if s.top_p < 1 else ""
        found.append(Figure("kl", str(s.reference), "nats per answer", mean(answers.kl), kept))
    for name, values in other.items():
        share = estimates.win_rate(scores[name], values, confidence=s.confidence)
        found.append(Figure("win_rate", name, "", share, f"against {s.against}"))
        gap = mean(scores[name].mean(1) - values.mean(1))
        found.append(Figure("reward_gain", name, "reward units", gap, f"over {s.against}"))
    if scores:
        first, selecting = next(iter(scores.items()))
        right = (selecting >= s.right_from).sum(1)
        for k in s.pass_at:
            rate = estimates.shares(estimates.pass_at_k(s.samples, right, k), confidence=s.confidence)
            found.append(Figure(f"pass@{k}", first, "", rate, f"right from {s.right_from:g} on"))
        for n in s.best_of:
            cost = f"KL to the model at most {estimates.best_of_n_kl(n):.2f} nats"
            for name, values in scores.items():
                best = mean(estimates.best_of_n(selecting, n, values))
                note = cost if name == first else f"picked by {first}, {cost}"
                found.append(Figure(f"best_of_{n}", name, "reward units", best, note))
    found.append(Figure("length", "", "tokens", mean(lengths)))
    ended = estimates.shares(answers.finished.mean(1), confidence=s.confidence)
    return [*found, Figure("finished", "", "", ended, "ended by end-of-sequence")]


def to_text(found: list[Figure], model: Path, settings: Settings) -> str:
    """A table for people."""
    s = settings
    count = found[0].estimate.count
    head = f"{model}: {count} prompts, {s.samples} answer{'s' * (s.samples > 1)} each, temperature {s.temperature:g}, "
    lines = [head + f"top-p {s.top_p:g}, at most {s.max_new_tokens} tokens, seed {s.seed}; intervals of {s.confidence:.0%}"]
    names = [f"{figure.name} ({figure.of})" if figure.of else figure.name for figure in found]
    wide = max(map(len, names))
    for name, figure in zip(names, found, strict=True):
        value, low, high, _ = figure.estimate
        lines.append(
            f"{name:{wide}}  {value:8.3f}  [{low:.3f}, {high:.3f}]  {', '.join(filter(None, (figure.unit, figure.note)))}"
        )
    return without_secrets("\n".join(line.rstrip() for line in lines))


def to_json(found: list[Figure], model: Path, settings: Settings) -> str:
    """The same for programs: {"model", "settings", "figures": [{"name", "of", "unit", "value", "low", "high", "count", …}]}."""
    rows = [{"name": f.name, "of": f.of, "unit": f.unit, **f.estimate._asdict(), "note": f.note} for f in found]
    page = {"model": str(model), "settings": dataclasses.asdict(settings), "figures": rows}
    return without_secrets(json.dumps(page, ensure_ascii=False, indent=1))


def try_place(out: Path) -> None:
    """Raise `UserError` where no file can be written, before there is anything to lose. What is there stays."""
    with told(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = not out.exists()
        out.open("ab").close()
        if fresh:
            out.unlink()


@contextlib.contextmanager
def told(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); free disk space, or name another place") from error


def write_answers(out: Path, questions: Sequence[Question], answers: Answers, scores: dict[str, Array]) -> None:
    """Every answer as a JSON line {"prompt", "response", "finished", "sample", "rewards"}."""
    lines = []
    for place, question in enumerate(questions):
        for number, text in enumerate(answers.texts[place]):
            row = {"prompt": question.prompt, "response": text, "finished": bool(answers.finished[place][number])}
            rewards = {without_secrets(name): float(values[place][number]) for name, values in scores.items()}
            lines.append(json.dumps(row | {"sample": number, "rewards": rewards}, ensure_ascii=False) + "\n")
    with told(out):
        out.write_text("".join(lines), encoding="utf-8")
