"""Small models of every family, as keyword arguments of transformers' configuration classes.

Each peculiarity of a family is in some variant, with values far from every default (eps 5e-3, windows of 6, ropes shorter
than the sequences), so that reading the wrong key shows. Weights are drawn by `draw`, from NumPy's frozen generator and the
tensor's name, so that tests need only the reference outputs and not the weights.
"""

import zlib
from typing import Any

import numpy as np

EPS, WINDOW, VOCAB = 5e-3, 6, 96
SLIDING, FULL = "sliding_attention", "full_attention"


def rope(theta: float, kind: str = "default", **parameters: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **parameters}


def llama_like(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": EPS,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "rope_parameters": rope(100.0),
    } | changes


def derived_head_dim(**changes: Any) -> dict[str, Any]:
    """For the classes that know no head_dim: 3 heads of 12, one key-value head."""
    settings = llama_like(hidden_size=36, num_attention_heads=3, num_key_value_heads=1)
    del settings["head_dim"]
    return settings | changes


def plain(**changes: Any) -> dict[str, Any]:
    return {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | changes


LLAMA3 = rope(500.0, "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = rope(100.0, "yarn", factor=4.0, original_max_position_embeddings=64)
YARN_MSCALE = YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 1.3}
LONGROPE = rope(
    100.0,
    "longrope",
    partial_rotary_factor=0.75,
    short_factor=[1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
    long_factor=[1.0, 1.5, 2.5, 4.0, 6.0, 9.0],
    original_max_position_embeddings=24,
)
NEOX = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "layer_norm_eps": EPS}
FALCON = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "ffn_hidden_size": 56, "layer_norm_epsilon": EPS}
OPT = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "layer_norm_epsilon": EPS}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GEMMA3_ROPES = {FULL: rope(1000.0, "linear", factor=4.0), SLIDING: rope(50.0)}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", llama_like()),
    "llama_tied_odd_heads": ("llama", llama_like(num_attention_heads=6, num_key_value_heads=3, head_dim=10, hidden_size=30,
                                                 tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "llama_linear_biases": ("llama", llama_like(num_key_value_heads=1, attention_bias=True, mlp_bias=True,
                                                rope_parameters=rope(100.0, "linear", factor=4.0))),
    "llama_dynamic": ("llama", llama_like(max_position_embeddings=12, rope_parameters=rope(100.0, "dynamic", factor=3.0))),
    "llama_yarn": ("llama", llama_like(num_key_value_heads=4, rope_parameters=YARN_MSCALE)),
    "qwen2": ("qwen2", derived_head_dim(num_hidden_layers=3, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1,
                                        tie_word_embeddings=True)),
    "qwen2_yarn": ("qwen2", derived_head_dim(rope_parameters=YARN)),
    "qwen3": ("qwen3", llama_like(tie_word_embeddings=True, rope_parameters=rope(1000.0))),
    "qwen3_biases": ("qwen3", llama_like(attention_bias=True, head_dim=12, num_key_value_heads=1, use_sliding_window=True,
                                         sliding_window=WINDOW, max_window_layers=1)),
    "qwen3_moe": ("qwen3_moe", llama_like(**MOE, num_hidden_layers=3, norm_topk_prob=True, mlp_only_layers=[1])),
    "qwen3_moe_sparse_steps": ("qwen3_moe", llama_like(**MOE, num_hidden_layers=4, norm_topk_prob=False, decoder_sparse_step=2)),
    "mistral": ("mistral", llama_like(sliding_window=WINDOW)),
    "mistral_nemo": ("mistral", llama_like(sliding_window=None, hidden_size=40, num_attention_heads=5, num_key_value_heads=1)),
    "ministral": ("ministral", llama_like(sliding_window=WINDOW, layer_types=[FULL, SLIDING])),
    "mixtral": ("mixtral", llama_like(num_local_experts=4, num_experts_per_tok=2, intermediate_size=24)),
    "gemma": ("gemma", llama_like(num_key_value_heads=1, tie_word_embeddings=True)),
    "gemma2": ("gemma2", llama_like(num_hidden_layers=4, sliding_window=WINDOW, query_pre_attn_scalar=24,
                                    tie_word_embeddings=True, attn_logit_softcapping=4.0, final_logit_softcapping=4.0)),
    "gemma3_text": ("gemma3_text", llama_like(num_hidden_layers=4, sliding_window=WINDOW, query_pre_attn_scalar=24,
                                              layer_types=[SLIDING, SLIDING, FULL, SLIDING], tie_word_embeddings=True,
                                              rope_parameters=GEMMA3_ROPES)),
    "olmo2": ("olmo2", derived_head_dim()),
    "olmo3": ("olmo3", derived_head_dim(num_hidden_layers=4, sliding_window=WINDOW, max_position_embeddings=256,
                                        rope_parameters={FULL: YARN | {"rope_theta": 500000.0}, SLIDING: rope(500000.0)})),
    "phi": ("phi", plain(**NEOX | {"num_key_value_heads": 2}, max_position_embeddings=128, qk_layernorm=True,
                         rope_parameters=rope(100.0, partial_rotary_factor=0.5))),
    "phi3": ("phi3", derived_head_dim(hidden_size=48, sliding_window=WINDOW, max_position_embeddings=96,
                                      original_max_position_embeddings=24, rope_parameters=LONGROPE)),
    "phi3_plain": ("phi3", derived_head_dim(num_attention_heads=6, num_key_value_heads=3, hidden_size=48, sliding_window=None,
                                            tie_word_embeddings=True)),
    "smollm3": ("smollm3", derived_head_dim(num_hidden_layers=4, tie_word_embeddings=True, no_rope_layers=[1, 0, 1, 0])),
    "smollm3_windows": ("smollm3", derived_head_dim(num_hidden_layers=4, no_rope_layer_interval=2, use_sliding_window=True,
                                                    sliding_window=WINDOW)),
    "gpt_oss": ("gpt_oss", llama_like(num_local_experts=4, num_experts_per_tok=2, intermediate_size=24, sliding_window=WINDOW,
                                      rope_parameters=YARN | {"truncate": False, "factor": 32.0})),
    "gpt2": ("gpt2", plain(**GPT2)),
    "gpt2_scaled": ("gpt2", plain(**GPT2, n_inner=40, scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True)),
    "gpt_neox": ("gpt_neox", plain(**NEOX, rope_parameters=rope(100.0, partial_rotary_factor=0.25))),
    "gpt_neox_serial": ("gpt_neox", plain(**NEOX, use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True,
                                          rope_parameters=rope(100.0, partial_rotary_factor=1.0))),
    "opt": ("opt", plain(**OPT)),
    "opt_350m": ("opt", plain(**OPT, do_layer_norm_before=False, word_embed_proj_dim=20)),
    "gptj": ("gptj", plain(n_embd=32, n_layer=2, n_head=4, n_inner=40, rotary_dim=4, n_positions=64, layer_norm_epsilon=EPS)),
    "falcon_7b": ("falcon", plain(**FALCON, rope_parameters=rope(100.0))),
    "falcon_40b": ("falcon", plain(**FALCON, num_kv_heads=2, new_decoder_architecture=True, rope_parameters=rope(100.0))),
    "falcon_11b": ("falcon", plain(**FALCON, num_kv_heads=3, new_decoder_architecture=True, num_ln_in_parallel_attn=1,
                                   tie_word_embeddings=False, rope_parameters=rope(100.0))),
    "falcon_rw": ("falcon", plain(**FALCON, alibi=True, multi_query=False, parallel_attn=False, bias=True)),
    "falcon_rw_12_heads": ("falcon", plain(**FALCON | {"num_attention_heads": 12}, alibi=True, multi_query=False,
                                           parallel_attn=False, bias=True)),
    "bloom": ("bloom", plain(hidden_size=36, n_layer=2, n_head=6, layer_norm_epsilon=EPS)),
}  # fmt: skip

# Eager Falcon adds ALiBi twice in transformers 5 (in the mask and in the layer); sdpa adds it once.
EAGER = {name: not name.startswith("falcon_rw") for name in VARIANTS}
LONG = ("llama_dynamic", "phi3")  # their ropes change with the length: one long row too
FAR = ("falcon_rw_12_heads",)  # rounds its slopes, and positions beyond 256: the end of a longer row too

# A second rope, under `rope_scaling`, for configs that have one under `rope_parameters`.
TWO_ROPES = {
    "llama": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama_linear_biases": {"type": "linear", "factor": 8.0},
    "qwen2": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 32},
    "gemma3_text": {"rope_type": "linear", "factor": 8.0},
    "olmo3": {"factor": 8.0, "original_max_position_embeddings": 32},
    "phi": {"rope_type": "linear", "factor": 2.0},
    "gpt_neox": {"rope_type": "linear", "factor": 2.0},
    "gpt_oss": {"rope_type": "linear", "factor": 2.0},
}  # fmt: skip


def draw(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """f32 weights of one stored tensor: matrices by fan-in, vectors 1 (norms) or 0 plus noise."""
    noise = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32).standard_normal(shape).astype(np.float32)
    if any(part in name for part in ("embed_tokens", "wte", "wpe", "embed_positions", "embed_in", "word_embeddings.")):
        return 0.4 * noise
    if len(shape) == 1 or name.endswith("_proj_bias"):
        centre = 1.0 if name.endswith("weight") and "norm" in name.replace("ln_", "norm").replace(".ln", ".norm") else 0.0
        return np.float32(centre) + 0.25 * noise
    fan_in = shape[-1] if len(shape) == 2 and "c_" not in name else shape[-2]
    gain = (
        2.0
        if any(part in name for part in ("q_proj", "k_proj", "query_key_value", "qkv_proj", "c_attn", "gate.weight", "router"))
        else 1.4
    )
    return noise * np.float32(gain / fan_in**0.5)
