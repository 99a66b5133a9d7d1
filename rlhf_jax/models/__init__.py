"""The models: one decoder, many families, real checkpoints in and out."""

from rlhf_jax.hub import find
from rlhf_jax.models.families import FAMILIES, spec_of
from rlhf_jax.models.known import KNOWN
from rlhf_jax.models.load import Checkpoint, has_scalar_head, load_checkpoint, read_spec
from rlhf_jax.models.recompute import without_cache
from rlhf_jax.models.rope import at_fixed_length
from rlhf_jax.models.save import save_checkpoint
from rlhf_jax.models.scratch import scratch_spec
from rlhf_jax.models.spec import Spec
from rlhf_jax.models.transformer import make_model

__all__ = [
    "FAMILIES",
    "KNOWN",
    "Checkpoint",
    "Spec",
    "at_fixed_length",
    "find",
    "has_scalar_head",
    "load_checkpoint",
    "make_model",
    "read_spec",
    "save_checkpoint",
    "scratch_spec",
    "spec_of",
    "without_cache",
]
