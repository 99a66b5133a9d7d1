"""One row to token sequences with their trained tokens marked, or the reason why it is dropped. Pure functions."""

from dataclasses import dataclass
from typing import NamedTuple

from rlhf_jax.config import Data
from rlhf_jax.data.formats import Purpose, Row, Text
from rlhf_jax.data.vocabulary import Tokenizer
from rlhf_jax.errors import UserError


class TokenSequence(NamedTuple):
    ids: list[int]
    trained: list[bool]  # True on tokens whose log-probability is trained; never on the first


@dataclass(frozen=True)
class Example:
    """Token sequences of a row (one; two for a preference), what was done to them, or why there are none."""

    sequences: tuple[TokenSequence, ...] = ()
    notes: tuple[str, ...] = ()
    dropped: str | None = None
    margin: float | None = None


def encode(row: Row, purpose: Purpose, tokenizer: Tokenizer, data: Data, where: str) -> Example:
    """Tokenise a row and apply the length policies.

    Prompts longer than `max_prompt_tokens` follow `long_prompts`; answers are cut on the right at `max_tokens` (then without
    end-of-sequence: the row is truncated). Dropped: empty prompts (of prompt data), empty answers, equal pairs.
    """
    if purpose == "prompts":
        return _prompt(row, tokenizer, data, where)
    answers = [(row.chosen, row.chosen_finished)]
    if purpose == "preferences":
        answers.append((row.rejected, row.rejected_finished))
    notes: list[str] = []
    sequences = []
    for answer, finished in answers:
        if _blank(answer):
            return Example(dropped="empty answer")
        found = sequence(row.prompt, answer, finished, tokenizer)
        if True not in found.trained:
            return Example(dropped="no assistant tokens to train")
        fitted = _fit(found, purpose, tokenizer, data, where, notes)
        if fitted is None:
            return Example(dropped=_too_long(purpose, data))
        sequences.append(fitted)
    if purpose == "preferences" and sequences[0].ids == sequences[1].ids:
        cut = any("answer cut" in note for note in notes)
        return Example(dropped="chosen equals rejected" + (" after truncation" if cut else ""))
    return Example(tuple(sequences), tuple(dict.fromkeys(notes)), margin=row.margin)


def _prompt(row: Row, tokenizer: Tokenizer, data: Data, where: str) -> Example:
    if isinstance(row.prompt, str):
        ids = tokenizer.encode(row.prompt, start=True)
        if len(ids) == len(tokenizer.start_ids):
            return Example(dropped="empty prompt")
    elif row.prompt:
        ids, _ = tokenizer.apply_chat(row.prompt, add_generation_prompt=True)
    else:
        return Example(dropped="empty prompt")
    notes: list[str] = []
    if len(ids) > data.max_prompt_tokens:
        if not _allowed(len(ids), data.max_prompt_tokens, "max_prompt_tokens", data, where):
            return Example(dropped=_too_long("prompts", data))
        ids = cut_left(ids, data.max_prompt_tokens, tokenizer)
        notes.append("prompt cut on the left")
    return Example((TokenSequence(ids, [False] * len(ids)),), tuple(notes))


def prompt_text(prompt: Text, tokenizer: Tokenizer) -> str:
    """A prompt as host rewards see it: as given, or as the chat template renders it."""
    return prompt if isinstance(prompt, str) else tokenizer.render_chat(prompt, add_generation_prompt=True)


def sequence(prompt: Text, answer: Text, finished: bool, tokenizer: Tokenizer) -> TokenSequence:
    """A prompt with its answer, as training and reward models see them; a finished answer ends with end-of-sequence."""
    if isinstance(answer, list):
        before = prompt if isinstance(prompt, list) else []
        ids, trained = tokenizer.apply_chat([*before, *answer], prompt_messages=len(before))
        if not finished and ids[-1] in tokenizer.eos_ids:
            ids, trained = ids[:-1], trained[:-1]
    else:
        head, tail = tokenizer.encode_pieces([str(prompt), answer])
        tail = [*tail, tokenizer.eos_id] if finished else tail
        first = len(tokenizer.start_ids) + len(head)
        ids = [*tokenizer.start_ids, *head, *tail]
        trained = [number >= first for number in range(len(ids))]
    if trained:
        trained[0] = False  # nothing precedes it that could predict it
    return TokenSequence(ids, trained)


def _fit(
    sequence: TokenSequence, purpose: Purpose, tokenizer: Tokenizer, data: Data, where: str, notes: list[str]
) -> TokenSequence | None:
    """The sequence within its limits, or None where the policy drops it."""
    ids, trained = sequence
    prompt = trained.index(True)
    limit, key = _limit(purpose, data)
    if prompt > limit:
        if not _allowed(prompt, limit, key, data, where):
            return None
        kept = cut_left(ids[:prompt], limit, tokenizer)
        ids, trained = kept + ids[prompt:], [False] * len(kept) + trained[prompt:]
        notes.append("prompt cut on the left")
    if len(ids) > data.max_tokens:
        ids, trained = ids[: data.max_tokens], trained[: data.max_tokens]
        notes.append("answer cut on the right (no end-of-sequence)")
    return TokenSequence(ids, trained)


def _allowed(found: int, limit: int, key: str, data: Data, where: str) -> bool:
    """False: drop. True: cut. Errors: `UserError` under `long_prompts: error`, whatever `on_bad_rows` says."""
    if data.long_prompts == "error":
        raise UserError(
            f"{where}: the prompt has {found} tokens, allowed are {limit} (data.{key}); "
            f"raise data.{key}, or set data.long_prompts=drop or truncate_left"
        )
    return data.long_prompts == "truncate_left"


def cut_left(ids: list[int], limit: int, tokenizer: Tokenizer) -> list[int]:
    """The last tokens, after the ones that begin a sequence."""
    start = len(tokenizer.start_ids)
    if tuple(ids[:start]) == tokenizer.start_ids and limit > start:
        return ids[:start] + ids[len(ids) - (limit - start) :]
    return ids[len(ids) - limit :]


def _limit(purpose: Purpose, data: Data) -> tuple[int, str]:
    """The tokens that a prompt may have, and the key that says so; one is left for an answer that stands behind it.

    Fine-tuning limits the whole sequence only: a long prompt with a short answer is as good as any.
    """
    whole, prompt = (data.max_tokens - 1, "max_tokens"), (data.max_prompt_tokens, "max_prompt_tokens")
    return prompt if purpose == "prompts" else whole if purpose == "sft" else min(whole, prompt)


def _too_long(purpose: Purpose, data: Data) -> str:
    limit, key = _limit(purpose, data)
    return f"prompt longer than {key}{' - 1' if key == 'max_tokens' else ''} = {limit}"


def _blank(answer: Text) -> bool:
    if isinstance(answer, str):
        return not answer.strip()
    return not answer or (answer[-1]["role"] == "assistant" and not answer[-1]["content"].strip())
