"""Checkpoints of the variants, made from the stored configs and the drawn weights, and what transformers said of them."""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import variants as cases

from rlhf_jax.models import safetensors_file as st

# Programs here are compiled once and run once: let XLA compile fast rather than well.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
MIXTURES = ("qwen3_moe", "qwen3_moe_sparse_steps", "mixtral", "gpt_oss")


class Reference(NamedTuple):
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


@functools.cache
def _file() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).with_name("references.npz")) as file:
        return dict(file)


def tokens(kind: str, side: str = "left") -> tuple[np.ndarray, np.ndarray]:
    """i32[B, T] and bool[B, T] of "rows", "prompts", "long" or "far"."""
    ids, mask = _file()[f"tokens/{kind}"], _file()[f"mask/{kind}"].astype(bool)
    if side == "left":
        return ids, mask
    order = np.argsort(~mask, axis=1, kind="stable")
    return np.take_along_axis(ids, order, 1), np.take_along_axis(mask, order, 1)


def reference(name: str) -> Reference:
    about = json.loads(_file()["about"].tobytes())["variants"][name]
    tensors = {n: cases.draw(n, tuple(shape), about["seed"]) for n, shape in about["shapes"].items()}
    prefix = f"{name}/"
    outputs = {key.removeprefix(prefix): value for key, value in _file().items() if key.startswith(prefix)}
    return Reference(about["config"], tensors, outputs)


def score_weight(name: str, width: int) -> np.ndarray:
    return cases.draw("score.weight", (1, width), json.loads(_file()["about"].tobytes())["variants"][name]["seed"])


def write(directory: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """A model directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    st.write(directory / "model.safetensors", {n: (x.shape, x.dtype) for n, x in tensors.items()}, tensors.items())
    return directory


def checkpoint(directory: Path, name: str, *, head: str = "lm") -> Path:
    """The directory of a variant, as a language model or with a scalar head."""
    found = reference(name)
    tensors = dict(found.tensors)
    if head != "lm":
        tensors = {n: x for n, x in tensors.items() if not n.startswith(("lm_head", "embed_out"))}
        embedding = next(
            x for n, x in tensors.items() if any(k in n for k in ("embed_tokens", "wte", "embed_in", "word_embeddings."))
        )
        tensors["score.weight"] = score_weight(name, embedding.shape[1])
    return write(directory / name, found.config, tensors)


def greedy(model: Any, params: Any, ids: jax.Array, mask: jax.Array, number: int) -> jax.Array:
    """i32[B, number]: the likeliest token again and again, with the cache."""
    params = model.for_decoding(params)
    width = ids.shape[1]
    slots = width + number
    states, cache = model.prefill(params, ids, mask, slots)
    last = width - 1 - jnp.argmax(mask[:, ::-1], 1)
    best = jnp.argmax(model.logits(params, jnp.take_along_axis(states, last[:, None, None], 1)[:, 0]), -1)
    lengths = mask.sum(1)
    order = jnp.arange(slots)[None]
    in_prompt = jnp.pad(mask, ((0, 0), (0, number)))

    def step(carry: tuple, t: jax.Array) -> tuple[tuple, jax.Array]:
        cache, token = carry
        valid = in_prompt | ((order >= width) & (order <= width + t))
        state, cache = model.decode(params, cache, token, lengths + t, width + t, valid)
        return (cache, jnp.argmax(model.logits(params, state), -1)), token

    (_, end), out = jax.lax.scan(step, (cache, best), jnp.arange(number - 1))
    return jnp.concatenate([out.T, end[:, None]], 1)
