"""A tokenizer as a record: text to ids and back, special tokens by name, conversations with the assistant's tokens marked."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_jax.data import chat
from rlhf_jax.data.formats import Message
from rlhf_jax.errors import UserError

GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
# How byte-level vocabularies spell bytes (GPT-2): printable ones as themselves, the others as U+0100 and on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(_OTHERS)}
NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("tokenizer.model", "chat_template.jinja", "chat_template.json"),
)


@dataclass(frozen=True)
class Tokenizer:
    """Ids are ints below `vocab_size`. Padding is never inferred from `pad_id`: masks are explicit everywhere."""

    backend: Any  # tokenizers.Tokenizer
    names: dict[str, str | None]  # bos_token, eos_token, pad_token, unk_token
    bos_id: int | None
    pad_id: int
    eos_id: int  # what ends an answer in training; the first of eos_ids
    eos_ids: tuple[int, ...]  # what ends an answer in sampling: the tokenizer's and generation_config's
    start_ids: tuple[int, ...]  # what encoding a text puts in front of it
    prepends_space: bool  # a piece encoded alone begins with a space (SentencePiece)
    chat_template: str | None
    policies: tuple[str, ...]  # what was decided where the files are silent
    source: Path | None  # directory it was read from; its files are exported verbatim
    vocab_size: int = 0
    hash: str = ""

    def encode(self, text: str, *, start: bool = False) -> list[int]:
        """Ids of a text; with `start` the ids that begin a sequence (such as bos) in front."""
        ids = self._ids(clean(text))
        return [*self.start_ids, *ids] if start else ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ids (any integer sequence)."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def piece(self, number: int) -> bytes:
        """What a token adds within a text, UTF-8: also a part of a character, and the space before a word."""
        before = [self.eos_id]
        added = self.decode([*before, number], skip_special=False).removeprefix(self.decode(before, skip_special=False))
        if "\ufffd" not in added:
            return added.encode()
        token = self.backend.id_to_token(number)
        if found := re.fullmatch("<0x([0-9A-F]{2})>", token):  # SentencePiece's bytes
            return bytes.fromhex(found[1])
        return bytes(_BYTES[char] for char in token) if all(char in _BYTES for char in token) else added.encode()

    def token_id(self, text: str) -> int:
        """The one token that a string is. Errors: `UserError` where it is none or several."""
        found = self.backend.token_to_id(text)
        if found is None:
            ids = self.encode(text)
            known = self.decode(ids, skip_special=False)
            if len(ids) != 1 or known != text:  # an unknown word is one token too
                raise UserError(
                    f"sampling.stop: {text!r} is tokens {ids}, which read {known!r}; a stop string must be a single "
                    "token: take one that the tokenizer has, or leave it out"
                )
            found = ids[0]
        return found

    def render_chat(self, messages: list[Message], *, add_generation_prompt: bool) -> str:
        """Messages as text, by the chat template."""
        return chat.render(self._template(), messages, add_generation_prompt, self.names)

    def apply_chat(
        self, messages: list[Message], *, add_generation_prompt: bool = False, prompt_messages: int = 0
    ) -> tuple[list[int], list[bool]]:
        """Ids of a conversation and which of them the assistant wrote (up to and including the token at which sampling
        ends its turn).

        Assistant turns among the first `prompt_messages` do not count as written. With `add_generation_prompt` the ids are those
        of a prompt. Without, and where the template ends the last assistant message with no end-of-sequence token, `eos_id` is
        added: it stays in the loss.
        """
        if add_generation_prompt:
            text, spans = self.render_chat(messages, add_generation_prompt=True), []
        else:
            text, spans = chat.render_with_spans(self._template(), messages, self.names)
            spans = spans[sum(message["role"] == "assistant" for message in messages[:prompt_messages]) :]
        pieces, written = _cut(text, spans)
        ids: list[int] = []
        trained: list[bool] = []
        for piece, own in zip(self.encode_pieces(pieces), written, strict=True):
            keep = 0
            if own:
                said = next((number for number, token in enumerate(piece) if token not in self.eos_ids), 0)
                keep = next((n + 1 for n, token in enumerate(piece) if n >= said and token in self.eos_ids), len(piece))
            ids += piece
            trained += [number < keep for number in range(len(piece))]
        if spans and messages[-1]["role"] == "assistant":
            last = max((number for number, own in enumerate(trained) if own), default=len(ids) - 1)
            ids, trained = ids[: last + 1], trained[: last + 1]
            if not ids or ids[-1] not in self.eos_ids:
                ids, trained = [*ids, self.eos_id], [*trained, True]
        return ids, trained

    def encode_pieces(self, pieces: list[str]) -> list[list[int]]:
        """Ids of consecutive pieces of one text.

        Each piece is encoded by itself, as a prompt is when the model answers it, so that training sees the tokens that
        sampling sees. A tokenizer that puts a space before every text gets the whole, divided at its offsets.
        """
        pieces = [clean(piece) for piece in pieces]
        if not self.prepends_space:
            return [self._ids(piece) if piece else [] for piece in pieces]
        whole = self.backend.encode("".join(pieces), add_special_tokens=False)
        out: list[list[int]] = [[] for _ in pieces]
        edges = [sum(map(len, pieces[: number + 1])) for number in range(len(pieces))]
        number = 0
        for token, (_, end) in zip(whole.ids, whole.offsets, strict=True):
            while number < len(pieces) - 1 and end > edges[number]:
                number += 1
            out[number].append(token)
        return out

    def save(self, directory: str | Path) -> None:
        """Write the files that transformers' AutoTokenizer loads; those of a loaded tokenizer are copied verbatim."""
        out = Path(directory)
        out.mkdir(parents=True, exist_ok=True)
        if self.source is not None and (self.source / "tokenizer.json").exists():
            for name in FILES:
                if (self.source / name).exists() and (self.source / name).resolve() != (out / name).resolve():
                    shutil.copyfile(self.source / name, out / name)
        else:
            # Not `save`, which raises a bare Exception where the disk is full.
            (out / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        self._save_config(out / "tokenizer_config.json")
        if self.chat_template is not None:
            (out / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")

    def _save_config(self, file: Path) -> None:
        settings = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        written = {
            # The name that every version of transformers knows; version 5 writes TokenizersBackend, which version 4 refuses.
            "tokenizer_class": settings.get("tokenizer_class", GENERIC_CLASSES[0]).replace(
                GENERIC_CLASSES[1], GENERIC_CLASSES[0]
            ),
            "padding_side": "left",
            "clean_up_tokenization_spaces": settings.get("clean_up_tokenization_spaces", False),
        }
        names = {key: value for key, value in self.names.items() if value is not None and settings.get(key) is None}
        if self.chat_template is not None:
            written["chat_template"] = self.chat_template
        file.write_text(json.dumps(settings | names | written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _ids(self, text: str) -> list[int]:
        # The fast form leaves offsets out, which cost a quarter of the time.
        return self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def _template(self) -> str:
        if self.chat_template is None:
            raise UserError(
                "the data has messages but the tokenizer has no chat template; set model.chat_template=<jinja file>, "
                "or give the data as plain prompt and completion strings"
            )
        return self.chat_template


def clean(text: str) -> str:
    """A text that UTF-8 can hold: lone surrogates, which JSON can spell, become U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _cut(text: str, spans: chat.Spans) -> tuple[list[str], list[bool]]:
    """Divide a text at its spans: pieces, and whether each lies inside one."""
    pieces, inside, at = [], [], 0
    for begin, end in spans:
        pieces += [text[at:begin], text[begin:end]]
        inside += [False, True]
        at = end
    return [*pieces, text[at:]], [*inside, False]


def make_tokenizer(
    backend: Any,
    names: Mapping[str, str | None],
    *,
    chat_template: str | None = None,
    more_eos: Iterable[int] = (),
    source: Path | None = None,
) -> Tokenizer:
    """A record around a `tokenizers.Tokenizer`: decides what the files leave open, and says so in `policies`.

    Errors: `UserError` for a named token outside the vocabulary, and where nothing ends a sequence.
    """
    backend.no_truncation()
    backend.no_padding()
    known = {key: names.get(key) for key in NAMES}
    ids = {}
    for key, name in known.items():
        ids[key] = None if name is None else backend.token_to_id(name)
        if name is not None and ids[key] is None:
            raise UserError(f"tokenizer {source or ''}: {key} {name!r} is not in the vocabulary; mend tokenizer_config.json")
    policies = []
    eos_ids = tuple(dict.fromkeys(([] if ids["eos_token"] is None else [ids["eos_token"]]) + [int(i) for i in more_eos]))
    if not eos_ids:
        raise UserError(f"tokenizer {source or ''}: no end-of-sequence token; name one as eos_token in tokenizer_config.json")
    if ids["eos_token"] is None:
        policies.append(f"no eos_token: token {eos_ids[0]} of generation_config.json ends a sequence")
    pad = ids["pad_token"]
    if pad is None:
        pad = eos_ids[0]
        policies.append(
            f"no pad_token: padding is filled with token {pad}; masks tell it from the real one, which stays in the loss"
        )
    elif pad in eos_ids:
        policies.append(f"pad_token is end-of-sequence (token {pad}): masks tell them apart, the real one stays in the loss")
    if chat_template is None:
        policies.append("no chat template: plain text only; messages are refused unless model.chat_template is set")
    probe = "a"
    with_special, without = backend.encode(probe).ids, backend.encode(probe, add_special_tokens=False).ids
    start = tuple(with_special[: _find(with_special, without)])
    twice = backend.decode(without + without, skip_special_tokens=True)
    body = hashlib.sha256(backend.to_str().encode())
    body.update(json.dumps([known, chat_template, eos_ids, pad], sort_keys=True).encode())
    return Tokenizer(
        backend=backend,
        names=known,
        bos_id=ids["bos_token"],
        pad_id=pad,
        eos_id=eos_ids[0],
        eos_ids=eos_ids,
        start_ids=start,
        prepends_space=bool(without) and len(twice) > 2 and " " in twice and not _word_level(backend),
        chat_template=chat_template,
        policies=tuple(policies),
        source=source,
        vocab_size=backend.get_vocab_size(),
        hash=body.hexdigest()[:16],
    )


def _word_level(backend: Any) -> bool:
    return type(backend.model).__name__ == "WordLevel"


def _find(ids: list[int], part: list[int]) -> int:
    """Where `part` begins in `ids`."""
    return next((at for at in range(len(ids) - len(part) + 1) if ids[at : at + len(part)] == part), 0)
