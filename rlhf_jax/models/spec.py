"""What distinguishes one decoder from another, as data, and the table of its parameters.

`Spec` says everything that the decoder has to know; nothing in the decoder names a model family. `leaves` says which
parameters a spec has: shape, logical axes and initial spread of each. Initialisation, sharding, loading and saving all read
that one table, which is why the pieces of the decoder are plain functions of nested dictionaries and not Flax modules: a
module would hide the table in its `__call__`, and optional leaves (LoRA) would need a second one.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions: pair i of a head turns by position * inv_freq[i]; pairs beyond them stay."""

    inv_freq: tuple[float, ...]  # f32 values, radians per token
    factor: float = 1.0  # multiplies cos and sin (yarn, longrope)
    original_length: int | None = None  # beyond this length other frequencies hold, see `rope.at_length`
    long_inv_freq: tuple[float, ...] | None = None  # longrope: the frequencies beyond original_length
    dynamic: tuple[float, float, int] | None = None  # dynamic NTK: theta, factor, rotated dims


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of gated MLPs."""

    number: int
    active: int  # experts per token
    width: int
    renormalise: bool = True  # the active experts' softmax weights are scaled to sum 1
    router_bias: bool = False
    clamp: float | None = None  # gate is cut at clamp, up at +-clamp, up + 1 multiplies
    swish: float = 1.0  # gate * sigmoid(swish * gate), only with clamp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """What may differ from layer to layer."""

    rope: Rope | None = None
    window: int | None = None  # tokens a query sees, itself included
    scale: float = 1.0  # of the attention scores
    experts: Experts | None = None  # None: a dense MLP


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """One decoder."""

    vocab_size: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    layers: tuple[Layer, ...]
    real_vocab: int | None = None  # rows of the embedding that the tokenizer can produce; None: all
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0  # the stored scale is (scale - offset)
    norm_rounds: Literal["before_scale", "after_scale"] = "after_scale"  # where an RMS norm returns to the compute dtype
    norms: Literal["before", "around", "after_branch", "after_sum"] = "before"
    branches: Literal["serial", "parallel", "parallel_one_norm"] = "serial"
    final_norm: bool = True
    qk_norm: Literal["none", "head", "all"] = "none"  # over each head, or over all heads jointly
    positions: Literal["rope", "learned", "alibi"] = "rope"
    rope_pairs: Literal["halves", "neighbours"] = "halves"  # which dims turn together
    position_rows: int = 0  # learned: rows of the table
    position_offset: int = 0  # learned: row of position 0
    alibi_scale: float = 1.0
    alibi_rounds: bool = False  # to bfloat16, see `attention.position_bias`
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    act: str = "silu"
    gated: bool = True
    attention_cap: float | None = None  # scores = cap tanh(scores / cap), before the mask
    logit_cap: float | None = None
    sinks: bool = False  # one more softmax column per head, with a learned score
    embed_scale: float = 1.0  # rounded to the compute dtype
    embed_width: int | None = None  # of the embedding and of what the heads see, where it differs from width
    embed_norm: bool = False
    tied: bool = False
    model_type: str = ""
    max_length: int = 0  # tokens the model is described for; 0: unknown
    origin: str = dataclasses.field(default="{}", compare=False, repr=False)  # the config.json it was made from

    def __post_init__(self) -> None:
        if self.real_vocab is not None and self.real_vocab > self.vocab_size:
            raise UserError(
                f"the tokenizer has {self.real_vocab} tokens and the embedding {self.vocab_size} rows; "
                "use the model's own tokenizer, or one with fewer tokens"
            )

        if self.tied and self.head_bias:
            raise UserError(
                "tie_word_embeddings is true and the output layer has a bias, which a tied one has not here; untie them"
            )

    @property
    def head_width(self) -> int:
        """Width of what `hidden` returns."""
        return self.embed_width or self.width


class Leaf(NamedTuple):
    """One parameter."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical names, one a dimension
    std: float  # of the initial normal distribution; 0: constant
    constant: float = 0.0


def groups(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Runs of layers whose parameters can be stacked, name -> layer numbers. One group unless kinds of MLP alternate."""
    runs: list[list[int]] = []
    for i, layer in enumerate(spec.layers):
        if runs and spec.layers[runs[-1][0]].experts == layer.experts:
            runs[-1].append(i)
        else:
            runs.append([i])
    names = ["layers"] if len(runs) == 1 else [f"layers_{n}" for n in range(len(runs))]
    return dict(zip(names, map(tuple, runs), strict=True))


def leaves(spec: Spec, head: str = "lm") -> dict[str, Any]:
    """The table of parameters: the tree with a `Leaf` in each place. `head`: "lm", "score", "value" or "none"."""
    width, out = spec.width, spec.head_width
    tree: dict[str, Any] = {"embed": {"embedding": Leaf((spec.vocab_size, out), ("vocab", "embed"), 0.02)}}
    if spec.embed_width:
        tree["project_in"] = _dense(out, width, (None, "embed"))
        tree["project_out"] = _dense(width, out, ("embed", None))
    if spec.positions == "learned":
        tree["positions"] = {"embedding": Leaf((spec.position_rows, width), (None, "embed"), 0.02)}
    if spec.embed_norm:
        tree["embed_norm"] = _norm(spec, width)
    if spec.final_norm:
        tree["final_norm"] = _norm(spec, width)
    for name, members in groups(spec).items():
        tree[name] = _stack(_layer(spec, spec.layers[members[0]]), len(members), "layers")
    if head == "lm" and not spec.tied:
        tree["head"] = _dense(out, spec.vocab_size, ("embed", "vocab"), bias=spec.head_bias, std=0.02)
    if head in ("score", "value"):
        tree["score"] = _dense(out, 1, ("embed", None), bias=head == "value", std=1 / math.sqrt(out + 1))
    return tree


def _layer(spec: Spec, layer: Layer) -> dict[str, Any]:
    """One block, unstacked."""
    width, q_width, kv_width = spec.width, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    residual = 1 / math.sqrt(2 * len(spec.layers))
    attention: dict[str, Any] = {
        "q": _dense(width, q_width, ("embed", "heads"), bias=spec.qkv_bias),
        "k": _dense(width, kv_width, ("embed", "kv"), bias=spec.qkv_bias),
        "v": _dense(width, kv_width, ("embed", "kv"), bias=spec.qkv_bias),
        "o": _dense(q_width, width, ("heads", "embed"), bias=spec.o_bias, std=residual / math.sqrt(q_width)),
    }
    if spec.qk_norm != "none":
        joint = spec.qk_norm == "all"
        attention["q_norm"] = _norm(spec, q_width if joint else spec.head_dim, "heads" if joint else None)
        attention["k_norm"] = _norm(spec, kv_width if joint else spec.head_dim, "kv" if joint else None)
    if spec.sinks:
        attention["sinks"] = Leaf((spec.heads,), ("heads",), 0.0)
    tree: dict[str, Any] = {"attention": attention}
    if layer.experts is None:
        tree["mlp"] = _mlp(spec, spec.mlp_width, residual)
    else:
        experts = _stack(_mlp(spec, layer.experts.width, residual), layer.experts.number, "experts")
        router = _dense(width, layer.experts.number, ("embed", None), bias=layer.experts.router_bias)
        tree["mlp"] = {"router": router, "experts": experts}
    norms = ["attention_norm", "mlp_norm"] if spec.norms in ("before", "around", "after_sum") else []
    if spec.branches == "parallel_one_norm":
        norms = ["attention_norm"]
    if spec.norms in ("around", "after_branch"):
        norms += ["attention_post_norm", "mlp_post_norm"]
    return tree | {name: _norm(spec, width) for name in norms}


def _mlp(spec: Spec, mlp_width: int, residual: float) -> dict[str, Any]:
    names = ("gate", "up") if spec.gated else ("up",)
    tree = {name: _dense(spec.width, mlp_width, ("embed", "mlp"), bias=spec.mlp_bias) for name in names}
    down = _dense(mlp_width, spec.width, ("mlp", "embed"), bias=spec.mlp_bias, std=residual / math.sqrt(mlp_width))
    return tree | {"down": down}


def _dense(inputs: int, outputs: int, axes: tuple, *, bias: bool = False, std: float | None = None) -> dict[str, Leaf]:
    kernel = Leaf((inputs, outputs), axes, 1 / math.sqrt(inputs) if std is None else std)
    return {"kernel": kernel} | ({"bias": Leaf((outputs,), (axes[1],), 0.0)} if bias else {})


def _norm(spec: Spec, width: int, axis: str | None = None) -> dict[str, Leaf]:
    scale = Leaf((width,), (axis,), 0.0, 1.0 - spec.norm_offset)
    return {"scale": scale} | ({"bias": Leaf((width,), (axis,), 0.0)} if spec.norm == "layer" else {})


def _stack(tree: Any, number: int, axis: str) -> Any:
    if isinstance(tree, Leaf):
        return tree._replace(shape=(number, *tree.shape), axes=(axis, *tree.axes))
    return {name: _stack(value, number, axis) for name, value in tree.items()}
