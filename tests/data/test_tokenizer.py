"""The tokenizer: equal to AutoTokenizer on recorded cases, trained on the spot, saved, and honest about what files leave open."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import directories
import numpy as np
import pytest

from rlhf_jax.data.tasks import TASKS
from rlhf_jax.data.tokenizer import TEMPLATE, load_tokenizer, read_template, train_bpe
from rlhf_jax.data.vocabulary import Tokenizer, clean, make_tokenizer
from rlhf_jax.errors import UserError

HERE = Path(__file__).parent / "tokenizers"
FAMILIES = ("gpt2", "llama3", "qwen2")  # pad == eos and no bos; adds bos, two eos; AutoTokenizer rebuilds the pre-tokenizer
TEXTS = ["plain text", " 17 * 23 =\n391", "emoji 😀 中文字 שלום \x00 end", "tabs\t\tand\r\nlines\n\n"]


def _cases(family: str) -> dict:
    return json.loads((HERE / family / "cases.json").read_text())


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(["the cat sat on the mat. the dog sat too!"] * 20, 300)


def _copy(family: str, target: Path, **changes: object) -> Path:
    """A tokenizer directory with keys of its configuration changed; None deletes."""
    shutil.copytree(HERE / family, target)
    file = target / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    return target


@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_transformers_on_recorded_cases(family: str):
    cases, tokenizer = _cases(family), load_tokenizer(HERE / family)
    assert [tokenizer.encode(text, start=True) for text in cases["texts"]] == cases["ids"]
    assert [tokenizer.encode(text) for text in cases["texts"]] == cases["ids_without_special"]
    assert [tokenizer.decode(ids, skip_special=False) for ids in cases["ids"]] == cases["decoded"]
    assert [tokenizer.decode(np.asarray(ids)) for ids in cases["ids"]] == cases["decoded_skip_special"]
    assert tokenizer.render_chat(cases["messages"], add_generation_prompt=True) == cases["chat_text"]
    ids, trained = tokenizer.apply_chat(cases["messages"], add_generation_prompt=True)
    assert ids == cases["chat_ids"]
    assert not any(trained)
    assert (tokenizer.pad_id, tokenizer.bos_id) == (cases["pad_id"], cases["bos_id"])
    assert tokenizer.eos_id == cases["eos_id"]


@pytest.mark.parametrize("family", FAMILIES)
def test_assistant_mask_agrees_with_transformers_and_ends_with_eos(family: str):
    cases, tokenizer = _cases(family), load_tokenizer(HERE / family)
    ids, trained = tokenizer.apply_chat(cases["messages"][:2])
    count = len(cases["assistant_ids"])
    assert ids[:count] == cases["assistant_ids"]
    assert [int(own) for own in trained[:count]] == cases["assistant_masks"]
    assert trained[-1]
    assert ids[-1] in tokenizer.eos_ids
    assert tokenizer.decode([i for i, own in zip(ids, trained, strict=True) if own]) == "It is 3."


def test_a_template_that_prints_bos_does_not_get_a_second_one():
    cases, tokenizer = _cases("llama3"), load_tokenizer(HERE / "llama3")
    assert cases["chat_ids_if_text_is_encoded_again"][:2] == [1, 1]
    ids, _ = tokenizer.apply_chat(cases["messages"], add_generation_prompt=True)
    assert ids.count(1) == 1


def test_generation_config_adds_its_end_of_sequence_tokens():
    assert load_tokenizer(HERE / "llama3").eos_ids == (2, 4)


def test_a_hub_name_is_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    directory = directories.on_hub(tmp_path, HERE / "llama3")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", tmp_path)
    found, wanted = load_tokenizer("org/tiny"), load_tokenizer(directory)
    assert (found.eos_ids, found.hash, found.source) == ((2, 4), wanted.hash, directory)
    with pytest.raises(UserError, match="org/other: no such directory, and the hub cannot be read"):
        load_tokenizer("org/other")


def test_without_generation_markers_the_mask_comes_from_prefixes(tmp_path: Path):
    template = (
        (HERE / "qwen2" / "chat_template.jinja").read_text().replace("{% generation %}", "").replace("{% endgeneration %}", "")
    )
    (tmp_path / "t.jinja").write_text(template)
    marked, plain = (
        load_tokenizer(HERE / "qwen2"),
        load_tokenizer(HERE / "qwen2", chat_template=read_template(tmp_path / "t.jinja")),
    )
    messages = [*_cases("qwen2")["messages"], {"role": "assistant", "content": "Yes."}]
    assert plain.apply_chat(messages) == marked.apply_chat(messages)
    ids, trained = plain.apply_chat(messages, prompt_messages=3)
    assert plain.decode([i for i, own in zip(ids, trained, strict=True) if own], skip_special=False) == "Yes.<|im_end|>"


def test_tokens_after_the_end_of_a_turn_are_not_trained(tmp_path: Path):
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = load_tokenizer(HERE / "qwen2", chat_template=read_template(tmp_path / "t.jinja"))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    ids, trained = tokenizer.apply_chat(messages)
    own = [i for i, keep in zip(ids, trained, strict=True) if keep]
    assert tokenizer.decode(own, skip_special=False) == "b<|im_end|>b<|im_end|>"
    assert ids[-1] == tokenizer.eos_id


@pytest.mark.parametrize("mark", ["", "generation", "endgeneration"])
def test_end_of_sequence_behind_the_last_message(tmp_path: Path, mark: str):
    """Phi-3's template, and TRL's of it with marks: an answer is trained up to the first token that ends it, as it is sampled."""
    begin, end = ("{% generation %}", "{% endgeneration %}") if mark else ("", "")
    last = f"{begin}{{{{ eos_token }}}}{end}" if mark == "endgeneration" else "{{ eos_token }}"
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        f"{{% if m['role'] == 'assistant' %}}{begin}{{{{ m['content'] }}}}<|im_end|>{{{{ '\n' }}}}{end}"
        "{% else %}{{ m['content'] }}<|im_end|>{{ '\n' }}{% endif %}{% endfor %}"
        f"{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% else %}}{last}{{% endif %}}"
    )
    directory = _copy("qwen2", tmp_path / "phi", eos_token="<|endoftext|>")
    ends = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
    ids_of = {token["content"]: token["id"] for token in ends}
    (directory / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [ids_of["<|endoftext|>"], ids_of["<|im_end|>"]]})
    )
    tokenizer = load_tokenizer(directory, chat_template=template)
    assert tokenizer.eos_id == ids_of["<|endoftext|>"]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert tokenizer.render_chat(messages, add_generation_prompt=False).endswith("b<|im_end|>\n<|endoftext|>")
    for turns, wanted in ((1, "b<|im_end|>"), (2, "b<|im_end|>b<|im_end|>")):
        ids, trained = tokenizer.apply_chat(messages * turns)
        own = [i for i, keep in zip(ids, trained, strict=True) if keep]
        assert tokenizer.decode(own, skip_special=False) == wanted
        assert ids[-1] == ids_of["<|im_end|>"]
        assert ids == tokenizer.apply_chat((messages * turns)[:-1], add_generation_prompt=True)[0] + own[-2:]


def test_what_begins_a_conversation_does_not_end_its_first_answer():
    """Where the beginning of a text is spelled as its end (GPT-2)."""
    tokenizer = load_tokenizer(
        HERE / "qwen2", chat_template="{{ eos_token }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    )
    ids, trained = tokenizer.apply_chat([{"role": "assistant", "content": "b"}])
    assert tokenizer.decode(ids, skip_special=False) == "<|im_end|>b<|im_end|>"
    assert all(trained)


def test_a_template_that_rewrites_the_past_is_refused(tmp_path: Path):
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ loop.revindex }}{{ m['content'] }}{% endfor %}")
    tokenizer = load_tokenizer(HERE / "qwen2", chat_template=read_template(tmp_path / "t.jinja"))
    with pytest.raises(UserError, match="generation"):
        tokenizer.apply_chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2)


def test_templates_see_tools_and_documents_as_transformers_gives_them():
    template = "{% if tools is defined and tools is none and documents is none %}none{% else %}{{ tools | tojson }}{% endif %}"
    tokenizer = load_tokenizer(HERE / "qwen2", chat_template=template)
    assert tokenizer.render_chat([{"role": "user", "content": "a"}], add_generation_prompt=True) == "none"


def test_tokens_that_end_an_answer_may_stand_in_the_configuration(tmp_path: Path):
    """Where there is no generation_config.json, transformers takes config.json's, which may be nested."""
    directory = _copy("llama3", tmp_path / "a")
    (directory / "generation_config.json").unlink()
    for content in ({"eos_token_id": [2, 7]}, {"text_config": {"eos_token_id": [2, 7]}}):
        (directory / "config.json").write_text(json.dumps({"model_type": "llama"} | content))
        assert load_tokenizer(directory).eos_ids == (2, 7)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    assert load_tokenizer(directory).eos_ids == (2,)
    for name, content in (("generation_config", {"eos_token_id": "</s>"}), ("config", {"model_type": ["llama"]})):
        (directory / f"{name}.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=rf"{name}.json: {next(iter(content))} is .*; it must be"):
            load_tokenizer(directory)
        (directory / f"{name}.json").unlink()


def test_templates_that_raise_or_do_not_compile(tmp_path: Path):
    messages = [{"role": "system", "content": "a"}]
    (tmp_path / "t.jinja").write_text("{{ raise_exception('System role not supported') }}")
    with pytest.raises(UserError, match=r"roles \['system'\]: System role not supported"):
        load_tokenizer(HERE / "qwen2", chat_template=read_template(tmp_path / "t.jinja")).render_chat(
            messages, add_generation_prompt=True
        )
    (tmp_path / "t.jinja").write_text("{% for m in %}")
    with pytest.raises(UserError, match="chat template: line 1"):
        load_tokenizer(HERE / "qwen2", chat_template=read_template(tmp_path / "t.jinja")).render_chat(
            messages, add_generation_prompt=True
        )
    with pytest.raises(UserError, match=r"model.chat_template"):
        read_template(tmp_path / "none.jinja")


def test_a_template_cannot_reach_python(tmp_path: Path):
    (tmp_path / "t.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    tokenizer = load_tokenizer(HERE / "qwen2", chat_template=read_template(tmp_path / "t.jinja"))
    with pytest.raises(UserError, match="unsafe"):
        tokenizer.render_chat([{"role": "user", "content": "a"}], add_generation_prompt=False)


def test_messages_without_a_template_are_refused(tmp_path: Path):
    directory = _copy("gpt2", tmp_path / "t")
    (directory / "chat_template.jinja").unlink()
    tokenizer = load_tokenizer(directory)
    assert any("no chat template" in line for line in tokenizer.policies)
    with pytest.raises(UserError, match=r"model\.chat_template"):
        tokenizer.apply_chat([{"role": "user", "content": "a"}])


def test_no_pad_no_eos_and_unknown_tokens(tmp_path: Path):
    no_pad = load_tokenizer(_copy("llama3", tmp_path / "a", pad_token=None))
    assert no_pad.pad_id == no_pad.eos_id == 2
    assert any(line.startswith("no pad_token") for line in no_pad.policies)
    no_eos = load_tokenizer(_copy("llama3", tmp_path / "b", eos_token=None))
    assert no_eos.eos_ids == (2, 4)
    assert any(line.startswith("no eos_token") for line in no_eos.policies)
    directory = _copy("llama3", tmp_path / "c", eos_token=None)
    (directory / "generation_config.json").unlink()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load_tokenizer(directory)
    assert any("pad_token is end-of-sequence" in line for line in load_tokenizer(HERE / "gpt2").policies)


def test_missing_and_broken_directories(tmp_path: Path):
    with pytest.raises(UserError, match=r"model.tokenizer=<directory"):
        load_tokenizer(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match=rf"is the directory of a run, not of a model; its model is {tmp_path / 'final'}"):
        load_tokenizer(tmp_path)
    for name in ("nodir", tmp_path / "no" / "dir"):
        with pytest.raises(UserError, match=f"{name}: no such directory"):  # and no hub is asked for a minute
            load_tokenizer(name)
    directory = _copy("llama3", tmp_path / "a")
    (directory / "tokenizer_config.json").write_text('{\n"a": }')
    with pytest.raises(UserError, match=r"tokenizer_config\.json:2:6: not JSON"):
        load_tokenizer(directory)


def test_trained_bpe_round_trips_and_repeats(bpe: Tokenizer):
    assert [bpe.decode(bpe.encode(text)) for text in TEXTS] == TEXTS
    again = train_bpe(["the cat sat on the mat. the dog sat too!"] * 20, 300)
    assert again.hash == bpe.hash
    assert len({bpe.pad_id, bpe.bos_id, bpe.eos_id}) == 3
    assert bpe.encode("the", start=True) == [bpe.bos_id, *bpe.encode("the")]
    assert bpe.decode([bpe.bos_id, *bpe.encode("the"), bpe.eos_id, bpe.pad_id]) == "the"
    assert bpe.decode(bpe.encode("\ud83d lone")) == "\ufffd lone"
    assert clean("a\ud83d\ude00") == "a😀"
    with pytest.raises(UserError, match="at least 263"):
        train_bpe(["a"], 200)


def test_the_default_template_marks_assistants_and_starts_like_a_prompt(bpe: Tokenizer):
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    ids, trained = bpe.apply_chat(messages)
    assert bpe.decode(ids, skip_special=False) == "<bos><|user|>the cat<|assistant|>sat<eos>"
    assert bpe.decode([i for i, own in zip(ids, trained, strict=True) if own], skip_special=False) == "sat<eos>"
    prompt, _ = bpe.apply_chat(messages[:1], add_generation_prompt=True)
    assert ids[: len(prompt)] == prompt


def test_conversation_text_is_encoded_as_the_prompt_is(bpe: Tokenizer):
    # Encoded in one go "the" and " cat" of different pieces may merge; by pieces training sees what sampling sees.
    pieces = bpe.encode_pieces(["the ca", "t sat"])
    assert pieces == [bpe.encode("the ca"), bpe.encode("t sat")]


def test_a_tokenizer_that_prepends_a_space_is_cut_at_offsets():
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    words = ["<s>", "</s>", "<unk>", "▁", "▁a", "▁b", "a", "b", "c"]
    backend = Backend(models.Unigram([(word, -float(n)) for n, word in enumerate(words)], unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = make_tokenizer(backend, {"eos_token": "</s>", "bos_token": "<s>"})
    assert tokenizer.prepends_space
    head, tail = tokenizer.encode_pieces(["a b", "c a"])
    assert (head, tail) == ([4, 5], [8, 4])
    assert tokenizer.decode(head + tail) == "a bc a"


@pytest.mark.parametrize("name", sorted(TASKS))
def test_task_tokenizers_round_trip(name: str):
    task, tokenizer = TASKS[name], TASKS[name].tokenizer()
    assert not tokenizer.prepends_space
    for row in task.rows("sft", 0)[:50]:
        text = f"{row['prompt']} {row['completion']}" if name == "reviews" else row["prompt"] + row["completion"]
        assert tokenizer.decode(tokenizer.encode(text, start=True)) == text
        assert 3 not in tokenizer.encode(text)


def test_stop_strings_are_one_token(bpe: Tokenizer):
    assert bpe.token_id("<eos>") == bpe.eos_id
    assert TASKS["reviews"].tokenizer().token_id("good") > 3
    cases = [("bpe", "zebra"), ("reviews", "wonderful"), ("reviews", "good good"), ("addition", "\n"), ("addition", "")]
    for name, text in cases:
        with pytest.raises(UserError, match=f"stop: {re.escape(repr(text))} is .* must be a single token"):
            (bpe if name == "bpe" else TASKS[name].tokenizer()).token_id(text)


def test_saving_keeps_the_files_and_everything_loads_in_transformers(tmp_path: Path, bpe: Tokenizer):
    """The one test that pays for importing transformers: light and heavy readers agree on every tokenizer here."""
    from transformers import AutoTokenizer

    made = {"bpe": bpe, "reviews": TASKS["reviews"].tokenizer(), "addition": TASKS["addition"].tokenizer()}
    made |= {family: load_tokenizer(HERE / family) for family in FAMILIES}
    for name, tokenizer in made.items():
        tokenizer.save(tmp_path / name)
        theirs, ours = AutoTokenizer.from_pretrained(tmp_path / name), load_tokenizer(tmp_path / name)
        texts = {"reviews": ["the hotel : i liked the pool ."], "addition": ["12+34=46"]}.get(name, TEXTS)
        for text in texts:
            ids = theirs(text)["input_ids"]
            assert ours.encode(text, start=True) == tokenizer.encode(text, start=True) == ids, name
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), name
        assert (theirs.pad_token_id, theirs.eos_token_id) == (tokenizer.pad_id, tokenizer.eos_id)
        assert theirs.chat_template == tokenizer.chat_template
        if name in FAMILIES:
            assert (tmp_path / name / "tokenizer.json").read_bytes() == (HERE / name / "tokenizer.json").read_bytes()
        else:
            assert ours.hash == tokenizer.hash
    # AutoTokenizer rebuilds the pre-tokenizer of model type qwen2, whatever tokenizer.json says; so must we.
    foreign = _copy("qwen2", tmp_path / "foreign")
    body = json.loads((foreign / "tokenizer.json").read_text())
    body["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    (foreign / "tokenizer.json").write_text(json.dumps(body))
    assert load_tokenizer(foreign).encode("the answer") == AutoTokenizer.from_pretrained(foreign)("the answer")["input_ids"]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "bpe")
    found = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    ids, trained = bpe.apply_chat(messages)
    assert (found["input_ids"], found["assistant_masks"]) == (ids, [int(own) for own in trained])


def test_reading_a_plain_tokenizer_does_not_import_transformers():
    code = (
        "import sys; from rlhf_jax.data.tokenizer import load_tokenizer; load_tokenizer(sys.argv[1]); "
        "print('transformers' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(HERE / "llama3")]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE.parents[2])
    assert run.stdout.strip() == "False"


def test_the_template_of_trained_tokenizers_is_complete():
    assert TEMPLATE.count("{%") == TEMPLATE.count("%}")
