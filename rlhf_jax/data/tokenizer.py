"""Reading and making tokenizers.

`load_tokenizer` reads tokenizer.json with the `tokenizers` library wherever that is provably what transformers' AutoTokenizer
would do, because importing transformers costs seconds; elsewhere AutoTokenizer is asked and its backend taken.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf_jax import model_keys
from rlhf_jax.data.vocabulary import FILES, GENERIC_CLASSES, NAMES, Tokenizer, clean, make_tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.hub import find

# Architectures for which AutoTokenizer 5.x keeps tokenizer.json as it is when the class is the generic one (read in its source;
# tests compare). Qwen2 and Phi-3 are not: it rebuilds Qwen2's pre-tokenizer whatever the file says.
_PLAIN_TYPES = frozenset({
    "bloom", "falcon", "gemma", "gemma2", "gemma3", "gemma3_text", "gpt2", "gpt_neox", "gpt_oss", "gptj", "llama", "mistral",
    "mixtral", "olmo2", "olmo3", "opt", "phi", "qwen3", "qwen3_moe", "smollm3",
})  # fmt: skip

_ANY_OF = frozenset({*FILES, "tekken.json", "vocab.txt"})  # and *.model: what transformers can make a tokenizer of


def load_tokenizer(path: str | Path, *, chat_template: str | None = None) -> Tokenizer:
    """Read a tokenizer from a directory in Hugging Face layout (or by hub name, where there is a network).

    `chat_template` is a jinja template (its text) that replaces the tokenizer's own. Errors: `UserError`.
    """
    directory = find(path, weights=False)
    _refuse_no_tokenizer(directory)
    settings = _json(directory / "tokenizer_config.json")
    if _is_plain(directory, settings):
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_file(str(directory / "tokenizer.json"))
        names = {key: _name(settings.get(key)) for key in NAMES}
        own = _own_template(directory, settings)
    else:
        backend, names, own = _from_transformers(directory)
    return make_tokenizer(
        backend,
        names,
        chat_template=own if chat_template is None else chat_template,
        more_eos=_generation_eos(directory),
        source=directory,
    )


def _refuse_no_tokenizer(directory: Path) -> None:
    """What is plainly no tokenizer is told in our words, before transformers is imported."""
    if (directory / "run.json").is_file():
        raise UserError(f"{directory}: is the directory of a run, not of a model; its model is {directory / 'final'}")
    if not any(file.name in _ANY_OF or file.suffix == ".model" for file in directory.iterdir()):
        found = sorted(file.name for file in directory.iterdir()) or "an empty directory"
        raise UserError(
            f"{directory}: has no tokenizer.json (found: {found}); give a directory that has one, for a run with "
            "model.tokenizer=<directory with tokenizer.json and tokenizer_config.json>"
        )


def _is_plain(directory: Path, settings: dict[str, Any]) -> bool:
    """True where AutoTokenizer would use tokenizer.json as it stands."""
    body = _json(directory / "tokenizer.json")
    if not body or body.get("truncation") or settings.get("tokenizer_class") not in GENERIC_CLASSES:
        return False
    model_type = _json(directory / "config.json").get("model_type")
    if model_type is not None and model_type not in _PLAIN_TYPES:
        return False
    known = {token["content"]: token["id"] for token in body.get("added_tokens", [])}
    listed = {token["content"]: int(number) for number, token in settings.get("added_tokens_decoder", {}).items()}
    extras = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
    wanted = [_name(settings.get(key)) for key in NAMES] + [_name(extra) for extra in extras]
    changes = ("add_bos_token", "add_eos_token", "auto_map", "split_special_tokens", "fix_mistral_regex")
    return (
        not any(settings.get(key) is not None for key in changes)
        and all(known.get(content) == number for content, number in listed.items())
        and all(name is None or name in known for name in wanted)
        and body.get("post_processor") is not None
        and not settings.get("clean_up_tokenization_spaces")
        and not (directory / "tekken.json").exists()
    )


def _from_transformers(directory: Path) -> tuple[Any, dict[str, str | None], str | None]:
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:
        have = sorted(file.name for file in directory.iterdir())
        raise UserError(
            f"tokenizer {str(directory)!r} cannot be read: {str(error).splitlines()[0]} (found: {have}); "
            "give model.tokenizer=<directory with tokenizer.json and tokenizer_config.json>"
        ) from None
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"tokenizer {str(directory)!r} has no fast form (tokenizer.json); save it once with transformers as a fast tokenizer"
        )
    names = {key: None if getattr(loaded, key, None) is None else str(getattr(loaded, key)) for key in NAMES}
    template = loaded.chat_template
    return backend, names, template if isinstance(template, str) else (template or {}).get("default")


def read_template(path: str | Path) -> str:
    """The text of a chat template file. Errors: `UserError`."""
    return _read(Path(path), "model.chat_template")


def _own_template(directory: Path, settings: dict[str, Any]) -> str | None:
    if (directory / "chat_template.jinja").exists():
        return _read(directory / "chat_template.jinja", "chat_template.jinja")
    template = _json(directory / "chat_template.json").get("chat_template", settings.get("chat_template"))
    if isinstance(template, list):  # several by name, as version 4 wrote them
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _generation_eos(directory: Path) -> list[int]:
    """The tokens that end an answer, as transformers finds them: in generation_config.json, else in config.json."""
    config = _json(directory / "config.json")
    places = (_json(directory / "generation_config.json"), config, config.get("text_config") or {})
    found = next((each["eos_token_id"] for each in places if each.get("eos_token_id") is not None), [])
    return found if isinstance(found, list) else [found]


def _name(token: Any) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _read(file: Path, what: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what}: {str(file)!r} cannot be read as UTF-8 text ({error}); give an existing file") from None


def _json(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        value = json.loads(_read(file, "tokenizer"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}:{error.colno}: not JSON ({error.msg}); copy the file again") from None
    if not isinstance(value, dict):
        return {}
    model_keys.check(file, value)
    return value


# The template of tokenizers that are trained on the spot. A turn ends with end-of-sequence, which the assistant writes.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_SPECIALS = ("<pad>", "<bos>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>")


def train_bpe(texts: Iterable[str], size: int, out_dir: str | Path | None = None, *, chat_template: str = TEMPLATE) -> Tokenizer:
    """Train a byte-level BPE vocabulary of `size` tokens (specials and 256 bytes included), and save it where asked.

    Distinct <pad>, <bos> (put before every text) and <eos>, and a chat template. The same texts give the same vocabulary.
    Errors: `UserError` for a size below 263.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    least = 256 + len(_SPECIALS) + 1
    if size < least:
        raise UserError(f"model.scratch.vocabulary = {size}: a byte-level vocabulary needs at least {least} tokens")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(_SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator((clean(text) for text in texts), trainer)
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    tokenizer = make_tokenizer(backend, names, chat_template=chat_template)
    if out_dir is not None:
        tokenizer.save(out_dir)
        tokenizer = dataclasses.replace(tokenizer, source=Path(out_dir))
    return tokenizer


__all__ = ["TEMPLATE", "Tokenizer", "load_tokenizer", "make_tokenizer", "train_bpe"]
