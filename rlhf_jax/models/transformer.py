"""One decoder for every family: a `Spec` in, pure functions of the parameters out.

    spec.py        what distinguishes one decoder from another; the table of its parameters
    layers.py      norm, linear layer, MLP; experts.py, attention.py, flash.py, rope.py: the other pieces of a block
    stack.py       the blocks in sequence: scanned over stacked layers in training, a loop over a list for decoding
    decoding.py    prefill and one step with a cache
    heads.py       logits and scores

Parameters are nested dictionaries. Left out: dropout (off in RLHF), the router's load-balancing loss, ring buffers for
windows, expert parallelism.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax.models import decoding, flash, heads, params, stack
from rlhf_jax.models.spec import Spec
from rlhf_jax.types import Model


def make_model(
    spec: Spec,
    *,
    compute_dtype: Any = jnp.float32,
    remat: str = "elementwise",
    attention: str = "dense",
    constrain: stack.Constrain = stack.unconstrained,
    by_rows: Callable[..., Any] | None = None,
    mesh: Mesh | None = None,
    lora_scale: float = 1.0,
) -> Model:
    """The pure functions of a spec.

    Args:
        compute_dtype: of matrix products and activations; norms, softmax, logits and scores are float32 always.
        remat: what the backward pass recomputes: "none"; "elementwise", all but products of matrices; "dots", attention's
            products too; "save_attention", all but attention; "full".
        attention: "dense", or "flash" where the device has a kernel for it.
        constrain: (x, logical axes) -> x, pins the sharding of activations.
        by_rows: (fn, weights, logical axes, *rows) -> fn(weights, *rows), computed apart for each device's rows.
        mesh: devices that the parameters' axes and the flash kernel are for; default: this process's first device.
        lora_scale: alpha / rank of an adapter joined to the parameters.
    """
    d = stack.Decoder(
        spec=spec,
        compute_dtype=compute_dtype,
        remat=remat,
        kernel=flash.resolve(attention, spec, compute_dtype, mesh),
        mesh=mesh,
        lora_scale=lora_scale,
        constrain=constrain,
    )

    def heads_by_rows(fn: Callable[..., Any], trees: tuple[Any, ...], *rows: Any) -> Any:
        weights = tuple(heads.weights(spec, tree) for tree in trees)
        if by_rows is None:
            return fn(*weights, *rows)
        names = tuple(params.axes(spec, tree) for tree in weights)
        return by_rows(lambda weights, *rows: fn(*weights, *rows), weights, names, *rows)

    return Model(
        vocab_size=spec.vocab_size,
        init=lambda key, *, head="lm": params.init(spec, key, head=head),
        hidden=lambda tree, tokens, mask, *, positions=None, segments=None, last=None: stack.hidden(
            d, tree, tokens, mask, positions=positions, segments=segments, last=last
        ),
        logits=lambda tree, x: heads.logits(spec, tree, x),
        score=heads.score,
        prefill=lambda tree, tokens, mask, slots: decoding.prefill(d, tree, tokens, mask, slots),
        decode=lambda tree, cache, token, position, slot, valid: decoding.decode(d, tree, cache, token, position, slot, valid),
        for_decoding=lambda tree: params.unstack(spec, tree, compute_dtype),
        axes=lambda tree: params.axes(spec, tree, tensor=1 if mesh is None else mesh.shape["tensor"]),
        by_rows=heads_by_rows,
    )
