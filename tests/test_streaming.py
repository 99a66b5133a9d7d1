"""Pieces of answers: the sampler's tokens, whole characters, nothing of a stop string, a handful of programs."""

import re

import directories
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from rlhf_jax import config, generate, parallel, sampling, streaming
from rlhf_jax.errors import UserError
from rlhf_jax.streaming import Answer, Ask, Streamer, Token, readable

WIDTH = 32  # what prompts of these tests are padded to


@pytest.fixture(scope="module")
def streamer():
    generator = generate.open_model(directories.language_model(), mesh=config.Mesh(data=1, fsdp=1), devices=jax.devices()[:1])
    return Streamer(generator, streaming.context_of(generator))


@pytest.fixture(scope="module")
def prompt(streamer):
    return streamer.generator.tokenizer.encode("what is 2 + 3 ?", start=True)


def collect(pieces, samples=1):
    """Text, tokens and finish of every sample."""
    found = [("", [], None) for _ in range(samples)]
    for piece in pieces:
        text, tokens, finish = found[piece.sample]
        assert finish is None, "nothing follows the end"
        found[piece.sample] = (text + piece.text, tokens + list(piece.tokens), piece.finish)
    return found


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8), (0.0, 1.0)])
def test_the_tokens_are_those_of_the_sampler(streamer, prompt, temperature, top_p):
    generator, samples, length = streamer.generator, 3, 40
    found = collect(streamer.stream(Ask(prompt, length, temperature, top_p, seed=5, samples=samples)), samples)
    settings = config.Sampling(max_new_tokens=length, temperature=temperature, top_p=top_p)
    tokenizer = generator.tokenizer
    sample = sampling.make_sampler(
        generator.loaded.model, settings, stop_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id, samples=samples, collect_kept=False
    )
    batch = generate.left_padded([prompt], WIDTH, 1, tokenizer.pad_id, 0)
    rollout = parallel.compile_step(sample)(generator.loaded.params, batch, jax.random.key(5))
    for row, (text, tokens, finish) in enumerate(found):
        wanted = np.asarray(rollout.tokens)[row, WIDTH:][np.asarray(rollout.action_mask)[row]].tolist()
        assert [token.id for token in tokens] == wanted
        assert text == tokenizer.decode(wanted)
        assert finish == ("stop" if rollout.finished[row] else "length")
    assert (found[0] == found[1]) == (temperature == 0)


def test_logprobs_are_the_models_own(streamer, prompt):
    """Whatever the temperature: log softmax of a plain forward pass."""
    ((_, tokens, _),) = collect(streamer.stream(Ask(prompt, 9, 0.5, 0.9, seed=1, top=True)))
    model, params = streamer.generator.loaded.model, streamer.generator.loaded.params
    ids = [*prompt, *(token.id for token in tokens)]
    read = jnp.arange(64)[None] < len(ids)
    hidden = jax.jit(model.prefill, static_argnums=3)(params, jnp.asarray([ids + [0] * (64 - len(ids))]), read, 64)[0]
    logprobs = np.asarray(jax.nn.log_softmax(model.logits(params, hidden[0])))
    for place, token in enumerate(tokens):
        row = logprobs[len(prompt) + place - 1]
        assert token.logprob == pytest.approx(row[token.id], abs=1e-5)
        assert [number for number, _ in token.top] == np.argsort(-row, kind="stable")[: streaming.TOP].tolist()
        np.testing.assert_allclose([value for _, value in token.top], np.sort(row)[::-1][: streaming.TOP], atol=1e-5)


def test_few_programs(streamer, prompt):
    """Lengths in one power of two, temperatures and seeds share their programs; nothing is compiled twice."""
    for length, ask in [(20, Ask(prompt, 20)), (50, Ask(prompt[:2], 50, 0.3, seed=4)), (9, Ask([], 9, 0.9, 0.5))]:
        ((_, tokens, finish),) = collect(streamer.stream(ask))
        assert len(tokens) == length or finish == "stop"
    programs = [key for key in streamer.compiled if key[0] == "start" and key[2] == 1 and key[3] == 0]
    assert sorted(programs) == [("start", 64, 1, 0), ("start", 128, 1, 0)]
    assert {streamer.compiled[key]._cache_size() for key in programs} == {1}
    assert streaming.rounded(0) == streaming.rounded(32) == 32
    assert streaming.rounded(33) == streaming.rounded(64) == 64


def test_closing_it_stops_the_model(streamer, prompt):
    stream = streamer.stream(Ask(prompt, 100))
    next(stream)
    stream.close()
    assert list(stream) == []


def test_two_devices_share_a_model(streamer, prompt):
    if jax.device_count() < 2:
        pytest.skip("one simulated device")
    generator = generate.open_model(
        directories.language_model(), mesh=config.Mesh(data=1, fsdp=1, tensor=2), devices=jax.devices()[:2]
    )
    ask = Ask(prompt, 12, seed=2)
    assert collect(Streamer(generator, 128).stream(ask))[0][0] == collect(streamer.stream(ask))[0][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": [5] * 128}, "the prompt has 128 tokens and the model takes 128"),
        ({"ids": [5] * 100, "max_tokens": 29}, "max_tokens is 29; it must be between 1 and 28"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": 1e-10}, "temperature is 1e-10; it must be 0 (greedy) or at least 0.0001"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"samples": 17}, "n is 17; it must be between 1 and 16"),
        ({"stop": ("a", "")}, "strings of at least one character"),
        ({"seed": -1}, "seed is -1"),
        ({"ids": [5, 300]}, "a token id of the prompt is [300]; it must be between 0 and"),
    ],
)
def test_what_makes_no_sense_is_refused_before_it_runs(streamer, changes, message):
    ask = Ask(ids=[5], max_tokens=4)._replace(**changes)
    with pytest.raises(UserError, match=re.escape(message)):
        streamer.stream(ask)


def test_a_context_beyond_what_the_model_is_described_for_is_refused(streamer):
    assert streaming.context_of(streamer.generator, 64) == 64
    with pytest.raises(UserError, match="--max-length 129: must lie between 2 and 128"):
        streaming.context_of(streamer.generator, 129)


# Text.


def sizes(seed):
    return np.random.default_rng(seed).integers(1, 5, 200).tolist()


def grown(tokenizer, text, sizes, stop=(), max_tokens=10_000):
    """Pieces of a text whose tokens arrive in groups of these sizes, end-of-sequence last."""
    ids = [*tokenizer.encode(text), tokenizer.eos_id]
    answer = Answer(tokenizer, Ask([], max_tokens, stop=stop))
    pieces, at, taken = [], 0, 0
    for size in sizes:
        group = [Token(number, 0.0) for number in ids[at : at + size]]
        at += size
        if not group or answer.finish:
            break
        piece, kept = answer.grow(group)
        pieces.append(piece)
        taken += len(kept)
    return pieces, answer.finish, taken


@hypothesis.settings(deadline=None, max_examples=60, derandomize=True)
@hypothesis.given(text=strategies.text(alphabet="ab é✓你🙂\n", max_size=30), seed=strategies.integers(0, 99))
def test_pieces_are_whole_characters_and_add_up(streamer, text, seed):
    pieces, finish, _ = grown(streamer.generator.tokenizer, text, sizes(seed))
    assert "".join(pieces) == text
    assert finish == "stop"
    assert not any("\ufffd" in piece for piece in pieces)


@hypothesis.settings(deadline=None, max_examples=60, derandomize=True)
@hypothesis.given(
    text=strategies.text(alphabet="ab ✓", max_size=25),
    stops=strategies.lists(strategies.text(alphabet="ab✓", min_size=1, max_size=3), min_size=1, max_size=2),
    seed=strategies.integers(0, 99),
)
def test_a_stop_string_ends_the_text_and_is_never_shown(streamer, text, stops, seed):
    pieces, finish, taken = grown(streamer.generator.tokenizer, text, sizes(seed), tuple(stops))
    places = [text.find(stop) for stop in stops if stop in text]
    assert "".join(pieces) == (text[: min(places)] if places else text)
    assert finish == "stop"
    if places:  # the tokens end with the one that completed the first of the stop strings
        tokenizer = streamer.generator.tokenizer
        ids = tokenizer.encode(text)
        holds = [any(stop in tokenizer.decode(ids[:n]) for stop in stops) for n in range(len(ids) + 1)]
        assert taken == holds.index(True)


def test_max_tokens_cuts_within_a_chunk(streamer):
    pieces, finish, taken = grown(streamer.generator.tokenizer, "abab", [3, 3, 3], max_tokens=4)
    assert (len("".join(pieces)), finish, taken) == (4, "length", 4)


def test_what_may_be_shown():
    assert readable("it is \ufffd", (), final=False) == ("it is ", False)
    assert readable("it is \ufffd", (), final=True) == ("it is \ufffd", False)
    assert readable("one\n\nHum", ("\n\nHuman:",), final=False) == ("one", False)
    assert readable("one\n\nHum", ("\n\nHuman:",), final=True) == ("one\n\nHum", False)
    assert readable("one\n\nHuman: two", ("two", "\n\nHuman:"), final=False) == ("one", True)
