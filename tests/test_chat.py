"""The terminal: piped in, typed in, broken off."""

import io
import signal
import sys

import directories
import jax
import pytest

from rlhf_jax import chat, cli, config, generate, streaming
from rlhf_jax.chat import Conversation, answer_lines, command, printable, talk
from rlhf_jax.errors import UserError
from rlhf_jax.streaming import Piece, Streamer


@pytest.fixture(scope="module")
def streamer():
    generator = generate.open_model(directories.language_model(), mesh=config.Mesh(data=1, fsdp=1), devices=jax.devices()[:1])
    return Streamer(generator, streaming.context_of(generator))


@pytest.fixture
def conversation(streamer):
    return Conversation(streamer, max_new_tokens=12, temperature=1.0, top_p=1.0, seed=3)


class Scripted:
    """A streamer whose answers are written down; an exception among the pieces is raised there."""

    max_length = 128

    def __init__(self, real, *answers):
        self.generator, self.answers, self.asked = real.generator, list(answers), []

    def room(self, ids):
        return 10

    def stream(self, ask):
        self.asked.append(self.generator.tokenizer.decode(ask.ids, skip_special=False))
        for text in self.answers.pop(0):
            if text is KeyboardInterrupt:
                signal.raise_signal(signal.SIGINT)
            else:
                yield Piece(0, text, ())


def typed(monkeypatch, *lines):
    """What the keyboard gives; None: Ctrl-C at the prompt; in the end Ctrl-D."""
    waiting = list(lines)

    def read(prompt=""):
        if not waiting:
            raise EOFError
        line = waiting.pop(0)
        if line is None:
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", read)


def test_one_answer_a_line(conversation, streamer):
    out = io.StringIO()
    answer_lines(conversation, io.StringIO("what is 2 + 3 ?\n\n/system be brief\nand 4 ?\n/quit\nnever read\n"), out)
    lines = out.getvalue().splitlines()
    said = [message["content"] for message in conversation.messages if message["role"] == "assistant"]
    one, other = (printable(text).strip().replace("\n", "\\n") for text in said)
    assert lines == [one, "", other], "a blank line has its place among the answers, and the model is not asked"
    assert [message["role"] for message in conversation.messages] == ["system", "user", "assistant", "user", "assistant"]
    again = Conversation(streamer, max_new_tokens=12, temperature=1.0, top_p=1.0, seed=3)
    assert "".join(again.answer("what is 2 + 3 ?")) == said[0]


def test_the_model_sees_what_was_said_through_its_template(streamer):
    scripted = Scripted(streamer, ["it is", " 5"], ["it is 6"], ["hello"])
    conversation = Conversation(scripted, 10, 1.0, 1.0, 0)
    answer_lines(conversation, io.StringIO("2 + 3 ?\n/system brief\n3 + 3 ?\n/reset\nhi\n"), io.StringIO())
    assert scripted.asked == [
        "<bos><|user|>2 + 3 ?<|assistant|>",
        "<bos><|system|>brief<|user|>2 + 3 ?<|assistant|>it is 5<eos><|user|>3 + 3 ?<|assistant|>",
        "<bos><|system|>brief<|user|>hi<|assistant|>",
    ]


def test_without_a_template_it_is_a_transcript(streamer):
    generator = generate.open_model(
        directories.language_model(chat=False), mesh=config.Mesh(data=1, fsdp=1), devices=jax.devices()[:1]
    )
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2 + 3 ?"}]
    messages += [{"role": "assistant", "content": " 5"}, {"role": "user", "content": "sure ?"}]
    ids, stops = generate.encode_conversation(generator.tokenizer, messages)
    assert generator.tokenizer.decode(ids) == "be brief\n\nHuman: 2 + 3 ?\n\nAssistant: 5\n\nHuman: sure ?\n\nAssistant:"
    assert stops == ("\n\nHuman:",)
    assert ids[0] == generator.tokenizer.bos_id
    assert generate.encode_conversation(streamer.generator.tokenizer, messages)[1] == ()


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(streamer, monkeypatch, capsys):
    conversation = Conversation(Scripted(streamer, ["once ", "upon", KeyboardInterrupt, " a time"], ["yes"]), 10, 1.0, 1.0, 0)
    typed(monkeypatch, "tell me", None, "go on")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        talk(conversation, "runs/ppo/final")
    finally:
        signal.signal(signal.SIGINT, before)
    out = capsys.readouterr().out
    assert "once upon" in out
    assert "stopped, 9 characters in" in out
    assert "a time" not in out
    assert [message["content"] for message in conversation.messages] == ["tell me", "once upon", "go on", "yes"]


def test_commands_on_a_terminal(streamer, monkeypatch, capsys):
    conversation = Conversation(Scripted(streamer, ["\x1b[31mred\x07 [bold] 3:100:2\n"]), 10, 1.0, 1.0, 0)
    typed(monkeypatch, "/help", "/system be [kind]", "/wizard", "hi", "  ", "/reset", "/quit", "never read")
    talk(conversation, "m")
    out = capsys.readouterr().out
    assert "[31mred [bold] 3:100:2" in out, "markup and emoji codes of the model's are text, its control characters are gone"
    assert "\x1b[31m" not in out
    assert "/wizard is no command" in out
    assert "system message set" in out
    assert conversation.messages == [{"role": "system", "content": "be [kind]"}]
    assert command(conversation, "/system") == "no system message"
    assert conversation.messages == []


def test_a_conversation_that_is_too_long_says_so_and_forgets_nothing(conversation, monkeypatch, capsys):
    conversation.system("b" * 120)
    with pytest.raises(UserError, match="the prompt has 12. tokens and the model takes 128.*/reset starts afresh"):
        answer_lines(conversation, io.StringIO("what is it ?\n"), io.StringIO())
    typed(monkeypatch, "what is it ?", "/system", "what is it ?")
    talk(conversation, "m")
    out = capsys.readouterr().out
    assert "/reset starts afresh" in out
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]


def test_the_command(monkeypatch, capsys):
    """`echo question | rlhf-jax chat DIR`, and directories that cannot talk."""

    def run(directory, text="2 + 3 ?\n", *options):
        monkeypatch.setattr(sys, "argv", ["rlhf-jax", "chat", str(directory), "--max-new-tokens", "5", *options])
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        captured = capsys.readouterr()
        return exit_info.value.code, captured.out, captured.err

    status, out, err = run(directories.language_model(), "2 + 3 ?\n", "--system", "brief")
    assert (status, len(out.splitlines()), err) == (0, 1, "")
    status, out, err = run(directories.language_model(chat=False))
    assert (status, len(out.splitlines())) == (0, 1)
    assert "no chat template: answers continue a plain transcript" in err
    status, out, err = run(directories.reward_model())
    assert (status, out) == (2, "")
    assert "is a reward model or a critic: it scores answers and gives none" in err
    assert run("nowhere") == (
        2,
        "",
        "rlhf-jax: nowhere: no such directory; give a directory in Hugging Face layout or a hub name like org/model\n",
    )
    assert run(directories.language_model(), "/wizard\n")[0] == 2
    with pytest.raises(UserError, match="standard input is not ascii: .*; PYTHONIOENCODING names another"):
        answer_lines(None, io.TextIOWrapper(io.BytesIO("é\n".encode()), encoding="ascii"), io.StringIO())
    assert chat.printable("a\x1b\x9b\tb\n\x7f") == "a\tb\n"
