"""Every supported `model_type`. A family is data: a spec made from `config.json`, and a map of its tensors."""

import dataclasses
import difflib
import json
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.models.families.bloom import BLOOM
from rlhf_jax.models.families.falcon import FALCON
from rlhf_jax.models.families.gemma import GEMMA, GEMMA2, GEMMA3, GEMMA3_TEXT
from rlhf_jax.models.families.gpt2 import GPT2
from rlhf_jax.models.families.gpt_neox import GPT_NEOX
from rlhf_jax.models.families.gpt_oss import GPT_OSS
from rlhf_jax.models.families.gptj import GPTJ
from rlhf_jax.models.families.llama import LLAMA
from rlhf_jax.models.families.mistral import MINISTRAL, MISTRAL, MIXTRAL
from rlhf_jax.models.families.olmo import OLMO2, OLMO3
from rlhf_jax.models.families.opt import OPT
from rlhf_jax.models.families.phi import PHI
from rlhf_jax.models.families.phi3 import PHI3
from rlhf_jax.models.families.qwen import QWEN2, QWEN3, QWEN3_MOE
from rlhf_jax.models.families.smollm3 import SMOLLM3
from rlhf_jax.models.rules import Family
from rlhf_jax.models.spec import Spec

FAMILIES: dict[str, Family] = {
    "bloom": BLOOM,
    "falcon": FALCON,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "gemma3_text": GEMMA3_TEXT,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "gpt_oss": GPT_OSS,
    "gptj": GPTJ,
    "llama": LLAMA,
    "ministral": MINISTRAL,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "olmo2": OLMO2,
    "olmo3": OLMO3,
    "opt": OPT,
    "phi": PHI,
    "phi3": PHI3,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "smollm3": SMOLLM3,
}


def family_of(model_type: str) -> Family:
    """The family of a `model_type`; UserError with the nearest name if there is none."""
    if model_type not in FAMILIES:
        near = difflib.get_close_matches(model_type, FAMILIES, n=1, cutoff=0.0)
        known = ", ".join(FAMILIES)
        raise UserError(
            f"config.json: model_type {model_type!r} is not supported; the nearest is {near[0]!r}. Supported: {known}"
        )
    return FAMILIES[model_type]


def spec_of(config: dict[str, Any], *, real_vocab: int | None = None) -> Spec:
    """The spec of a `config.json`, which it remembers for export.

    Args:
        real_vocab: tokens of the tokenizer; rows of the embedding beyond them are never sampled.
    Raises:
        UserError: the architecture is not supported, a key is missing, or the tokenizer has more tokens than the embedding.
    """
    model_type = config.get("model_type")
    if not model_type:
        known = ", ".join(FAMILIES)
        raise UserError(f"config.json: model_type is missing, which names the architecture; add it. Supported: {known}")
    try:
        made = family_of(model_type).spec(config)
    except KeyError as error:
        raise UserError(f"config.json: {error.args[0]} is missing; a {model_type} model cannot be described without it") from None
    return dataclasses.replace(made, model_type=model_type, real_vocab=real_vocab, origin=json.dumps(config, sort_keys=True))
