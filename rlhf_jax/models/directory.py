"""A model directory in Hugging Face layout: what it holds, and why it is refused."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax import model_keys
from rlhf_jax.errors import UserError
from rlhf_jax.models import safetensors_file as st

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)


class Tokens(NamedTuple):
    """Special tokens as the model's own files give them."""

    pad_id: int | None
    stop_ids: tuple[int, ...]  # generation_config's list where there is one, else config.json's


class Tensors:
    """The tensors of a directory, over all its files."""

    def __init__(self, directory: Path):
        self.files = {name: st.Reader(directory / name) for name in shard_names(directory)}
        self.place = {tensor: name for name, reader in self.files.items() for tensor in reader.entries}

    def shape(self, name: str) -> tuple[int, ...]:
        return self.files[self.place[name]].entries[name].shape

    def dtype(self, name: str) -> str:
        return self.files[self.place[name]].entries[name].code

    def array(self, name: str) -> np.ndarray:
        return self.files[self.place[name]].array(name)

    def release(self, name: str) -> None:
        self.files[self.place[name]].release(name)


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {path.parent} is not a model directory in Hugging Face layout") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a JSON object, is {type(content).__name__}")
    return content


def read_config(directory: Path) -> dict[str, Any]:
    """`config.json`.

    Raises:
        UserError: the directory holds an adapter alone; the file asks for code of its own, its weights are quantised, or a
            value is not of its key's kind.
    """
    if any(directory.glob("adapter_*")) and not any((directory / name).is_file() for name in (INDEX, SINGLE)):
        raise UserError(
            f"{directory}: holds a LoRA adapter, not a model; give the directory of its base model, and to a run the adapter as "
            "model.lora.path"
        )
    path = directory / "config.json"
    config = read_json(path)
    model_keys.check(path, config)
    for part in (config, config.get("text_config") or {}):
        if "auto_map" in part:
            raise UserError(
                f"{path}: auto_map asks for code from the model's repository, which is never run here; if the weights are those "
                f"of a plain {part.get('model_type')!r} model, remove the key auto_map"
            )
        if part.get("quantization_config"):
            kind = part["quantization_config"].get("quant_method", "unknown")
            raise UserError(f"{path}: the weights are quantised ({kind}); load the bfloat16 or float32 version of the model")
    return config


def tokens(directory: Path, config: dict[str, Any]) -> Tokens:
    path = directory / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    model_keys.check(path, generation)
    text = config.get("text_config") or {}
    eos = next((found for c in (generation, config, text) if (found := c.get("eos_token_id")) is not None), ())
    pad = next((found for c in (config, text, generation) if (found := c.get("pad_token_id")) is not None), None)
    return Tokens(pad, tuple(eos) if isinstance(eos, (list, tuple)) else (eos,))


def shard_names(directory: Path) -> list[str]:
    """Names of the safetensors files, all of them plain files of this directory.

    Raises:
        UserError: there are none (only pickles, perhaps), they are there twice, or the index points elsewhere.
    """
    index = directory / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index}: has no weight_map; download it again")
        names = sorted({str(name) for name in weight_map.values()})
        if SINGLE not in names and (directory / SINGLE).is_file():
            raise UserError(
                f"{index}: names other files than {SINGLE}, which is there too and which transformers would read; "
                "remove either that file, or the index and the files that it names"
            )
    elif (directory / SINGLE).is_file():
        names = [SINGLE]
    else:
        raise UserError(_why_no_weights(directory))
    for name in names:
        _confine(directory, index, name)
    return names


def _confine(directory: Path, index: Path, name: str) -> None:
    """Refuse a shard outside the directory; the hub's cache, which links to its own blobs, is inside."""
    if not re.fullmatch(r"[\w.-]+\.safetensors", name) or name.startswith("."):
        raise UserError(f"{index}: names the file {name!r}; shards must be plain .safetensors files of the same directory")
    path = directory / name
    if not path.is_file():
        raise UserError(f"{path}: no such file, though {index.name} names it; download it again")
    allowed = [directory.resolve()]
    if directory.parent.name == "snapshots":
        allowed.append(directory.parent.parent.resolve() / "blobs")
    if path.resolve().parent not in allowed:
        raise UserError(f"{path}: is a link to {path.resolve()}, outside the model's directory; copy the file there")


def _why_no_weights(directory: Path) -> str:
    pickles = sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt")) + sorted(directory.glob("*.pth"))
    if not pickles:
        return f"{directory}: has neither {SINGLE} nor {INDEX}"
    kinds = ("SequenceClassification", "TokenClassification")
    name = str((read_config(directory).get("architectures") or [""])[0])
    model = "AutoModelFor" + next((kind for kind in kinds if name.endswith(kind)), "CausalLM")
    return (
        f"{pickles[0]}: weights are pickles, which can run code when they are read, and are refused. Convert them once, where "
        f'torch and transformers are installed: python -c "from transformers import {model}, AutoTokenizer; '
        f"[c.from_pretrained('{directory}').save_pretrained('{directory}-safetensors') for c in ({model}, AutoTokenizer)]\""
    )
