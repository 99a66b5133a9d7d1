"""Small things to test with: models whose answers are known in closed form, a byte tokenizer, random batches.

    from rlhf_jax import testing
    model = testing.markov_model(5)                      # a types.Model without a network
    params = {"table": table, "scores": scores}          # f32[5, 5] logits, f32[5] scores
    rollout = jax.jit(sampling.make_sampler(model, ...))(params, testing.random_prompts(0, 4, 3, 5), key)
    testing.history_logits(params, rollout.tokens, rollout.mask)   # what every position must have seen, in float64

Random batches are numpy draws from a seed: they compile nothing.
"""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import config, parallel
from rlhf_jax.types import Experience, Model, Params, Preferences, Prompts, Rollout, Sequences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BYTE_SPECIALS = ("<pad>", "<bos>", "<eos>")  # ids 256, 257, 258 of `byte_tokenizer`


def markov_model(vocab_size: int, *, decay: float = 0.0) -> Model:
    """A model whose logits are a table look-up, so that every probability of a run can be written down.

    logits_t = sum_{s <= t, mask_s} decay^(position_t - position_s) table[token_s]

    With `decay` 0 the next token depends on the last one alone: a Markov chain. With `decay` > 0 it depends on every token
    before it and on the distance to it, so that a wrong mask, position, cache slot or segment changes the answer.

    Parameters of the model: `{"table": f32[V, V], "scores": f32[V]}`; the scalar head of a position is the same sum over
    `scores`. Hidden states are logits and score side by side, D = V + 1. The cache is the tokens and their positions.
    """
    width = vocab_size + 1

    def init(key: jax.Array, *, head: str = "lm") -> Params:
        del head
        table, scores = jax.random.split(key)
        return {"table": jax.random.normal(table, (vocab_size, vocab_size)), "scores": jax.random.normal(scores, (vocab_size,))}

    def rows(params: Params, tokens: jax.Array) -> jax.Array:
        return jnp.concatenate([params["table"], params["scores"][:, None]], axis=1)[tokens]

    def weights(distance: jax.Array, seen: jax.Array) -> jax.Array:
        return jnp.where(seen, jnp.power(jnp.float32(decay), jnp.maximum(distance, 0).astype(jnp.float32)), 0.0)

    def hidden(
        params: Params,
        tokens: jax.Array,
        mask: jax.Array,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        last: int | None = None,
    ) -> jax.Array:
        place = _positions(mask) if positions is None else positions
        seen = mask[:, None, :] & jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))[None]
        if segments is not None:
            seen &= segments[:, :, None] == segments[:, None, :]
        past = weights(place[:, :, None] - place[:, None, :], seen)
        states = jnp.einsum("bts,bsd->btd", past, rows(params, tokens), precision="highest")
        return states if last is None else states[:, -last:]

    def prefill(params: Params, tokens: jax.Array, mask: jax.Array, slots: int) -> tuple[jax.Array, Any]:
        spare = ((0, 0), (0, slots - tokens.shape[1]))
        cache = {"tokens": jnp.pad(tokens, spare), "positions": jnp.pad(_positions(mask), spare)}
        return hidden(params, tokens, mask), cache

    def decode(
        params: Params, cache: Any, token: jax.Array, position: jax.Array, slot: jax.Array, valid: jax.Array
    ) -> tuple[jax.Array, Any]:
        cache = {
            "tokens": jax.lax.dynamic_update_slice(cache["tokens"], token[:, None], (0, slot)),
            "positions": jax.lax.dynamic_update_slice(cache["positions"], position[:, None], (0, slot)),
        }
        past = weights(position[:, None] - cache["positions"], valid)
        return jnp.einsum("bs,bsd->bd", past, rows(params, cache["tokens"]), precision="highest"), cache

    return Model(
        vocab_size=vocab_size,
        init=init,
        hidden=hidden,
        logits=lambda params, hidden: hidden[..., : width - 1].astype(jnp.float32),
        score=lambda params, hidden: hidden[..., width - 1].astype(jnp.float32),
        prefill=prefill,
        decode=decode,
    )


def history_logits(params: Params, tokens: Any, mask: Any, *, decay: float = 0.0) -> np.ndarray:
    """Logits of `markov_model` after every position, f64[B, T, V], written as a recurrence over tokens instead of a product."""
    return _recur(np.asarray(params["table"], np.float64), tokens, mask, decay)


def history_scores(params: Params, tokens: Any, mask: Any, *, decay: float = 0.0) -> np.ndarray:
    """Scores of `markov_model` at every position, f64[B, T]."""
    return _recur(np.asarray(params["scores"], np.float64)[:, None], tokens, mask, decay)[..., 0]


def check_model(model: Model, params: Params | None = None, *, tolerance: float = 1e-4) -> None:
    """Raise ValueError where a model breaks what sampling and scoring rely on; seconds for a small one.

    Logits and scores are float32, whatever the model computes in. Those of a token may depend on the tokens before it alone:
    neither on the width of the padding, nor on what stands in it, nor on later tokens; and reading token by token (`prefill`,
    `decode`) must give what reading at once (`hidden`) gives, and so must asking for the last tokens alone (`last`).

    Args: params, default `model.init`; tolerance, largest difference of a logit or score, relative to 1 + its size.
    """
    params = model.init(jax.random.key(0), head="score") if params is None else params
    prompt, responses, wider = 4, 3, 2
    rollout = random_rollout(0, 3, prompt, responses, model.vocab_size)
    mask, other = np.asarray(rollout.mask), (np.asarray(rollout.tokens) + 1) % model.vocab_size

    heads = parallel.compile_step(lambda params, states: (model.logits(params, states), model.score(params, states)))
    read = parallel.compile_step(lambda params, tokens, mask: model.hidden(params, tokens, mask))
    tail = parallel.compile_step(lambda params, tokens, mask: model.hidden(params, tokens, mask, last=responses + 1))
    known = heads(params, read(params, rollout.tokens, rollout.mask))
    for name, found in zip(("logits", "scores"), known, strict=True):
        if found.dtype != jnp.float32:
            raise ValueError(f"{name} are {found.dtype}; they must be float32: end the function with .astype(jnp.float32)")

    def compare(what: str, found: jax.Array, at: np.ndarray) -> None:
        for name, a, b in zip(("logits", "scores"), map(np.asarray, heads(params, found)), map(np.asarray, known), strict=True):
            gap = np.max(np.abs(a - b) / (1.0 + np.abs(b)), initial=0.0, where=at.reshape(at.shape + (1,) * (b.ndim - 2)))
            if not gap <= tolerance:
                raise ValueError(f"{what} changes {name} by {gap:.3g} (relative to 1 + their size); allowed: {tolerance:g}")

    compare("what stands in the padding", read(params, _i32(np.where(mask, rollout.tokens, other)), rollout.mask), mask)
    padded = [np.pad(x, ((0, 0), (wider, 0))) for x in (np.asarray(rollout.tokens), mask)]
    compare("the width of the padding", read(params, _i32(padded[0]), jnp.asarray(padded[1]))[:, wider:], mask)
    last = np.asarray(rollout.tokens).copy()
    last[:, -1] = other[:, -1]
    earlier = mask & (np.arange(mask.shape[1]) < mask.shape[1] - 1)
    compare("a later token", read(params, _i32(last), rollout.mask), earlier)
    states = read(params, rollout.tokens, rollout.mask).at[:, -(responses + 1) :].set(tail(params, rollout.tokens, rollout.mask))
    compare("asking for the last tokens alone", states, mask)
    compare("reading token by token", _token_by_token(model, params, rollout, prompt), mask)


def _token_by_token(model: Model, params: Params, rollout: Rollout, prompt: int) -> jax.Array:
    """Hidden states [B, L, D] as the sampler makes them: `prefill` of the prompt, then `decode` of every response token."""
    prefill = parallel.compile_step(lambda params, tokens, mask: model.prefill(params, tokens, mask, rollout.mask.shape[1]))
    decode = parallel.compile_step(model.decode)
    decoding = model.for_decoding(params)
    states, cache = prefill(decoding, rollout.tokens[:, :prompt], rollout.mask[:, :prompt])
    columns = [states]
    position = rollout.mask[:, :prompt].sum(1, dtype=jnp.int32)
    for slot in range(prompt, rollout.mask.shape[1]):
        valid = rollout.mask & (np.arange(rollout.mask.shape[1]) <= slot)[None]
        state, cache = decode(decoding, cache, rollout.tokens[:, slot], position, jnp.int32(slot), valid)
        columns.append(state[:, None])
        position += 1
    return jnp.concatenate(columns, 1)


def log_softmax(logits: Any) -> np.ndarray:
    """log p of a distribution given by logits, f64[..., V]; -inf stays -inf."""
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """A `transformers` tokenizer that needs no file: one token a byte (ids 0 to 255), then <pad>, <bos>, <eos>.

    Every text survives the round trip; `<pad>` and `<eos>` are distinct, as PPO wants them. Saved with `save_pretrained`.
    """
    import tokenizers
    import transformers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet(), key=_byte_of_letter().__getitem__)
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens(list(BYTE_SPECIALS))
    pad, bos, eos = BYTE_SPECIALS
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=pad, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False
    )


def random_prompts(seed: int, batch: int, width: int, vocab_size: int, *, shortest: int = 1, pad_id: int = 0) -> Prompts:
    """Left-padded prompts of `shortest` to `width` tokens; the first row has the full width."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(shortest, width + 1, batch)
    lengths[0] = width
    mask = np.arange(width)[None] >= width - lengths[:, None]
    tokens = np.where(mask, rng.integers(0, vocab_size, (batch, width)), pad_id)
    return Prompts(tokens=_i32(tokens), mask=jnp.asarray(mask), index=jnp.arange(batch, dtype=jnp.int32))


def random_rollout(seed: int, batch: int, width: int, responses: int, vocab_size: int, *, pad_id: int = 0) -> Rollout:
    """Prompts with random answers of 1 to R tokens; the first row is truncated at R, the others finished by themselves."""
    rng = np.random.default_rng(seed)
    prompts = random_prompts(seed + 1, batch, width, vocab_size, pad_id=pad_id)
    lengths = rng.integers(1, responses + 1, batch)
    lengths[0] = responses
    chosen = np.arange(responses)[None] < lengths[:, None]
    answers = np.where(chosen, rng.integers(0, vocab_size, (batch, responses)), pad_id)
    return Rollout(
        tokens=jnp.concatenate([prompts.tokens, _i32(answers)], axis=1),
        mask=jnp.concatenate([prompts.mask, jnp.asarray(chosen)], axis=1),
        action_mask=jnp.asarray(chosen),
        finished=jnp.asarray(np.arange(batch) > 0),
        logprobs=_f32(np.where(chosen, -rng.exponential(2.0, chosen.shape), 0.0)),
        index=prompts.index,
    )


def random_experience(seed: int, batch: int, width: int, responses: int, vocab_size: int) -> Experience:
    """What an update trains on, with float advantages, values and returns."""
    rng = np.random.default_rng(seed)
    rollout = random_rollout(seed + 1, batch, width, responses, vocab_size)
    advantages, values, noise = (rng.normal(size=(batch, responses)) for _ in range(3))
    return Experience(
        tokens=rollout.tokens,
        mask=rollout.mask,
        action_mask=rollout.action_mask,
        logprobs=rollout.logprobs,
        advantages=_f32(advantages),
        ref_logprobs=jnp.where(rollout.action_mask, rollout.logprobs + 0.1 * _f32(noise), 0.0),
        values=_f32(values),
        returns=_f32(values + advantages),
    )


def random_sequences(seed: int, batch: int, width: int, vocab_size: int, *, shortest: int = 2) -> Sequences:
    """Right-padded sequences of `shortest` to T tokens whose second half is trained."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(shortest, width + 1, batch)
    lengths[0] = width
    place = np.arange(width)[None]
    mask = place < lengths[:, None]
    tokens = np.where(mask, rng.integers(0, vocab_size, (batch, width)), 0)
    return Sequences(
        tokens=_i32(tokens), mask=jnp.asarray(mask), target_mask=jnp.asarray(mask & (place >= lengths[:, None] // 2))
    )


def random_preferences(seed: int, batch: int, width: int, vocab_size: int) -> Preferences:
    """Pairs of sequences of unequal lengths."""
    chosen, rejected = (random_sequences(seed + i, batch, width, vocab_size) for i in (1, 2))
    return Preferences(chosen=chosen, rejected=rejected)


def tiny_scratch(vocab_size: int = 64) -> config.Scratch:
    """Sizes of a Llama-type model of some 20 000 parameters: two layers, grouped heads, gated MLP."""
    return config.Scratch(width=32, layers=2, heads=4, kv_heads=2, mlp_width=48, max_length=128, vocabulary=vocab_size)


def _positions(mask: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1, 0)


def _recur(table: np.ndarray, tokens: Any, mask: Any, decay: float) -> np.ndarray:
    tokens, mask = np.asarray(tokens), np.asarray(mask)
    state = np.zeros((tokens.shape[0], table.shape[1]))
    states = []
    for t in range(tokens.shape[1]):
        state = np.where(mask[:, t, None], decay * state + table[tokens[:, t]], state)
        states.append(state)
    return np.stack(states, axis=1)


def _byte_of_letter() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable bytes are themselves, the others count up from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _i32(values: np.ndarray) -> jax.Array:
    return jnp.asarray(values, jnp.int32)


def _f32(values: np.ndarray) -> jax.Array:
    return jnp.asarray(values, jnp.float32)
