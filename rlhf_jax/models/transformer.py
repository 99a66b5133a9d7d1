"""One decoder for every family: a `Spec` in, pure functions of the parameters out.

Parameters are nested dictionaries. In training the layers are stacked on a leading axis and scanned; what differs between
layers (window, rope, scale) is scanned beside them as integers that pick one of a few tables, so one scan covers them all.
For decoding `for_decoding` unstacks them into a list, because a scanned decode step copies its cache at every layer.
Left out: dropout (off in RLHF), the router's load-balancing loss, ring buffers for windows, and expert parallelism.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from rlhf_jax import types
from rlhf_jax.models import attention as attn
from rlhf_jax.models import rope as ropes
from rlhf_jax.models.experts import mixture
from rlhf_jax.models.heads import logits, score
from rlhf_jax.models.layers import dense, mlp, normalise
from rlhf_jax.models.params import axes, init, unstack
from rlhf_jax.models.spec import Experts, Spec, groups
from rlhf_jax.types import Params

Constrain = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]


def unconstrained(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """No sharding."""
    return x


class Tables(NamedTuple):
    """What the layers share, one entry for every distinct rope or window."""

    cos: tuple[jax.Array, ...]  # f32[B, T, dims / 2] each
    sin: tuple[jax.Array, ...]
    visible: tuple[jax.Array, ...]  # bool[B, T, S] each
    bias: jax.Array | None  # f32[B, heads, T, S]


class Cache(NamedTuple):
    """Keys and values of the tokens so far, one entry a layer."""

    keys: list[jax.Array]  # [B, S, kv_heads, head_dim]
    values: list[jax.Array]
    positions: jax.Array  # i32[B, S]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
    """A spec with the choices that do not change what it computes."""

    spec: Spec
    compute_dtype: Any = jnp.float32
    remat: str = "none"
    lora_scale: float = 1.0
    constrain: Constrain = unconstrained


def make_model(
    spec: Spec,
    *,
    compute_dtype: Any = jnp.float32,
    remat: str = "none",
    attention: str = "dense",
    constrain: Constrain = unconstrained,
    lora_scale: float = 1.0,
) -> types.Model:
    """The pure functions of a spec.

    Args:
        compute_dtype: of matrix products and activations; norms, softmax, logits and scores are float32 always.
        remat: what the backward pass recomputes: "none", "full", "dots" (all but matrix products), "save_attention".
        attention: "dense", or "flash" where the device has a kernel.
        constrain: (x, logical axes) -> x, pins the sharding of activations.
        lora_scale: alpha / rank of an adapter joined to the parameters.
    """
    d = Decoder(spec=spec, compute_dtype=compute_dtype, remat=remat, lora_scale=lora_scale, constrain=constrain)
    return types.Model(
        vocab_size=spec.vocab_size,
        init=lambda key, *, head="lm": init(spec, key, head=head),
        hidden=lambda params, tokens, mask, *, positions=None, segments=None: hidden(
            d, params, tokens, mask, positions=positions, segments=segments
        ),
        logits=lambda params, x: logits(spec, params, x),
        score=score,
        prefill=lambda params, tokens, mask, slots: prefill(d, params, tokens, mask, slots),
        decode=lambda params, cache, token, position, slot, valid: decode(d, params, cache, token, position, slot, valid),
        for_decoding=lambda params: unstack(spec, params, compute_dtype),
        axes=lambda params: axes(spec, params),
    )


# ------------------------------------------------------------------------------------------------------- the stack


def hidden(
    d: Decoder,
    params: Params,
    tokens: jax.Array,
    mask: jax.Array,
    *,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
) -> jax.Array:
    """States after the final norm, [B, T, D] in the compute dtype.

    Args:
        params: stacked, or as `for_decoding` leaves them.
        tokens: i32[B, T]; mask: bool[B, T], True on tokens.
        positions: i32[B, T]; default cumsum(mask) - 1, so that the width of the padding changes nothing.
        segments: i32[B, T], number of the packed sequence a token belongs to; it sees that one alone.
    """
    chex.assert_rank([tokens, mask], 2)
    chex.assert_equal_shape([tokens, mask])
    positions = positions_of(mask) if positions is None else positions
    tables = _tables(d.spec, attn.causal(mask.astype(bool), positions, segments), jnp.max(positions) + 1)
    x = _embed(d, params, tokens, positions)
    if isinstance(params.get("layers"), list):
        for p, kind in zip(params["layers"], _kinds(d.spec), strict=True):
            x, _ = _block(d, p, x, tables, kind, _whole)
        return _finish(d, params, x)
    for name, members in groups(d.spec).items():
        x = _scan(d, params[name], x, tables, [_kinds(d.spec)[i] for i in members])
    return _finish(d, params, x)


def positions_of(mask: jax.Array) -> jax.Array:
    """0, 1, 2, ... over the tokens of each row i32[B, T]; padding before them has 0."""
    return jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), 1) - 1, 0)


def prefill(d: Decoder, params: Params, tokens: jax.Array, mask: jax.Array, slots: int) -> tuple[jax.Array, Cache]:
    """Read the prompts: states [B, P, D] and a cache of `slots` tokens whose first P are filled.

    Args:
        params: as `for_decoding` leaves them; tokens: i32[B, P]; mask: bool[B, P], padding on either side.
    """
    chex.assert_rank([tokens, mask], 2)
    width = tokens.shape[1]
    positions = positions_of(mask)
    tables = _tables(d.spec, attn.causal(mask.astype(bool), positions, None), slots)
    x = _embed(d, params, tokens, positions)
    keys, values = [], []
    for p, kind in zip(params["layers"], _kinds(d.spec), strict=True):
        x, (k, v) = _block(d, p, x, tables, kind, _whole)
        keys.append(jnp.pad(k, ((0, 0), (0, slots - width), (0, 0), (0, 0))))
        values.append(jnp.pad(v, ((0, 0), (0, slots - width), (0, 0), (0, 0))))
    return _finish(d, params, x), Cache(keys, values, jnp.pad(positions, ((0, 0), (0, slots - width))))


def decode(
    d: Decoder, params: Params, cache: Cache, token: jax.Array, position: jax.Array, slot: jax.Array, valid: jax.Array
) -> tuple[jax.Array, Cache]:
    """One more token a row: its state [B, D], and the cache with it.

    Args:
        token, position: i32[B]; slot: i32[], where the cache is written, for all rows alike.
        valid: bool[B, S], slots that hold tokens of the row; later slots are ignored and `slot` itself is always seen.
    """
    chex.assert_rank([token, position, valid], [1, 1, 2])
    slots = valid.shape[1]
    order = jnp.arange(slots)[None]
    filled = jax.lax.dynamic_update_slice(cache.positions, position[:, None].astype(cache.positions.dtype), (0, slot))
    seen = (valid & (order < slot)) | (order == slot)
    tables = _tables(d.spec, attn.Keys(position[:, None], filled, seen[:, None]), slots)
    x = _embed(d, params, token[:, None], position[:, None])
    keys, values = [], []
    for p, kind, k, v in zip(params["layers"], _kinds(d.spec), cache.keys, cache.values, strict=True):
        x, (k, v) = _block(d, p, x, tables, kind, _into(k, v, slot))
        keys.append(k)
        values.append(v)
    return _finish(d, params, x)[:, 0], Cache(keys, values, filled)


def _whole(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sequence's own keys and values."""
    return k, v


def _into(keys: jax.Array, values: jax.Array, slot: jax.Array) -> Callable:
    """Writes the new key and value into the cache."""
    at = (0, slot, 0, 0)
    return lambda k, v: (jax.lax.dynamic_update_slice(keys, k, at), jax.lax.dynamic_update_slice(values, v, at))


class Kind(NamedTuple):
    """What one layer picks: numbers while the layers are a list, traced where they are scanned."""

    rope: Any  # index of its rope among the distinct ones
    window: Any
    scale: Any  # f32[], of the attention scores
    experts: Experts | None


def _distinct(spec: Spec) -> tuple[list, list]:
    """The ropes and the windows that occur, in order of appearance."""
    ropes_, windows = (list(dict.fromkeys(getattr(layer, name) for layer in spec.layers)) for name in ("rope", "window"))
    return ropes_, windows


def _kinds(spec: Spec) -> list[Kind]:
    ropes_, windows = _distinct(spec)
    return [Kind(ropes_.index(x.rope), windows.index(x.window), x.scale, x.experts) for x in spec.layers]


def _tables(spec: Spec, keys: attn.Keys, length: jax.Array | int) -> Tables:
    ropes_, windows = _distinct(spec)
    dims = 2 * max((len(rope.inv_freq) for rope in ropes_ if rope), default=0)
    turns = [ropes.cos_sin(rope, keys.query_positions, dims, length) for rope in ropes_]
    bias = None
    if spec.positions == "alibi":
        bias = attn.position_bias(keys, attn.alibi_slopes(spec.heads) * np.float32(spec.alibi_scale))
    visible = tuple(attn.within_window(keys, window) for window in windows)
    return Tables(tuple(c for c, _ in turns), tuple(s for _, s in turns), visible, bias)


def _pick(choices: tuple[jax.Array, ...], index: Any) -> jax.Array:
    if len(choices) == 1:
        return choices[0]
    return choices[index] if isinstance(index, int) else jax.lax.select_n(index, *choices)


def _scan(d: Decoder, stacked: Params, x: jax.Array, tables: Tables, kinds: list[Kind]) -> jax.Array:
    def body(x: jax.Array, layer: tuple) -> tuple[jax.Array, None]:
        p, rope, window, scale = layer
        return _block(d, p, x, tables, Kind(rope, window, scale, kinds[0].experts), _whole)[0], None

    numbers = [jnp.asarray([getattr(kind, name) for kind in kinds], jnp.int32) for name in ("rope", "window")]
    scales = jnp.asarray([kind.scale for kind in kinds], jnp.float32)
    return jax.lax.scan(_rematerialised(d.remat, body), x, (stacked, *numbers, scales))[0]


def _rematerialised(remat: str, body: Callable) -> Callable:
    policies = jax.checkpoint_policies
    match remat:
        case "none":
            return body
        case "full":
            policy = policies.nothing_saveable
        case "dots":
            policy = policies.dots_with_no_batch_dims_saveable
        case "save_attention":
            policy = policies.save_only_these_names("attention")
        case _:
            raise ValueError(f"remat is {remat!r}; it must be none, full, dots or save_attention")
    return jax.checkpoint(body, policy=policy, prevent_cse=False)


def _embed(d: Decoder, params: Params, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    # A table sharded over its columns and indexed directly makes GSPMD gather it whole and in vain: cast, pin, then index.
    table = d.constrain(params["embed"]["embedding"].astype(d.compute_dtype), ("vocab", None))
    x = table[tokens]
    if d.spec.embed_scale != 1.0:
        x *= jnp.asarray(d.spec.embed_scale, x.dtype)
    if "project_in" in params:
        x = dense(params["project_in"], x)
    if "positions" in params:
        x += params["positions"]["embedding"].astype(x.dtype)[positions + d.spec.position_offset]
    if "embed_norm" in params:
        x = normalise(d.spec, params["embed_norm"], x)
    return d.constrain(x, ("batch", "seq", None))


def _finish(d: Decoder, params: Params, x: jax.Array) -> jax.Array:
    if "final_norm" in params:
        x = normalise(d.spec, params["final_norm"], x)
    if "project_out" in params:
        x = dense(params["project_out"], x)
    return d.constrain(x, ("batch", "seq", None))


def _block(d: Decoder, p: Params, x: jax.Array, tables: Tables, kind: Kind, keep: Callable) -> tuple[jax.Array, Any]:
    """One layer; also returns the keys and values it attended to."""
    spec = d.spec
    before = spec.norms in ("before", "around")
    normed = normalise(spec, p["attention_norm"], x) if before else x
    out, kept = _attention(d, p["attention"], normed, tables, kind, keep)
    if "attention_post_norm" in p:
        out = normalise(spec, p["attention_post_norm"], out)
    if spec.branches == "serial":
        x = x + out
        if spec.norms == "after_sum":
            x = normalise(spec, p["attention_norm"], x)
    if spec.branches != "parallel_one_norm":
        normed = normalise(spec, p["mlp_norm"], x) if before else x
    if kind.experts is None:
        inner = mlp(spec, p["mlp"], normed, d.lora_scale)
    else:
        inner = mixture(spec, kind.experts, p["mlp"], normed, d.lora_scale)
    if "mlp_post_norm" in p:
        inner = normalise(spec, p["mlp_post_norm"], inner)
    x = x + inner if spec.branches == "serial" else x + out + inner
    if spec.norms == "after_sum":
        x = normalise(spec, p["mlp_norm"], x)
    return d.constrain(x, ("batch", "seq", None)), kept


def _attention(d: Decoder, p: Params, x: jax.Array, tables: Tables, kind: Kind, keep: Callable) -> tuple[jax.Array, Any]:
    spec = d.spec
    q, k, v = (dense(p[name], x, d.lora_scale) for name in ("q", "k", "v"))
    if spec.qk_norm == "all":
        q, k = normalise(spec, p["q_norm"], q), normalise(spec, p["k_norm"], k)
    q, k, v = (y.reshape(*y.shape[:2], -1, spec.head_dim) for y in (q, k, v))
    if spec.qk_norm == "head":
        q, k = normalise(spec, p["q_norm"], q), normalise(spec, p["k_norm"], k)
    if spec.positions == "rope":
        cos, sin = _pick(tables.cos, kind.rope), _pick(tables.sin, kind.rope)
        q, k = ropes.rotate(q, cos, sin, spec.rope_pairs), ropes.rotate(k, cos, sin, spec.rope_pairs)
    q = d.constrain(q, ("batch", "seq", "heads", None))
    k, v = kept = keep(k, v)
    out = attn.attend(
        q,
        k,
        v,
        _pick(tables.visible, kind.window),
        scale=kind.scale,
        cap=spec.attention_cap,
        bias=tables.bias,
        sinks=p.get("sinks"),
    )
    out = checkpoint_name(out.reshape(*x.shape[:2], -1), "attention")
    return dense(p["o"], out, d.lora_scale), kept
