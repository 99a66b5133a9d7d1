"""What flows through a run. Read this page first.

Axes, used in every docstring:

    B  sequences in a batch          P  prompt tokens (left-padded)      L  P + R
    R  response tokens               T  any sequence length              V  vocabulary
    D  width of the model            G  samples of one prompt            S  slots of the key-value cache

A mask is bool and True where it counts. Whatever has an R axis is indexed by the response token itself: entry j belongs to
the action of emitting response token j, its log-probability, its value V(state before token j), its reward. `None` means
absent, never zeros. Random keys are no state: they are `fold_in(fold_in(root, step), row)`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax

Params = Any
Metrics = dict[str, jax.Array]  # "group/name_unit" -> f32[]


class Pytree(flax.struct.PyTreeNode):
    """Base of the records below: frozen, keyword-only, a JAX pytree."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(kw_only=True, **kwargs)


class Prompts(Pytree):
    """What the actor answers."""

    tokens: jax.Array  # i32[B, P], left-padded
    mask: jax.Array  # bool[B, P]
    index: jax.Array  # i32[B], row of the data set: finds the reward's columns, seeds the row's random key
    sample: jax.Array | None = None  # i32[B], number of the (first) sample among those of the same prompt, part of the seed too


class Packed(Pytree):
    """Rows in which several sequences of a batch stand one behind another: what the trunk sees of them (see `packed.py`).

    N rows of T tokens have N x T slots, counted through the rows.
    """

    tokens: jax.Array  # i32[N, T]
    mask: jax.Array  # bool[N, T]
    segments: jax.Array  # i32[N, T], number of the sequence, 0 on padding
    positions: jax.Array  # i32[N, T], restart at 0 in every sequence
    acting: jax.Array  # i32[N, T], columns of the tokens before an action, then of the rest: the order of the next three
    targets: jax.Array  # i32[N, T], the token that follows
    target_mask: jax.Array  # bool[N, T], True where it is an action
    kept: jax.Array | None  # u32[N, T, ceil(V/32)], what sampling it kept
    taken: jax.Array  # i32[B, R], slot, in that order, of each response token; any where it is in other rows
    last: jax.Array  # i32[B], slot of each sequence's last token
    inside: jax.Array  # bool[B], sequences that are in these rows
    skips: bool = flax.struct.field(pytree_node=False)  # heads are left out where no action needs them


class Rollout(Pytree):
    """Prompts with the actor's answers, L = P + R: the prompt left-padded, the response right-padded."""

    tokens: jax.Array  # i32[B, L]
    mask: jax.Array  # bool[B, L], True on prompt and response tokens (end-of-sequence included)
    action_mask: jax.Array  # bool[B, R], True on tokens that the policy chose, up to and including end-of-sequence
    finished: jax.Array  # bool[B], the row ended by itself; False: it was truncated at R
    logprobs: jax.Array  # f32[B, R], nats, of the chosen token under the distribution that was sampled; 0 where masked
    index: jax.Array  # i32[B], as in Prompts
    kept: jax.Array | None = None  # u32[B, R, ceil(V/32)], bit set of the tokens that top-k/top-p/min-p kept; None: all
    packed: Packed | None = None  # rows that the trunk sees in place of `tokens`, in a step that packs


class Scored(Pytree):
    """What the models say about a rollout."""

    logprobs: jax.Array  # f32[B, R], nats, actor before the update (of the kept tokens, after temperature)
    ref_logprobs: jax.Array | None = None  # f32[B, R], nats, reference, same temperature and kept tokens
    values: jax.Array | None = None  # f32[B, R], reward units, critic: value of the state before token j
    bootstrap: jax.Array | None = None  # f32[B], value of the state after the last token (used for truncated rows only)
    kl: jax.Array | None = None  # f32[B, R], nats, exact full-vocabulary KL(actor || reference), where asked for
    entropy: jax.Array | None = None  # f32[B, R], nats
    greedy_score: jax.Array | None = None  # f32[B], reward of the greedy answer to the same prompt (ReMax), as it was given
    greedy_finished: jax.Array | None = None  # bool[B], that answer ended by itself
    greedy_mask: jax.Array | None = None  # bool[B, R], its action_mask


class Experience(Pytree):
    """What an update trains on. Every leaf has a leading axis B, so minibatches are slices."""

    tokens: jax.Array  # i32[B, L]
    mask: jax.Array  # bool[B, L]
    action_mask: jax.Array  # bool[B, R]
    logprobs: jax.Array  # f32[B, R], old log-probabilities, nats
    advantages: jax.Array  # f32[B, R]
    ref_logprobs: jax.Array | None = None  # f32[B, R], nats, for a KL term in the loss
    values: jax.Array | None = None  # f32[B, R], old values, reward units
    returns: jax.Array | None = None  # f32[B, R], reward units
    kept: jax.Array | None = None  # u32[B, R, ceil(V/32)]
    scores: jax.Array | None = None  # f32[B], reward units, as the reward gave them: running statistics
    packed: Packed | None = None  # as in Rollout


class Sequences(Pytree):
    """Right-padded token sequences for fine-tuning and for reward models."""

    tokens: jax.Array  # i32[B, T]
    mask: jax.Array  # bool[B, T]
    target_mask: jax.Array  # bool[B, T], tokens whose log-probability is trained (never the first of a sequence)
    segments: jax.Array | None = None  # i32[B, T], number of the packed sequence, 0 on padding; None: one a row
    positions: jax.Array | None = None  # i32[B, T], restart at 0 in every packed sequence


class Preferences(Pytree):
    """Pairs of answers to the same prompt."""

    chosen: Sequences
    rejected: Sequences
    margin: jax.Array | None = None  # f32[B], reward units: how much better the chosen answer is


class Labelled(Pytree):
    """Single answers marked good or bad."""

    sequences: Sequences
    desirable: jax.Array  # bool[B]
    reference_point: jax.Array | None = None  # f32[B], nats, KTO's z of the whole batch, the same in every row


class TrainState(Pytree):
    """One trained model."""

    step: jax.Array  # i32[], optimiser steps taken
    params: Params  # the trained tree (with LoRA: the adapter)
    opt_state: Any


class Moments(Pytree):
    """Running count, mean and sum of squared deviations of a stream of scores (Welford)."""

    count: jax.Array  # f32[]
    mean: jax.Array  # f32[]
    m2: jax.Array  # f32[]


class RunState(Pytree):
    """Everything that an online run must not forget; what `checkpoint.py` writes."""

    step: jax.Array  # i32[], iterations of the loop that are finished
    cursor: jax.Array  # i32[], answers trained on so far
    actor: TrainState
    critic: TrainState | None
    ema: Params | None  # exponential moving average of the actor's parameters, float32 whatever they are
    kl_coef: jax.Array  # f32[], reward units per nat
    scores: Moments  # of the scores seen so far
    best: jax.Array  # f32[], best evaluation score so far
    bad_steps: jax.Array  # i32[], updates in a row that were skipped because something was not finite
    alarms: jax.Array  # i32[len(ALARMS)], how long each alarm has been on


class OfflineState(Pytree):
    """The same for a run that learns from a fixed data set."""

    step: jax.Array  # i32[], batches that have been trained on
    trained: TrainState
    best: jax.Array  # f32[], lowest evaluation loss so far
    bad_steps: jax.Array  # i32[], updates in a row that were skipped because something was not finite


class Frozen(Pytree):
    """Parameters that no step changes. With LoRA `actor` and `critic` are bases, and may be the same arrays."""

    actor: Params | None = None  # None: the actor is trained whole
    critic: Params | None = None
    reference: Params | None = None  # whole, or an adapter on the actor's base; None with LoRA: that base is the reference
    reward: Params | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """An architecture as pure functions of its parameters. `models.make_model` makes one; so can a user."""

    vocab_size: int  # V, rows of the embedding; rows beyond the tokenizer have logit -inf
    init: Callable[..., Params]  # (key, *, head="lm" | "score") -> params
    # (params, tokens[B,T], mask[B,T], *, positions=None, segments=None, last=None) -> [B,T,D]; last=n: the last n tokens' [B,n,D]
    hidden: Callable[..., jax.Array]
    logits: Callable[[Params, jax.Array], jax.Array]  # (params, hidden[..., D]) -> f32[..., V]
    score: Callable[[Params, jax.Array], jax.Array]  # (params, hidden[..., D]) -> f32[...], scalar head
    prefill: Callable[..., tuple[jax.Array, Any]]  # (params, tokens[B,P], mask[B,P], slots) -> hidden[B,P,D], cache
    decode: Callable[
        ..., tuple[jax.Array, Any]
    ]  # (params, cache, token[B], position[B], slot[], valid[B,S]) -> hidden[B,D], cache; valid: slots of the row, in any order
    for_decoding: Callable[[Params], Params] = lambda params: params  # layers unstacked, cast: what prefill and decode take
    axes: Callable[[Params], Any] = lambda params: None  # logical axis names of every parameter, same tree
    by_rows: Callable[..., Any] = (  # (fn, trees of params, *rows) -> fn(*what `logits` reads of each tree, *rows)
        lambda fn, trees, *rows: fn(*trees, *rows)
    )  # on a mesh every device computes its own rows, and the output matrix is gathered once, however fn loops


class Calibration(NamedTuple):
    """score = (raw - mean) / std: answers of the pairs it was trained on score 0 on average, with spread 1.

    raw is the scalar head at the last token that is not `pad_id`: see `scoring.readable`.
    """

    mean: float = 0.0
    std: float = 1.0
    pad_id: int | None = None  # config.json's, of a reward model that is read from a directory


class RewardInput(NamedTuple):
    """What a host reward function is given."""

    prompts: list[str]
    responses: list[str]  # decoded without special tokens
    finished: Any  # bool[B]
    columns: dict[str, list[Any]]  # the data row's other columns


RewardFn = Callable[[RewardInput], Any]  # -> float32[B]


def join(frozen: Params | None, params: Params) -> Params:
    """Merge two nested dictionaries of parameters: a frozen base and what is trained (an adapter, a head).

    Where both have a leaf, the trained one wins; without a frozen base the result is `params` itself.
    """
    if frozen is None:
        return params
    if not (isinstance(frozen, dict) and isinstance(params, dict)):
        return params
    missing = {key: value for key, value in frozen.items() if key not in params}
    return missing | {key: join(frozen.get(key), value) for key, value in params.items()}
