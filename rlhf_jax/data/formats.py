"""From the column names people have to the four kinds of rows: fine-tuning, prompts, pairs, labelled answers.

A string is used as it stands; a list of messages goes through the tokenizer's chat template.

    text                          SFT: the whole text is trained
    messages                      SFT: assistant messages are trained; prompts: everything before a last assistant message
    prompt, completion            SFT; prompts
    question, answer              SFT and prompts, written "Question: …\\nAnswer:" + " …" (GSM8K)
    prompt, completion, label     KTO: the completion is good (true) or bad (false)
    prompt, chosen, rejected      preferences; SFT on chosen; prompts
    chosen, rejected              the same, the prompt being the transcript up to the last "\\n\\nAssistant:" they share (hh-rlhf)

With `data.chat` strings become messages first (`as_messages`).
"""

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf_jax.config import Data
from rlhf_jax.data.sources import BadRow

Purpose = Literal["sft", "prompts", "preferences", "labels"]
Message = dict[str, str]
Text = str | list[Message]

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
ROLES = ("system", "developer", "user", "assistant", "tool")

# Formats in the order in which they are tried, with the columns that identify them.
FORMATS: dict[Purpose, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "sft": (
        ("messages", ("messages",)),
        ("completion", ("prompt", "completion")),
        ("preferences", ("chosen",)),
        ("question", ("question", "answer")),
        ("text", ("text",)),
    ),
    "prompts": (
        ("prompt", ("prompt",)),
        ("messages", ("messages",)),
        ("preferences", ("chosen",)),
        ("question", ("question",)),
    ),
    "preferences": (("explicit", ("prompt", "chosen", "rejected")), ("implicit", ("chosen", "rejected"))),
    "labels": (("labelled", ("prompt", "completion", "label")),),
}

_OURS = tuple(dict.fromkeys(name for formats in FORMATS.values() for _, names in formats for name in names))


@dataclass(frozen=True)
class Row:
    """A row in our terms. For SFT `chosen` is the completion; for prompts it is absent."""

    prompt: Text
    chosen: Text = ""
    rejected: Text = ""
    chosen_finished: bool = True  # False: a sampled answer that was cut off, and gets no end-of-sequence
    rejected_finished: bool = True
    margin: float | None = None
    desirable: bool = True  # of a labelled answer: good or bad
    columns: dict[str, Any] = field(default_factory=dict)


def prepare(row: dict[str, Any], data: Data, where: str = "row") -> dict[str, Any]:
    """A row of a file as the formats below name its columns: `data.columns`, then `data.chat`."""
    row = rename(row, data.columns, where)
    return as_messages(row, where) if data.chat else row


def rename(row: dict[str, Any], columns: dict[str, str], where: str = "row") -> dict[str, Any]:
    """Apply `data.columns` (ours: theirs). A renamed column replaces one that already had our name."""
    missing = {ours: theirs for ours, theirs in columns.items() if theirs not in row}
    if missing:
        ours, theirs = next(iter(missing.items()))
        near = [] if ours in _OURS else difflib.get_close_matches(ours, _OURS, 1)
        hint = f" (and {ours} is a name that only rewards read; did you mean {near[0]}?)" if near else ""
        raise BadRow(
            f"{where}: data.columns.{ours}: {theirs} names a column that is not there; found {_names(row)}. "
            f"Write data.columns.{ours}=<one of these>{hint}"
        )
    taken = set(columns.values())
    return {key: value for key, value in row.items() if key not in taken} | {o: row[t] for o, t in columns.items()}


def as_messages(row: dict[str, Any], where: str = "row") -> dict[str, Any]:
    """`data.chat`: a prompt (or question) that is a string as the user's message, its answers as the assistant's.

    The `answer` of a question stays as it is beside them, for rewards. What is a list of messages already is kept.
    Errors: `BadRow` for a row whose question does not stand apart from its answer.
    """
    if "messages" in row:
        return row
    asked = next((name for name in ("prompt", "question") if name in row), None)
    if asked is None:
        raise BadRow(
            f"{where}: data.chat is true and there is no column prompt, question or messages; found {_names(row)}. "
            "Name one with data.columns, or set data.chat=false"
        )
    answers = {"completion": "completion", "chosen": "chosen", "rejected": "rejected"}
    if asked == "question":
        answers |= {"answer": "completion"}
    made = {new: _turn("assistant", row[old]) for old, new in answers.items() if old in row}
    kept = {name: value for name, value in row.items() if name != "question"}
    return kept | {"prompt": _turn("user", row[asked])} | made


def _turn(role: str, value: Any) -> Any:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def detect(row: dict[str, Any], purpose: Purpose, where: str = "row") -> str:
    """The format whose columns a (renamed) row has. Errors: `BadRow` with the columns found and needed."""
    for name, needed in FORMATS[purpose]:
        if all(column in row for column in needed):
            return name
    wanted = " | ".join("+".join(needed) for _, needed in FORMATS[purpose])
    if purpose == "preferences":  # what kto's rows are is decided by their label
        wanted += " (for kto also prompt+completion+label)"
    first = next(column for column in FORMATS[purpose][0][1] if column not in row)
    guess = next((key for key, value in row.items() if isinstance(value, str | list)), "your_column")
    raise BadRow(
        f"{where}: columns {_names(row)} fit no format of {purpose}; needed: {wanted}. "
        f"Rename with data.columns, such as data.columns.{first}={guess}"
    )


def normalise(row: dict[str, Any], purpose: Purpose, form: str, where: str = "row") -> Row:
    """A (renamed) row in our terms.

    Errors: `BadRow` for a missing column, a null, a wrong type, malformed messages.
    """
    reader = {"sft": _sft, "prompts": _prompt, "preferences": _preference, "labels": _label}[purpose]
    return reader(row, form, where)


def _sft(row: dict[str, Any], form: str, where: str) -> Row:
    if form == "text":
        return Row(prompt="", chosen=_string(row, "text", where))
    if form == "messages":
        return Row(prompt=[], chosen=_messages(row, "messages", where))
    if form == "question":
        return Row(prompt=f"Question: {_string(row, 'question', where)}\nAnswer:", chosen=f" {_string(row, 'answer', where)}")
    if form == "completion":
        prompt, completion = _text(row, "prompt", where), _text(row, "completion", where)
        _same_kind(prompt, completion, "prompt", "completion", where)
        return Row(prompt=prompt, chosen=completion, chosen_finished=_flag(row, "finished", where))
    prompt, chosen = _split_one(row, where)
    return Row(prompt=prompt, chosen=chosen, chosen_finished=_flag(row, "chosen_finished", where))


def _prompt(row: dict[str, Any], form: str, where: str) -> Row:
    used = {"prompt": ("prompt",), "messages": ("messages",), "preferences": ("chosen", "rejected"), "question": ("question",)}
    columns = {key: value for key, value in row.items() if key not in used[form]}
    if form == "question":
        return Row(prompt=f"Question: {_string(row, 'question', where)}\nAnswer:", columns=columns)
    if form == "prompt":
        return Row(prompt=_text(row, "prompt", where), columns=columns)
    if form == "messages":
        return Row(prompt=_without_answer(_messages(row, "messages", where)), columns=columns)
    prompt, _ = _split_one(row, where) if "rejected" not in row else _pair(row, where)[:2]
    return Row(prompt=prompt, columns=columns)


def _preference(row: dict[str, Any], form: str, where: str) -> Row:
    prompt, chosen, rejected = _pair(row, where)
    margin = row.get("margin")
    number = isinstance(margin, int | float) and not isinstance(margin, bool)
    if margin is not None and not (number and abs(margin) < 2.0**127):  # float32 holds it; NaN is below nothing
        raise BadRow(f"{where}: column margin must be a finite number, found {_kind(margin)}")
    return Row(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        chosen_finished=_flag(row, "chosen_finished", where),
        rejected_finished=_flag(row, "rejected_finished", where),
        margin=None if margin is None else float(margin),
    )


def _label(row: dict[str, Any], form: str, where: str) -> Row:
    if "label" not in row:
        raise BadRow(f"{where}: column label is missing; found {_names(row)}. Mend the row, or set data.on_bad_rows=skip")
    return dataclasses.replace(_sft(row, "completion", where), desirable=_flag(row, "label", where))


def _split_one(row: dict[str, Any], where: str) -> tuple[Text, Text]:
    """Prompt and answer of a row of which only the chosen side is wanted."""
    if "rejected" in row and "prompt" not in row:
        return _pair(row, where)[:2]
    chosen = _text(row, "chosen", where)
    if "prompt" in row:
        prompt = _text(row, "prompt", where)
        return _explicit(prompt, chosen, where)
    if isinstance(chosen, list):
        return _without_answer(chosen), chosen[len(_without_answer(chosen)) :]
    return _cut(chosen, chosen.rfind(ASSISTANT), where)


def _pair(row: dict[str, Any], where: str) -> tuple[Text, Text, Text]:
    chosen, rejected = _text(row, "chosen", where), _text(row, "rejected", where)
    _same_kind(chosen, rejected, "chosen", "rejected", where)
    if "prompt" in row:
        prompt = _text(row, "prompt", where)
        shared, first = _explicit(prompt, chosen, where)
        return shared, first, _explicit(prompt, rejected, where)[1]
    if isinstance(chosen, list) and isinstance(rejected, list):
        shared = 0
        # The last message of each side is its answer even where the two are equal (the pair is dropped later).
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        return chosen[:shared], chosen[shared:], rejected[shared:]
    common = _common_prefix(str(chosen), str(rejected))
    at = str(chosen).rfind(ASSISTANT, 0, common)
    prompt, answer = _cut(str(chosen), at, where)
    return prompt, answer, _cut(str(rejected), at, where)[1]


def _explicit(prompt: Text, answer: Text, where: str) -> tuple[Text, Text]:
    """Prompt and answer given apart; an answer that repeats the prompt's messages loses them (UltraFeedback)."""
    if isinstance(prompt, str) and isinstance(answer, list):
        if len(answer) > 1 and answer[-2]["content"] == prompt:
            return answer[:-1], answer[-1:]
        return [{"role": "user", "content": prompt}], answer
    if isinstance(prompt, list) and isinstance(answer, str):
        return prompt, [{"role": "assistant", "content": answer}]
    if isinstance(prompt, list) and isinstance(answer, list) and answer[: len(prompt)] == prompt and len(answer) > len(prompt):
        return prompt, answer[len(prompt) :]
    _same_kind(prompt, answer, "prompt", "answer", where)
    return prompt, answer


def _cut(transcript: str, at: int, where: str) -> tuple[str, str]:
    if at < 0:
        raise BadRow(
            f"{where}: no prompt column, and chosen and rejected share no transcript ending in {ASSISTANT!r}; "
            "add a prompt column, or name it with data.columns.prompt=<column>"
        )
    end = at + len(ASSISTANT)
    return transcript[:end], transcript[end:]


def _common_prefix(a: str, b: str) -> int:
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low


def _without_answer(messages: list[Message]) -> list[Message]:
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages


def _text(row: dict[str, Any], column: str, where: str) -> Text:
    if isinstance(row.get(column), list):
        return _messages(row, column, where)
    return _string(row, column, where, "a string or a list of messages")


def _string(row: dict[str, Any], column: str, where: str, wanted: str = "a string") -> str:
    if column not in row:
        raise BadRow(f"{where}: column {column} is missing; found {_names(row)}. Mend the row, or set data.on_bad_rows=skip")
    value = row[column]
    if not isinstance(value, str):
        raise BadRow(
            f"{where}: column {column} must be {wanted}, found {_kind(value)}; "
            f"mend the row, set data.on_bad_rows=skip, or name another column with data.columns.{column}=<column>"
        )
    return value


def _messages(row: dict[str, Any], column: str, where: str) -> list[Message]:
    value = row.get(column)
    if not isinstance(value, list) or not value:
        raise BadRow(f"{where}: column {column} must be a list of messages with at least one, found {_kind(value)}")
    for number, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or message.get("role") not in ROLES:
            raise BadRow(
                f'{where}: {column}[{number}] must be {{"role": …, "content": string}} with a role of {", ".join(ROLES)}; '
                f"found {_kind(message)}"
            )
    return value


def _flag(row: dict[str, Any], column: str, where: str) -> bool:
    value = row.get(column, True)
    if not isinstance(value, bool):
        raise BadRow(f"{where}: column {column} must be true or false, found {_kind(value)}")
    return value


def _same_kind(a: Text, b: Text, name_a: str, name_b: str, where: str) -> None:
    if isinstance(a, str) != isinstance(b, str):
        raise BadRow(f"{where}: {name_a} and {name_b} must be both strings or both lists of messages")


def _kind(value: Any) -> str:
    shown = "null" if value is None else f"{type(value).__name__} {value!r}"
    return shown if len(shown) <= 80 else shown[:77] + "…"


def _names(row: dict[str, Any]) -> str:
    return ", ".join(map(str, row)) or "none"


def render_plain(text: Text) -> str:
    """A text for people and reward functions: messages become a transcript."""
    if isinstance(text, str):
        return text
    return "\n".join(f"{message['role']}: {message['content']}" for message in text)
