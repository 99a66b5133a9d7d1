"""The models: one decoder, many families, real checkpoints in and out."""

from rlhf_jax.models.families.llama import scratch_spec
from rlhf_jax.models.spec import Spec
from rlhf_jax.models.transformer import make_model

__all__ = ["Spec", "make_model", "scratch_spec"]
