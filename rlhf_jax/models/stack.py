"""The blocks in sequence.

In training the layers are stacked on a leading axis and scanned; what differs between layers (window, rope, scale) is scanned
beside them as numbers that pick one of a few tables, so that one scan covers them all. For decoding the layers are a list,
because a scanned decode step copies its cache at every layer.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from rlhf_jax.models import attention as attn
from rlhf_jax.models import flash
from rlhf_jax.models import rope as ropes
from rlhf_jax.models.experts import mixture
from rlhf_jax.models.layers import dense, mlp, normalise
from rlhf_jax.models.spec import Experts, Spec, groups
from rlhf_jax.types import Params

Constrain = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]

# Tokens a layer that the last one must be able to leave out before it is taken out of the scan. Taking it out copies the others'
# weights, 8 bytes each, and saves 2 operations a token and weight of one; machines do 40 to 300 operations a byte.
WORTH_A_COPY = 200


def unconstrained(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """No sharding."""
    return x


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
    """A spec with the choices that do not change what it computes."""

    spec: Spec
    compute_dtype: Any = jnp.float32
    remat: str = "elementwise"
    kernel: str = "dense"  # of attention over whole sequences: "dense", "cudnn" or "splash"
    mesh: Mesh | None = None  # that the kernel runs on
    lora_scale: float = 1.0
    constrain: Constrain = unconstrained


class Kind(NamedTuple):
    """What one layer picks: Python numbers while the layers are a list, traced ones where they are scanned."""

    rope: Any  # index of its rope among the distinct ones
    window: Any
    scale: Any  # f32[], of the attention scores
    experts: Experts | None


class Shared(NamedTuple):
    """What the layers share, with one entry for every distinct rope."""

    cos: tuple[jax.Array, ...]  # f32[B, T, dims / 2] each
    sin: tuple[jax.Array, ...]
    attend: attn.Attend  # (q, k, v, window, scale, sinks) -> [B, T, heads, head_dim]


def hidden(
    d: Decoder,
    params: Params,
    tokens: jax.Array,
    mask: jax.Array,
    *,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    last: int | None = None,
) -> jax.Array:
    """States after the final norm, [B, T, D] in the compute dtype; with `last`, those of the last `last` tokens alone.

    Args:
        params: stacked, or as `for_decoding` leaves them.
        tokens: i32[B, T]; mask: bool[B, T], True on tokens.
        positions: i32[B, T]; default cumsum(mask) - 1, so that the width of the padding changes nothing.
        segments: i32[B, T], number of the packed sequence a token belongs to; it sees that one alone.
        last: where it pays, the last layer computes nothing but keys and values for the tokens before these.
    """
    chex.assert_rank([tokens, mask], 2)
    chex.assert_equal_shape([tokens, mask])
    positions = positions_of(mask) if positions is None else positions
    shared = share(d, attn.causal(mask.astype(bool), positions, segments), bound=tokens.shape[1])
    if d.spec.position_offset:  # OPT: in transformers all padding has the row before that of position 0
        positions = jnp.where(mask, positions, -1)
    x = embed(d, params, tokens, positions)
    of = kinds(d.spec)
    if isinstance(params.get("layers"), list):
        for p, kind in zip(params["layers"][:-1], of[:-1], strict=True):
            x, _ = block(d, p, x, shared, kind, whole)
        return finish(d, params, block(d, params["layers"][-1], x, shared, of[-1], whole, last)[0])
    *runs, (name, members) = groups(d.spec).items()
    for run, numbers in runs:
        x = _scan(d, params[run], x, shared, [of[i] for i in numbers])
    if last is None or len(members) * WORTH_A_COPY > tokens[:, :-last].size:
        x = _scan(d, params[name], x, shared, [of[i] for i in members])
        return finish(d, params, _only(last, x))
    *others, final = members
    if others:
        x = _scan(d, jax.tree.map(lambda leaf: leaf[:-1], params[name]), x, shared, [of[i] for i in others])
    body = _rematerialised(d.remat, lambda x, p: block(d, p, x, shared, of[final], whole, last)[0])
    return finish(d, params, body(x, jax.tree.map(lambda leaf: leaf[-1], params[name])))


def positions_of(mask: jax.Array) -> jax.Array:
    """0, 1, 2, ... over the tokens of each row i32[B, T]; padding before them has 0."""
    return jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), 1) - 1, 0)


def kinds(spec: Spec) -> list[Kind]:
    """One a layer."""
    ropes_, windows = distinct(spec)
    return [Kind(ropes_.index(x.rope), windows.index(x.window), x.scale, x.experts) for x in spec.layers]


def distinct(spec: Spec) -> tuple[list[Any], list[Any]]:
    """The ropes and the windows that occur, in order of appearance."""
    ropes_, windows = (list(dict.fromkeys(getattr(layer, name) for layer in spec.layers)) for name in ("rope", "window"))
    return ropes_, windows


def share(d: Decoder, keys: attn.Keys, *, bound: int) -> Shared:
    """Tables of a call.

    Args:
        bound: no position reaches this; ropes that depend on the length look at the positions only where it matters.
    """
    ropes_, windows = distinct(d.spec)
    dims = 2 * max((len(rope.inv_freq) for rope in ropes_ if rope), default=0)
    length = jnp.max(keys.query_positions) + 1
    turns = [ropes.cos_sin(rope, keys.query_positions, dims, length, bound) for rope in ropes_]
    kernel = d.kernel if keys.segments is not None else "dense"
    if kernel == "splash":
        attend = flash.make_splash(d.spec, keys, windows, d.mesh)
    else:
        attend = flash.make_cudnn(keys, windows) if kernel == "cudnn" else attn.make_dense(d.spec, keys, windows)
    return Shared(tuple(c for c, _ in turns), tuple(s for _, s in turns), attend)


def whole(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sequence's own keys and values."""
    return k, v


def _scan(d: Decoder, stacked: Params, x: jax.Array, shared: Shared, members: list[Kind]) -> jax.Array:
    def body(x: jax.Array, layer: tuple) -> tuple[jax.Array, None]:
        p, rope, window, scale = layer
        return block(d, p, x, shared, Kind(rope, window, scale, members[0].experts), whole)[0], None

    numbers = [jnp.asarray([getattr(kind, name) for kind in members], jnp.int32) for name in ("rope", "window")]
    scales = jnp.asarray([kind.scale for kind in members], jnp.float32)
    return jax.lax.scan(_rematerialised(d.remat, body), x, (stacked, *numbers, scales))[0]


def _rematerialised(remat: str, body: Callable) -> Callable:
    policies = jax.checkpoint_policies
    match remat:
        case "none":
            return body
        case "elementwise":
            policy = policies.save_from_both_policies(policies.dots_saveable, policies.save_only_these_names("attention"))
        case "full":
            policy = policies.nothing_saveable
        case "dots":
            policy = policies.dots_with_no_batch_dims_saveable
        case "save_attention":
            policy = policies.save_only_these_names("attention")
        case _:
            raise ValueError(f"remat is {remat!r}; it must be none, elementwise, full, dots or save_attention")
    return jax.checkpoint(body, policy=policy, prevent_cse=False)


def embed(d: Decoder, params: Params, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    # A table sharded over its columns and indexed directly makes GSPMD gather it whole and in vain: cast, pin, then index.
    table = params["embed"]["embedding"]
    if table.dtype != d.compute_dtype:  # pinned before the gather too, or it gathers first and casts then
        table = d.constrain(table.astype(d.compute_dtype), ("vocab", "embed"))
    table = d.constrain(table, ("vocab", None))
    x = table[tokens]
    if d.spec.embed_scale != 1.0:
        x *= jnp.asarray(d.spec.embed_scale, x.dtype)
    if "project_in" in params:
        x = dense(params["project_in"], x, d.lora_scale)
    if "positions" in params:
        x += params["positions"]["embedding"].astype(x.dtype)[positions + d.spec.position_offset]
    if "embed_norm" in params:
        x = normalise(d.spec, params["embed_norm"], x)
    return d.constrain(x, ("batch", "seq", None))


def finish(d: Decoder, params: Params, x: jax.Array) -> jax.Array:
    if "final_norm" in params:
        x = normalise(d.spec, params["final_norm"], x)
    if "project_out" in params:
        x = dense(params["project_out"], x, d.lora_scale)
    return d.constrain(x, ("batch", "seq", None))


def block(
    d: Decoder, p: Params, x: jax.Array, shared: Shared, kind: Kind, keep: Callable, last: int | None = None
) -> tuple[jax.Array, Any]:
    """One layer, of the last `last` tokens if that is given; also returns the keys and values it attended to."""
    spec = d.spec
    before = spec.norms in ("before", "around")
    normed = normalise(spec, p["attention_norm"], x) if before else x
    out, kept = _attention(d, p["attention"], normed, shared, kind, keep, last)
    x, normed = _only(last, x), _only(last, normed)
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


def _only(last: int | None, x: jax.Array) -> jax.Array:
    return x if last is None else x[:, -last:]


def _attention(
    d: Decoder, p: Params, x: jax.Array, shared: Shared, kind: Kind, keep: Callable, last: int | None
) -> tuple[jax.Array, Any]:
    spec = d.spec
    q, (k, v) = dense(p["q"], _only(last, x), d.lora_scale), (dense(p[name], x, d.lora_scale) for name in "kv")
    if spec.qk_norm == "all":
        q, k = normalise(spec, p["q_norm"], q), normalise(spec, p["k_norm"], k)
    q, k, v = (y.reshape(*y.shape[:2], -1, spec.head_dim) for y in (q, k, v))
    if spec.qk_norm == "head":
        q, k = normalise(spec, p["q_norm"], q), normalise(spec, p["k_norm"], k)
    if spec.positions == "rope":
        cos, sin = attn.pick(shared.cos, kind.rope), attn.pick(shared.sin, kind.rope)
        q = ropes.rotate(q, _only(last, cos), _only(last, sin), spec.rope_pairs)
        k = ropes.rotate(k, cos, sin, spec.rope_pairs)
    q = d.constrain(q, ("batch", "seq", "heads", None))
    k, v = (d.constrain(y, ("batch", "seq", "kv", None)) for y in (k, v))
    k, v = kept = keep(k, v)
    out = shared.attend(q, k, v, kind.window, kind.scale, p.get("sinks"))
    out = out.reshape(*out.shape[:2], -1)
    if d.kernel != "splash":  # which names its own results
        out = checkpoint_name(out, "attention")
    return dense(p["o"], out, d.lora_scale), kept
