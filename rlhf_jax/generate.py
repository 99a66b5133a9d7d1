"""Answers from a model directory: for `rlhf-jax generate`, for the pairs of the quickstart, for evaluation."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax import build, config, models, parallel, sampling
from rlhf_jax.build import Loaded
from rlhf_jax.data.encode import cut_left
from rlhf_jax.data.formats import ASSISTANT, HUMAN, Message
from rlhf_jax.data.questions import Question, read_questions
from rlhf_jax.data.tokenizer import Tokenizer, load_tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.types import Prompts

PLAIN_CHAT = f"no chat template: answers continue a plain transcript ({HUMAN!r}, {ASSISTANT!r}) and end before {HUMAN!r}"
ROUND = 16  # prompts are padded to a multiple of this, so that few programs are compiled


@dataclass
class Generator:
    """A model that answers; compiled samplers are kept by their settings."""

    loaded: Loaded
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh
    compiled: dict[Any, Any] = field(default_factory=dict)

    def sampler(self, settings: config.Sampling) -> Any:
        """(decoding params, prompts, key) -> Rollout."""
        if settings not in self.compiled:
            stops = build.stop_ids(settings, self.tokenizer)
            sample = sampling.make_sampler(self.loaded.model, settings, stop_ids=stops, pad_id=self.tokenizer.pad_id)
            self.compiled[settings] = parallel.compile_step(sample, out=parallel.batch_sharding(self.mesh))
        return self.compiled[settings]


@dataclass(frozen=True)
class Answer:
    text: str
    ids: list[int]  # end-of-sequence included
    finished: bool
    logprob: float  # nats, of the whole answer


def open_model(
    path: str | Path,
    settings: config.Model | None = None,
    *,
    mesh: config.Mesh | None = None,
    devices: list[Any] | None = None,
    chat_template: str | None = None,
) -> Generator:
    """Load a language model and its tokenizer, on all devices or on those given; UserError where the directory is not one."""
    require_answers(path)
    tokenizer = load_tokenizer(path, chat_template=chat_template)
    settings = settings or config.Model(path=str(path))
    where = parallel.make_mesh(mesh or build.widest_mesh(path, devices), devices)
    loaded = build.load(
        settings, where, head="lm", key=jax.random.key(0), real_vocab=tokenizer.vocab_size, path=str(path), trained=False
    )
    sync = parallel.compile_step(loaded.model.for_decoding, out=decoding_shardings(loaded, where))
    return Generator(loaded._replace(params=sync(loaded.params)), tokenizer, where)


def require_answers(path: str | Path) -> None:
    """UserError for a model that gives no answers."""
    if models.has_scalar_head(path):
        raise UserError(f"{path} is a reward model or a critic: it scores answers and gives none; name a language model")


def decoding_shardings(loaded: Loaded, mesh: jax.sharding.Mesh) -> Any:
    shapes = jax.eval_shape(loaded.model.for_decoding, loaded.part.trained)
    return parallel.param_shardings(mesh, loaded.model.axes(shapes), shapes, gather=("fsdp",))


def answer(
    generator: Generator, prompts: Sequence[Sequence[int]], settings: config.Sampling, *, seed: int = 0, batch_size: int = 16
) -> Iterator[Answer]:
    """Answer token sequences in order. Equal prompts get different answers: an answer depends on (seed, place) alone.

    `batch_size` is rounded up to a multiple of the devices.
    """
    key = jax.random.key(seed)
    batch_size += -batch_size % parallel.axis_size(generator.mesh, "batch")
    longest = max((len(ids) for ids in prompts), default=1)
    width = -(-max(longest, 1) // ROUND) * ROUND
    sample = generator.sampler(settings)
    for first in range(0, len(prompts), batch_size):
        rows = list(prompts[first : first + batch_size])
        batch = left_padded(rows, width, batch_size, generator.tokenizer.pad_id, first)
        rollout = sample(generator.loaded.params, parallel.place(batch, parallel.batch_sharding(generator.mesh)), key)
        tokens, chosen, finished, logprobs = parallel.fetch(
            (rollout.tokens, rollout.action_mask, rollout.finished, rollout.logprobs)
        )
        for row in range(len(rows)):
            ids = tokens[row, width:][chosen[row]].tolist()
            text = generator.tokenizer.decode(ids)
            yield Answer(text, ids, bool(finished[row]), float(logprobs[row].sum()))


def left_padded(rows: Sequence[Sequence[int]], width: int, batch_size: int, pad_id: int, first: int) -> Prompts:
    """Token lists as a batch of `batch_size` prompts numbered from `first`; missing rows are empty."""
    tokens: Any = np.full((batch_size, width), pad_id, np.int32)
    mask: Any = np.zeros((batch_size, width), bool)
    index: Any = np.arange(first, first + batch_size, dtype=np.int32)
    for row, ids in enumerate(rows):
        if ids:
            tokens[row, width - len(ids) :], mask[row, width - len(ids) :] = ids, True
    return Prompts(tokens=tokens, mask=mask, index=index)


def encode_prompt(tokenizer: Tokenizer, prompt: str | list[Message]) -> list[int]:
    """A prompt as the model was trained to see it: text with its start tokens, messages by the chat template."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt, start=True)
    return tokenizer.apply_chat(prompt, add_generation_prompt=True)[0]


def encode_conversation(tokenizer: Tokenizer, messages: list[Message]) -> tuple[list[int], tuple[str, ...]]:
    """Ids that the assistant's next answer continues, and the strings that end it beside end-of-sequence.

    Without a chat template (`PLAIN_CHAT`) the messages become a transcript, and the next human turn is where the answer stops.
    """
    if tokenizer.chat_template is not None:
        return tokenizer.apply_chat(messages, add_generation_prompt=True)[0], ()
    marks = {"user": HUMAN + " ", "assistant": ASSISTANT + " "}
    text = "".join(marks.get(message["role"], "\n\n") + message["content"].strip() for message in messages)
    return tokenizer.encode(text.removeprefix("\n\n") + ASSISTANT, start=True), (HUMAN,)


def fitted(
    tokenizer: Tokenizer,
    longest: int | None,
    questions: Sequence[Question],
    max_new_tokens: int,
    long_prompts: str,
    tell: Callable[[str], None] = lambda text: None,
) -> tuple[list[Question], list[list[int]]]:
    """Questions with the ids of their prompts. Those without room for an answer follow `long_prompts`, as data.long_prompts.

    `longest` is what the model takes, in tokens (None: any). `tell` hears how many were dropped or cut. Errors: `UserError` for
    the first of them, under "error" and where nothing is left.
    """
    room = longest - max_new_tokens if longest else sys.maxsize
    kept: list[tuple[Question, list[int]]] = []
    long, wrong = 0, ""
    for question in questions:
        ids = encode_prompt(tokenizer, question.prompt)
        if len(ids) <= room:
            kept.append((question, ids))
            continue
        long += 1
        wrong = wrong or (
            f"{question.where()}: the prompt has {len(ids)} tokens; with --max-new-tokens {max_new_tokens} that is more than "
            f"the {longest} that the model takes; shorten the prompt, or lower --max-new-tokens"
            + (", or give --long-prompts drop or truncate_left" if room > 0 else "")
        )
        if long_prompts == "error":
            raise UserError(wrong)
        if long_prompts == "truncate_left" and room > 0:
            kept.append((question, cut_left(ids, room, tokenizer)))
    if wrong and not kept:
        raise UserError(wrong)
    if long:
        done = "dropped" if len(kept) < len(questions) else "cut on the left"
        limit = f"with --max-new-tokens {max_new_tokens} the model takes {room} tokens of a prompt"
        tell(f"{long} of {len(questions)} prompts {done}: {limit}; --long-prompts chooses")
    return [question for question, _ in kept], [ids for _, ids in kept]


def generate(
    model_dir: Path,
    prompts: Path,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    batch_size: int,
    seed: int,
    chat: bool = False,
    columns: dict[str, str] | None = None,
    limit: int | None = None,
    long_prompts: str = "drop",
    tell: Callable[[str], None] = lambda text: None,
) -> Iterator[str]:
    """Answers to a file of prompts as JSON lines {"prompt", "response", "finished", "logprob_nats"}.

    `chat`, `columns`, `limit` and `long_prompts` are those of the run's `data`: the model is asked as it was trained.
    """
    questions = read_questions(prompts, config.Data(columns=columns or {}, chat=chat, limit=limit))
    generator = open_model(model_dir)
    settings = config.Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    longest = generator.loaded.spec.max_length
    questions, ids = fitted(generator.tokenizer, longest, questions, max_new_tokens, long_prompts, tell)
    for question, found in zip(questions, answer(generator, ids, settings, seed=seed, batch_size=batch_size), strict=True):
        row = {"prompt": question.prompt, "response": found.text, "finished": found.finished}
        yield json.dumps(row | {"logprob_nats": round(found.logprob, 4)}, ensure_ascii=False)
