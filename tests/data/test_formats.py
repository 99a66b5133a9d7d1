"""From people's column names to rows: detection, transcripts, messages, renames, refusals."""

import pytest

from rlhf_jax.config import Data
from rlhf_jax.data.formats import Row, detect, normalise, prepare, rename, render_plain
from rlhf_jax.data.sources import BadRow


def _row(row: dict, purpose: str, **columns: str) -> Row:
    renamed = rename(row, columns)
    return normalise(renamed, purpose, detect(renamed, purpose))


USER, BOT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: sure?\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"text": "abc"}, "", "abc"),
        ({"messages": [USER, BOT]}, [], [USER, BOT]),
        ({"prompt": "a", "completion": "b"}, "a", "b"),
        ({"prompt": [USER], "completion": [BOT]}, [USER], [BOT]),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "a", "b"),
        ({"chosen": HH + " yes", "rejected": HH + " no"}, HH, " yes"),
        ({"chosen": HH + " yes"}, HH, " yes"),
        ({"question": "1+1?", "answer": "2\n#### 2"}, "Question: 1+1?\nAnswer:", " 2\n#### 2"),
    ],
)
def test_sft(row: dict, prompt: object, answer: object):
    found = _row(row, "sft")
    assert (found.prompt, found.chosen) == (prompt, answer)


@pytest.mark.parametrize(
    ("row", "prompt", "columns"),
    [
        ({"prompt": "a", "answer": "7"}, "a", {"answer": "7"}),
        ({"prompt": [USER]}, [USER], {}),
        ({"messages": [USER, BOT]}, [USER], {}),
        ({"messages": [USER, BOT, USER]}, [USER, BOT, USER], {}),
        ({"chosen": HH + " yes", "rejected": HH + " no", "id": 3}, HH, {"id": 3}),
        ({"question": "q", "answer": "a"}, "Question: q\nAnswer:", {"answer": "a"}),
    ],
)
def test_prompts_keep_the_other_columns(row: dict, prompt: object, columns: dict):
    found = _row(row, "prompts")
    assert (found.prompt, found.columns) == (prompt, columns)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, ("a", "b", "c")),
        ({"chosen": HH + " yes", "rejected": HH + " no"}, (HH, " yes", " no")),
        # The dialogues part before their last turn: the prompt ends where they still agree.
        (
            {"chosen": HH + " A\n\nHuman: x\n\nAssistant: B", "rejected": HH + " C\n\nHuman: x\n\nAssistant: D"},
            (HH, " A\n\nHuman: x\n\nAssistant: B", " C\n\nHuman: x\n\nAssistant: D"),
        ),
        # One is the beginning of the other.
        ({"chosen": HH + " A", "rejected": HH + " A\n\nHuman: x\n\nAssistant: B"}, (HH, " A", " A\n\nHuman: x\n\nAssistant: B")),
        ({"chosen": HH, "rejected": HH + " no"}, (HH, "", " no")),
        ({"prompt": [USER], "chosen": [BOT], "rejected": [BOT]}, ([USER], [BOT], [BOT])),
        ({"chosen": [USER, BOT], "rejected": [USER, {**BOT, "content": "no"}]}, ([USER], [BOT], [{**BOT, "content": "no"}])),
        ({"chosen": [USER, BOT], "rejected": [USER, BOT]}, ([USER], [BOT], [BOT])),
        ({"prompt": "hi", "chosen": [USER, BOT], "rejected": [USER, BOT]}, ([USER], [BOT], [BOT])),
        ({"prompt": "hi", "chosen": [BOT], "rejected": [BOT]}, ([USER], [BOT], [BOT])),
        ({"prompt": [USER], "chosen": [USER, BOT], "rejected": [USER, BOT]}, ([USER], [BOT], [BOT])),
        ({"prompt": [USER], "chosen": "x", "rejected": "y"}, ([USER], [{**BOT, "content": "x"}], [{**BOT, "content": "y"}])),
    ],
)
def test_preferences(row: dict, expected: tuple):
    found = _row(row, "preferences")
    assert (found.prompt, found.chosen, found.rejected) == expected


def test_margin_and_finished_flags():
    found = _row({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2, "rejected_finished": False}, "preferences")
    assert (found.margin, found.chosen_finished, found.rejected_finished) == (2.0, True, False)


def test_renames():
    found = _row(
        {"better": "b", "worse": "c", "instruction": "a"}, "preferences", prompt="instruction", chosen="better", rejected="worse"
    )
    assert (found.prompt, found.chosen, found.rejected) == ("a", "b", "c")
    swapped = rename({"prompt": 1, "chosen": 2}, {"prompt": "chosen", "chosen": "prompt"})
    assert swapped == {"prompt": 2, "chosen": 1}
    assert _row({"question": "q", "answer": "a"}, "prompts", prompt="question").columns == {"answer": "a"}
    with pytest.raises(BadRow, match=r"data.columns.chosen: gone names a column that is not there; found a, b"):
        rename({"a": 1, "b": 2}, {"chosen": "gone"})


@pytest.mark.parametrize(
    ("row", "purpose", "pieces"),
    [
        ({"foo": "x"}, "sft", ("columns foo fit no format of sft", "prompt+completion", "data.columns.messages=foo")),
        ({"prompt": "x"}, "preferences", ("needed: prompt+chosen+rejected",)),
        ({}, "prompts", ("columns none",)),
        ({"text": None}, "sft", ("column text must be a string", "null")),
        ({"text": 3}, "sft", ("int 3",)),
        ({"prompt": "a", "completion": ["b"]}, "sft", ("completion[0]",)),
        (
            {"prompt": "a", "chosen": None, "rejected": "b"},
            "preferences",
            ("chosen must be a string or a list of messages", "null"),
        ),
        ({"messages": []}, "sft", ("list of messages with at least one",)),
        ({"messages": [{"role": "robot", "content": "x"}]}, "sft", ("messages[0]", "assistant", "robot")),
        ({"messages": [{"role": "user", "content": None}]}, "sft", ("messages[0]",)),
        ({"chosen": "abc", "rejected": "abd"}, "preferences", ("no prompt column", "Assistant:")),
        ({"chosen": "abc", "rejected": [BOT]}, "preferences", ("both strings or both lists",)),
        *(
            (
                {"prompt": "a", "chosen": "b", "rejected": "c", "margin": margin},
                "preferences",
                ("margin must be a finite number",),
            )
            for margin in ("big", True, float("inf"), -float("inf"), float("nan"), 1e39, 10**400)
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "chosen_finished": 1}, "preferences", ("true or false",)),
        ({"text": "y" * 1000, "prompt": None, "completion": "z"}, "sft", ("prompt must be",)),
    ],
)
def test_what_does_not_fit_is_refused_with_the_remedy(row: dict, purpose: str, pieces: tuple[str, ...]):
    with pytest.raises(BadRow) as caught:
        _row(row, purpose)
    assert all(piece in str(caught.value) for piece in pieces), str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_later_row_without_a_column_is_named():
    with pytest.raises(BadRow, match=r"a.jsonl:3: column completion is missing; found prompt"):
        normalise({"prompt": "x"}, "sft", "completion", "a.jsonl:3")


def test_render_plain():
    assert render_plain([USER, BOT]) == "user: hi\nassistant: hello"


def test_strings_become_messages_where_the_chat_template_is_wanted():
    asked, answered = ([{"role": role, "content": text}] for role, text in (("user", "2+2?"), ("assistant", "4")))
    chat = Data(chat=True)
    row = prepare({"question": "2+2?", "answer": "4"}, chat)
    assert normalise(row, "sft", detect(row, "sft")) == Row(prompt=asked, chosen=answered)
    prompt = normalise(row, "prompts", detect(row, "prompts"))
    assert (prompt.prompt, prompt.columns["answer"]) == (asked, "4")  # for the reward
    row = prepare(
        {"ask": "2+2?", "chosen": "4", "rejected": [{"role": "assistant", "content": "5"}]},
        Data(chat=True, columns={"prompt": "ask"}),
    )
    pair = normalise(row, "preferences", detect(row, "preferences"))
    assert (pair.prompt, pair.chosen, pair.rejected[0]["content"]) == (asked, answered, "5")
    assert prepare({"messages": asked}, chat) == {"messages": asked}
    assert prepare({"question": "2+2?"}, Data()) == {"question": "2+2?"}
    with pytest.raises(BadRow, match=r"data.chat is true and there is no column prompt, question or messages; found chosen"):
        prepare({"chosen": "\n\nHuman: a\n\nAssistant: b"}, chat)
