"""`config.json` as both generations of transformers, vLLM and SGLang read it."""

import json
from typing import Any

from rlhf_jax.models.families import family_of
from rlhf_jax.models.rope import parameters_of
from rlhf_jax.models.rules import Family
from rlhf_jax.models.spec import Spec
from rlhf_jax.types import Calibration

FULL, SLIDING = "full_attention", "sliding_attention"


def export_config(
    spec: Spec, head: str, dtype: str, *, pad_id: int | None = None, eos: Any = None, calibration: Calibration
) -> dict[str, Any]:
    """The config the spec was made from, with the class of the head, the dtype and both spellings of the rope.

    A config in version 5's spelling alone is read by version 4 in silence, and wrongly.

    Args:
        head: "lm", "score" or "value"; dtype: name of the stored dtype; pad_id: padding token, else the config's;
            eos: what ends an answer, one id or a list. For both see `_pad_token`.
    """
    family = family_of(spec.model_type)
    config = json.loads(spec.origin)
    config["architectures"] = [class_name(family, head)]
    config["tie_word_embeddings"] = spec.tied
    for part in (config, config["text_config"]) if "text_config" in config else (config,):
        part |= {"dtype": dtype, "torch_dtype": dtype}
        part |= both_ropes(part, family)
        if head != "lm":
            part["pad_token_id"] = _pad_token(part.get("pad_token_id") if pad_id is None else pad_id, eos, calibration)
    if head != "lm":
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "problem_type": "regression"}
        config |= {"classifier_dropout": 0.0, "mean": calibration.mean, "std": calibration.std}
    return config


def _pad_token(pad_id: int | None, eos: Any, calibration: Calibration) -> int | None:
    """The reward model's own, or one that ends no answer: transformers would read the score of the token before the end.

    Without one it reads the last token, and refuses several rows at once. The key is there, for classes have defaults (Phi-3's
    is its end-of-sequence).
    """
    if calibration.pad_id is not None:
        return calibration.pad_id
    return None if pad_id in (eos if isinstance(eos, list) else [eos]) else pad_id


def class_name(family: Family, head: str) -> str:
    """The class in transformers that the exported files are for."""
    score = family.score or f"{family.name}ForSequenceClassification"
    if head == "value" and family.value is not None:
        return family.value or f"{family.name}ForTokenClassification"
    return (family.lm or f"{family.name}ForCausalLM") if head == "lm" else score


def both_ropes(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """The keys of the rope in the spelling that `config` does not have, or that does not count (see `rope.parameters_of`)."""
    parameters = config.get("rope_parameters") or {}
    if not parameters or (config.get("rope_scaling") and FULL not in parameters):
        return _newer(config)
    full = dict(parameters_of(config, FULL))
    old: dict[str, Any] = {"rope_theta": full.pop("rope_theta", config.get("rope_theta"))}
    if SLIDING in parameters:
        old["rope_local_base_freq"] = parameters[SLIDING].get("rope_theta")
    partial = full.pop("partial_rotary_factor", None)
    if partial is not None:
        old["partial_rotary_factor"] = partial
    old["rope_scaling"] = full if full.get("rope_type", "default") != "default" else None
    return old | (family.old_config(config, dict(parameters)) if family.old_config else {})


def _newer(config: dict[str, Any]) -> dict[str, Any]:
    """Version 5's spelling of version 4's keys, where the layers share one rope and the base is given."""
    theta = config.get("rope_theta") or config.get("rotary_emb_base")
    if theta is None or config.get("layer_types") or config.get("rope_local_base_freq"):
        return {}
    scaling = dict(config.get("rope_scaling") or {})
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    partial = config.get("partial_rotary_factor", config.get("rotary_pct"))
    extra = {} if partial is None else {"partial_rotary_factor": partial}
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta} | extra | scaling}
