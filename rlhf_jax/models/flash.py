"""Attention kernels of accelerators, behind the same signature as `attention.attend`.

Splash (Pallas) on TPU, cuDNN on GPU. Neither builds [B, heads, T, T] scores. What a kernel cannot do (ALiBi, sinks, soft-caps
on GPU, float32 on GPU) stays dense, and `resolve` says so once.
"""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from rlhf_jax.models.attention import Attend, Keys, pick, within_window
from rlhf_jax.models.spec import Spec

BLOCK = 128  # the smallest block of the splash kernel, tokens


def resolve(attention: str, spec: Spec, compute_dtype: Any, mesh: Mesh | None) -> str:
    """What "dense" or "flash" means on these devices: "dense", "cudnn" or "splash"."""
    if attention == "dense":
        return "dense"
    if attention != "flash":
        raise ValueError(f"attention is {attention!r}; it must be dense or flash")
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    kernel = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}.get(platform)
    why = ""
    if kernel is None:
        why = f"there is no flash kernel for {platform}"
    elif spec.positions == "alibi" or spec.sinks:
        why = "no flash kernel here knows ALiBi or attention sinks"
    elif kernel == "cudnn" and (spec.attention_cap is not None or jnp.dtype(compute_dtype) == jnp.float32):
        why = "cuDNN's kernel knows neither soft-caps nor float32; set compute_dtype to bfloat16"
    if why:
        warnings.warn(f"attention: flash is computed as dense attention: {why}", stacklevel=3)
        return "dense"
    return kernel or "dense"


def make_cudnn(keys: Keys, windows: list[int | None]) -> Attend:
    """cuDNN's fused attention; the mask is that of the dense form."""
    visible = tuple(within_window(keys, window) for window in windows)

    def apply(q: jax.Array, k: jax.Array, v: jax.Array, window: Any, scale: Any, sinks: None) -> jax.Array:
        q = q * jnp.asarray(scale, q.dtype)
        mask = pick(visible, window)[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=1.0, implementation="cudnn")

    return _of_last_tokens(apply)


def make_splash(spec: Spec, keys: Keys, windows: list[int | None], mesh: Mesh | None, *, interpret: bool = False) -> Attend:
    """Splash attention: causal or windowed blocks are skipped; padding and packing are segments.

    Windows count array indices here: right as long as no padding lies between two tokens of a row.
    """
    segments: Any = keys.segments
    length = segments.shape[1]
    padded = -(-length // BLOCK) * BLOCK
    segments = jnp.pad(segments, ((0, 0), (0, padded - length)))

    def one(window: int | None, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        kernel = _kernel(padded, window, q.shape[1], spec.attention_cap, interpret)
        return jax.vmap(kernel)(q, k, v, _segment_ids(segments))

    def apply(q: jax.Array, k: jax.Array, v: jax.Array, window: Any, scale: Any, sinks: None) -> jax.Array:
        q = q * jnp.asarray(scale, q.dtype)
        room = ((0, 0), (0, padded - length), (0, 0), (0, 0))
        parts = [jnp.pad(x, room).swapaxes(1, 2) for x in (q, k, v)]
        branches = [_sharded(functools.partial(one, w), mesh, q.shape[2], k.shape[2]) for w in windows]
        if len(branches) == 1 or isinstance(window, int):
            out = branches[0 if len(branches) == 1 else window](*parts, segments)
        else:
            out = jax.lax.switch(window, branches, *parts, segments)
        return out.swapaxes(1, 2)[:, :length].astype(q.dtype)

    return _of_last_tokens(apply)


def _of_last_tokens(attend: Attend) -> Attend:
    """The kernel, where q may be of the last tokens only: it is run on as many queries as keys, the first ones zero."""

    def apply(q: jax.Array, k: jax.Array, *rest: Any) -> jax.Array:
        missing = k.shape[1] - q.shape[1]
        return attend(jnp.pad(q, ((0, 0), (missing, 0), (0, 0), (0, 0))), k, *rest)[:, missing:]

    return apply


def _sharded(fn: Any, mesh: Mesh | None, heads: int, kv_heads: int) -> Any:
    """The kernel on each device's own rows and heads: the partitioner does not look into Pallas calls."""
    if mesh is None or mesh.size == 1:
        return fn
    split = mesh.shape["tensor"]
    axis = "tensor" if heads % split == 0 and kv_heads % split == 0 else None
    here = jax.sharding.get_abstract_mesh()
    own = tuple(here.manual_axes)  # within `parallel.each_shard` the rows are this shard's own already
    batch = tuple(name for name in ("data", "fsdp") if name not in own) or None
    rows, heads_spec = PartitionSpec(batch, None), PartitionSpec(batch, axis, None, None)
    return jax.shard_map(
        fn,
        mesh=here if own else mesh,
        in_specs=(heads_spec, heads_spec, heads_spec, rows),
        out_specs=heads_spec,
        axis_names=set(mesh.axis_names) - set(own),
        check_vma=False,
    )


def _kernel(length: int, window: int | None, heads: int, cap: float | None, interpret: bool) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (length, length)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    block = int(np.gcd(length, 512))
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return kernels.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        attn_logits_soft_cap=cap,
        residual_checkpoint_name="attention",  # its sums too: without them the backward pass runs the kernel again
        interpret=interpret,
    )


def _segment_ids(segments: jax.Array) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    return kernels.SegmentIds(segments, segments)
