"""Prompts with their answers, one behind another in rows, inside a jitted step: score and update compute tokens, not padding.

    layout = lay_out(packing, batch)              row and column of every sequence: best fit, longest first
    for number in range(layout.parts):            as many parts as the sequences fill, which only the run knows
        part(batch, layout, number)               the batch with rows for the trunk; the others' actions are masked

A part keeps the arrays of the whole batch and counts the actions of its own sequences, so that losses and scores of the parts
add up to those of the batch. There is one program for every mix of lengths, and none for each width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from rlhf_jax.types import Experience, Packed, Rollout

Batch = TypeVar("Batch", Experience, Rollout)


class Packing(NamedTuple):
    """How a step packs its batches."""

    rows: int  # of a part
    width: int  # tokens of a row, at least L
    skips: bool = True  # heads leave out what no action needs; not where devices share a head, and would have to agree on it
    spread: Callable[[Any], Any] = lambda tree: tree  # on a mesh: rows where rows belong
    whole: Callable[[Any], Any] = lambda tree: tree  # on a mesh: small arrays on every device


class Layout(NamedTuple):
    """Where the sequences of a batch are."""

    packing: Packing
    lengths: jax.Array  # i32[B], tokens; 0: left out
    order: jax.Array  # i32[B], sequences, longest first; within a row they stand in this order
    rank: jax.Array  # i32[B], its inverse
    row: jax.Array  # i32[B]
    column: jax.Array  # i32[B], of the first token
    rows: jax.Array  # i32[], in use
    parts: jax.Array  # i32[], of `packing.rows` rows each, at least 1


def lay_out(packing: Packing, batch: Experience | Rollout, wanted: jax.Array | None = None) -> Layout:
    """Divide the sequences of a batch over rows; `wanted` bool[B] leaves out the others."""
    count, width = batch.tokens.shape[0], packing.width
    lengths = jnp.sum(batch.mask, 1, dtype=jnp.int32)
    lengths = packing.whole(lengths if wanted is None else jnp.where(wanted, lengths, 0))
    order = jnp.argsort(-lengths, stable=True).astype(jnp.int32)

    def put(room: jax.Array, length: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        row = jnp.argmin(jnp.where(room >= length, room, width + 1)).astype(jnp.int32)
        return room.at[row].add(-length), (row, width - room[row])

    room, (row, column) = lax.scan(put, jnp.full(count, width, jnp.int32), lengths[order])
    rank = jnp.zeros(count, jnp.int32).at[order].set(jnp.arange(count, dtype=jnp.int32))
    rows = jnp.sum(room < width, dtype=jnp.int32)
    parts = jnp.maximum(-(-rows // packing.rows), 1)
    return Layout(packing, lengths, order, rank, row[rank], column[rank], rows, parts)


def part(batch: Batch, layout: Layout, number: jax.Array) -> Batch:
    """The batch as the trunk sees part `number` i32[] of it: `packed` rows, and the actions of their sequences alone."""
    (rows, width), columns = layout.packing[:2], batch.tokens.shape[1]
    count, responses = batch.action_mask.shape
    here = layout.row - number * rows
    inside = (layout.lengths > 0) & (here >= 0) & (here < rows)
    start = here * width + layout.column  # slots count through the rows of the part
    tokens, actions = layout.packing.whole((batch.tokens, batch.action_mask))
    first = layout.packing.whole(jnp.argmax(batch.mask, 1).astype(jnp.int32))

    marks = jnp.zeros(rows * width, jnp.int32).at[jnp.where(inside, start, rows * width)].set(layout.rank + 1, mode="drop")
    segments = lax.cummax(marks.reshape(rows, width), axis=1)
    sequence = layout.order[jnp.maximum(segments - 1, 0)]
    position = lax.broadcasted_iota(jnp.int32, sequence.shape, 1) - layout.column[sequence]
    mask = (segments > 0) & (position < layout.lengths[sequence])
    after = jnp.where(mask, first[sequence] + position + 1, 0)  # column of the next token in the batch
    action = after - (columns - responses)
    in_response = mask & (action >= 0) & (after < columns)
    action = jnp.where(in_response, action, 0)
    followed = in_response & actions[sequence, action]
    acting = jnp.argsort(~followed, 1, stable=True).astype(jnp.int32)
    place = jnp.cumsum(followed, 1, dtype=jnp.int32) - 1 + width * lax.broadcasted_iota(jnp.int32, (rows, width), 0)

    def chosen(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, acting, 1)

    trunk = layout.packing.spread(
        {
            "tokens": tokens[sequence, jnp.maximum(after - 1, 0)],
            "mask": mask,
            "segments": jnp.where(mask, segments, 0),
            "positions": jnp.where(mask, position, 0),
            "acting": acting,
            "targets": tokens[chosen(sequence), chosen(jnp.minimum(after, columns - 1))],
            "target_mask": chosen(followed),
            "kept": None if batch.kept is None else batch.kept[chosen(sequence), chosen(action)],
        }
    )
    previous = columns - responses - 1 + lax.broadcasted_iota(jnp.int32, (count, responses), 1)
    before = jnp.clip((start - first)[:, None] + previous, 0, rows * width - 1)
    packed = Packed(
        **trunk,
        taken=place.ravel()[before],
        last=jnp.clip(start + layout.lengths - 1, 0, rows * width - 1),
        inside=inside,
        skips=layout.packing.skips,
    )
    return batch.replace(action_mask=batch.action_mask & inside[:, None], packed=packed)


def summed(packing: Packing, fn: Callable[[Batch], Any], batch: Batch) -> Any:
    """Sum over the parts of a batch of `fn(part)`, whose results are 0 where they belong to other parts."""
    layout = lay_out(packing, batch)
    shapes = jax.eval_shape(lambda: fn(part(batch, layout, jnp.int32(0))))
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return lax.fori_loop(0, layout.parts, lambda n, total: jax.tree.map(jnp.add, total, fn(part(batch, layout, n))), nothing)


def padded_fraction(layout: Layout) -> jax.Array:
    """Share of the tokens that the trunk computes that are padding, f32[]."""
    return 1.0 - jnp.sum(layout.lengths) / (layout.parts * layout.packing.rows * layout.packing.width)
