"""How fast the actor answers: beside `transformers`, and continuous batching beside the plain batch.

    python scripts/bench_rollout.py [--peer] [--rounds 5] [--json FILE]

Model S: 4 layers, width 256, 4 heads, 2 key-value heads, gated MLP 704, vocabulary 8192, float32, random weights. Contestants
take turns in one process; medians. `--peer` needs torch.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import config, continuous, models, sampling
from rlhf_jax.types import Prompts

VOCAB = 8192
SIZES = config.Scratch(width=256, layers=4, heads=4, kv_heads=2, mlp_width=704, max_length=2048, vocabulary=VOCAB)


def take_turns(contestants: dict[str, Callable[[int], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, contestants one after another in every round; one round before, to compile."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, work in contestants.items():
            start = time.perf_counter()
            jax.block_until_ready(work(turn))
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def random_prompts(number: int, width: int) -> Prompts:
    """Full-width prompts."""
    tokens = np.random.default_rng(0).integers(1, VOCAB, (number, width))
    return Prompts(
        tokens=jnp.asarray(tokens, jnp.int32), mask=jnp.ones((number, width), bool), index=jnp.arange(number, dtype=jnp.int32)
    )


def rollout(rounds: int, peer: bool, batch: int = 16, width: int = 64, responses: int = 64) -> dict:
    """Batch 16, prompt 64, response 64, nothing stops."""
    model = models.make_model(models.scratch_spec(SIZES, VOCAB))
    params = model.init(jax.random.key(0))
    prompts = random_prompts(batch, width)
    sample = jax.jit(sampling.make_sampler(model, config.Sampling(max_new_tokens=responses), stop_ids=(), pad_id=0))
    contestants: dict[str, Callable[[int], object]] = {"rlhf_jax": lambda turn: sample(params, prompts, jax.random.key(turn))}
    if peer:
        contestants["transformers"] = transformers_generate(np.asarray(prompts.tokens), responses)
    seconds = take_turns(contestants, rounds)
    row = {f"{name}_s": statistics.median(values) for name, values in seconds.items()}
    row["tokens_per_s"] = batch * responses / row["rlhf_jax_s"]
    if peer:
        row["ratio"] = row["transformers_s"] / row["rlhf_jax_s"]
    return row


def transformers_generate(tokens: np.ndarray, responses: int) -> Callable[[int], object]:
    """The same work in `transformers`, eager."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    peer = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=SIZES.width,
            intermediate_size=SIZES.mlp_width,
            num_hidden_layers=SIZES.layers,
            num_attention_heads=SIZES.heads,
            num_key_value_heads=SIZES.kv_heads,
            max_position_embeddings=SIZES.max_length,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    ).eval()
    inputs = torch.tensor(tokens, dtype=torch.long)
    attended = torch.ones_like(inputs)

    def generate(turn: int) -> object:
        with torch.inference_mode():
            torch.manual_seed(turn)
            out = peer.generate(  # pyright: ignore[reportAttributeAccessIssue]
                inputs, attention_mask=attended, do_sample=True, top_k=0, max_new_tokens=responses
            )
        return out.numpy()

    return generate


def skewed(rounds: int, rows: int = 16, number: int = 128, width: int = 64, responses: int = 256, mean: float = 50.0) -> dict:
    """Lengths drawn from a geometric distribution, cut at R: V / mean of the tokens are stop tokens of a model near uniform."""
    model = models.make_model(models.scratch_spec(SIZES, VOCAB))
    params = model.init(jax.random.key(0))
    prompts = random_prompts(number, width)
    keys = {"stop_ids": tuple(range(1, 1 + round(VOCAB / mean))), "pad_id": 0}
    how = config.Sampling(max_new_tokens=responses)
    batch_at_a_time = jax.jit(sampling.make_sampler(model, how, **keys))
    all_at_once = jax.jit(continuous.make_continuous_sampler(model, how, rows=rows, **keys))

    def plain(turn: int) -> list:
        key = jax.random.key(turn)
        parts = [jax.tree.map(lambda leaf, at=at: leaf[at : at + rows], prompts) for at in range(0, number, rows)]
        return [batch_at_a_time(params, part, key) for part in parts]

    seconds = take_turns({"plain": plain, "continuous": lambda turn: all_at_once(params, prompts, jax.random.key(turn))}, rounds)
    rollouts = plain(1)
    tokens = sum(int(part.action_mask.sum()) for part in rollouts)
    longest = sum(int(part.action_mask.sum(1).max()) for part in rollouts)
    same = np.concatenate([part.tokens for part in rollouts]) == np.asarray(
        all_at_once(params, prompts, jax.random.key(1)).tokens
    )
    row = {f"{name}_s": statistics.median(values) for name, values in seconds.items()}
    return row | {
        "mean_length_tokens": tokens / number,
        "plain_steps": longest,
        "rows_equal": float(same.all(1).mean()),
        "ratio": row["plain_s"] / row["continuous_s"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="store_true", help="also run transformers.generate")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    figures = {"rollout": rollout(args.rounds, args.peer), "skewed": skewed(args.rounds)}
    for name, row in figures.items():
        print(name, {key: float(f"{value:.4g}") for key, value in row.items()})
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
