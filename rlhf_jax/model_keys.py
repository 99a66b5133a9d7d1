"""What kind of value a key of `config.json` or `generation_config.json` has, checked where the file is read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_jax.errors import UserError


class Rule(NamedTuple):
    """What a value must be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


def _whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _number(x: Any) -> bool:
    return _whole(x) or isinstance(x, float)


def _list(x: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(x, list) and all(map(of, x))


def _text(x: Any) -> bool:
    return isinstance(x, str)


# A key may be null wherever some family's null means something.
_KINDS = {
    Rule("a whole number of at least 1", lambda x: _whole(x) and x >= 1): """
        vocab_size hidden_size intermediate_size ffn_dim n_embd n_embed num_hidden_layers n_layer num_attention_heads n_head
        n_positions""",
    Rule("a number above 0", lambda x: _number(x) and x > 0): """
        rms_norm_eps layer_norm_eps layer_norm_epsilon query_pre_attn_scalar""",
    Rule("a whole number of at least 0, or null", lambda x: x is None or (_whole(x) and x >= 0)): """
        num_key_value_heads num_kv_heads head_dim n_inner ffn_hidden_size rotary_dim word_embed_proj_dim num_experts
        num_local_experts num_experts_per_tok moe_intermediate_size decoder_sparse_step num_ln_in_parallel_attn
        max_position_embeddings sliding_window max_window_layers sliding_window_pattern _sliding_window_pattern
        no_rope_layer_interval""",
    Rule("a number, or null", lambda x: x is None or _number(x)): """
        rope_theta rope_local_base_freq rotary_emb_base rotary_pct partial_rotary_factor original_max_position_embeddings factor
        low_freq_factor high_freq_factor beta_fast beta_slow mscale mscale_all_dim attention_factor attn_logit_softcapping
        final_logit_softcapping swiglu_limit swiglu_alpha mean std pad_token_id""",
    Rule("true, false or null", lambda x: x is None or isinstance(x, bool)): """
        tie_word_embeddings attention_bias mlp_bias qk_layernorm norm_topk_prob use_sliding_window use_parallel_residual
        alibi bias multi_query parallel_attn new_decoder_architecture do_layer_norm_before enable_bias
        layer_norm_elementwise_affine _remove_final_layer_norm scale_attn_weights scale_attn_by_inverse_layer_idx
        apply_residual_connection_post_layernorm add_cross_attention use_bidirectional_attention truncate""",
    Rule("text, or null", lambda x: x is None or _text(x)): """
        model_type hidden_act hidden_activation activation activation_function rope_type type""",
    Rule("a list of texts, or null", lambda x: x is None or _list(x, _text)): "architectures layer_types",
    Rule("a list of numbers, or null", lambda x: x is None or _list(x, _number)): """
        mlp_only_layers no_rope_layers short_factor long_factor""",
    Rule("a token's number, a list of them, or null", lambda x: x is None or _whole(x) or _list(x, _whole)): "eos_token_id",
    Rule("an object, or null", lambda x: x is None or isinstance(x, dict)): """
        text_config rope_parameters rope_scaling full_attention sliding_attention quantization_config""",
}  # fmt: skip
RULES = {key: rule for rule, keys in _KINDS.items() for key in keys.split()}


def check(path: Path, content: dict[str, Any], within: str = "") -> None:
    """Refuse a value of another kind, in the objects within the file too.

    Raises:
        UserError: the file, the key, its value and what it must be.
    """
    for key, value in content.items():
        rule = RULES.get(key)
        if rule is None:
            continue
        if not rule.holds(value):
            raise UserError(
                f"{path}: {within}{key} is {json.dumps(value)}; it must be {rule.words}; correct it, or download the file again"
            )
        if isinstance(value, dict):
            check(path, value, f"{within}{key}.")
