"""Models that start from random weights."""

from rlhf_jax import config as settings
from rlhf_jax.errors import UserError
from rlhf_jax.models.families import spec_of
from rlhf_jax.models.spec import Spec


def scratch_spec(scratch: settings.Scratch, vocab_size: int, *, real_vocab: int | None = None) -> Spec:
    """The Llama-type model that `model.scratch` describes.

    Args:
        vocab_size: rows of the embedding; real_vocab: tokens of the tokenizer, where they are fewer.
    """
    head_dim, rest = divmod(scratch.width, scratch.heads)
    if rest or head_dim % 2:
        raise UserError(
            f"model.scratch: width {scratch.width} / heads {scratch.heads} is not an even whole number; change one of them"
        )
    if scratch.heads % scratch.kv_heads:
        raise UserError(f"model.scratch: kv_heads {scratch.kv_heads} does not divide heads {scratch.heads}; change one of them")
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab_size,
        "hidden_size": scratch.width,
        "intermediate_size": scratch.mlp_width,
        "num_hidden_layers": scratch.layers,
        "num_attention_heads": scratch.heads,
        "num_key_value_heads": scratch.kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": scratch.max_length,
        "rope_parameters": {"rope_type": "default", "rope_theta": scratch.rope_theta},
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": scratch.tied,
    }
    return spec_of(config, real_vocab=real_vocab)
