"""How the cost of a rollout grows: tokens/s against batch, response length, vocabulary and (simulated) devices.

    python scripts/growth.py [--rounds 5] [--out docs/img]

Model S of `bench.py`; each curve moves one size and leaves the others (batch 16, prompt 64, response 64, vocabulary 8192). One
SVG a curve, and the figures as `growth.json`. Devices are threads of one processor: their curve shows what splitting costs
here, not what it brings elsewhere.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import build, config, continuous, models, parallel, programs, sampling
from rlhf_jax.report import plots
from rlhf_jax.types import Prompts

SIZES = config.Scratch(width=256, layers=4, heads=4, kv_heads=2, mlp_width=704, max_length=2048, vocabulary=8192)
USUAL = {"batch": 16, "prompt": 64, "response": 64, "vocabulary": 8192}
CURVES = {
    "batch": (4, 8, 16, 32, 64),
    "response": (32, 64, 128, 256, 512),
    "vocabulary": (2048, 8192, 32768, 131072),
    "devices": (1, 2, 4, 8),
}
UNITS = {"batch": "rows", "response": "tokens", "vocabulary": "tokens", "devices": "simulated devices"}


def random_prompts(number: int, width: int, vocabulary: int) -> Prompts:
    """Full-width prompts."""
    tokens = np.random.default_rng(0).integers(1, vocabulary, (number, width))
    arrays: dict[str, Any] = {"tokens": tokens.astype(np.int32), "mask": np.ones((number, width), bool)}
    return Prompts(index=jnp.arange(number, dtype=jnp.int32), **arrays)


def take_turns(contestants: dict[str, Callable[[int], object]], rounds: int) -> dict[str, float]:
    """Median seconds; contestants one after another in every round, one round before, to compile."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, work in contestants.items():
            start = time.perf_counter()
            jax.block_until_ready(work(turn))
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def tokens_per_s(rounds: int, *, batch: int, prompt: int, response: int, vocabulary: int) -> float:
    """Sampled tokens a second, nothing stops; the batch is split over all devices of the process."""
    mesh = parallel.make_mesh(config.Mesh())
    model = build.make_model(config.Model(), models.scratch_spec(SIZES, vocabulary), mesh)
    params = model.for_decoding(model.init(jax.random.key(0)))
    params = parallel.place(params, parallel.param_shardings(mesh, model.axes(params), params, gather=("fsdp",)))
    prompts = parallel.place(random_prompts(batch, prompt, vocabulary), parallel.batch_sharding(mesh))
    how = config.Sampling(max_new_tokens=response)
    sample = programs.make_rollout(model, mesh, how, stop_ids=(), pad_id=0)
    step = parallel.compile_step(sample, out=parallel.batch_sharding(mesh))
    seconds = take_turns({"rollout": lambda turn: step(params, prompts, jax.random.key(turn))}, rounds)
    return batch * response / seconds["rollout"]


def skewed(rounds: int, *, rows: int = 16, number: int = 128, prompt: int = 64, response: int = 256, mean: float = 50.0) -> dict:
    """Median seconds of 128 answers, 16 rows at a time: continuous batching, and one plain batch after another.

    Lengths are geometric, cut at R: V / mean of the tokens are stop tokens of a model near uniform.
    """
    model = models.make_model(models.scratch_spec(SIZES, SIZES.vocabulary))
    params = model.init(jax.random.key(0))
    prompts = jax.tree.map(jnp.asarray, random_prompts(number, prompt, SIZES.vocabulary))
    keys = {"stop_ids": tuple(range(1, 1 + round(SIZES.vocabulary / mean))), "pad_id": 0}
    how = config.Sampling(max_new_tokens=response)
    batch_at_a_time = jax.jit(sampling.make_sampler(model, how, **keys))
    all_at_once = jax.jit(continuous.make_continuous_sampler(model, how, rows=rows, **keys))

    def plain(turn: int) -> list:
        parts = [jax.tree.map(lambda leaf, at=at: leaf[at : at + rows], prompts) for at in range(0, number, rows)]
        return [batch_at_a_time(params, part, jax.random.key(turn)) for part in parts]

    def refilled(turn: int) -> object:
        return all_at_once(params, prompts, jax.random.key(turn))

    return take_turns({"rlhf_jax": refilled, "plain batch": plain}, rounds)


def measure(curve: str, value: int, rounds: int) -> float:
    """One point; devices are counted when a process starts, so they need one of their own."""
    if curve != "devices":
        return tokens_per_s(rounds, **USUAL | {curve: value})
    flags = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={value}"}
    command = [sys.executable, __file__, "--rounds", str(rounds), "--point"]
    return float(subprocess.run(command, env=flags, capture_output=True, text=True, check=True).stdout)


def draw(curve: str, points: list[tuple[int, float]], out: Path) -> None:
    """An SVG that needs no page around it."""
    title = f"rollout, tokens/s by {curve}"
    line = plots.Line("tokens/s", points)
    chart = plots.line_chart([line], ident=f"growth-{curve}", title=title, x_label=f"{curve}, {UNITS[curve]}", floor=0.0)
    style = (Path(plots.__file__).parent / "style.css").read_text()
    head, body = chart.replace('viewBox="0 0 340 208"', 'viewBox="-14 0 384 208"').split(">", 1)  # labels may stand out
    out.joinpath(f"growth_{curve}.svg").write_text(f'{head} xmlns="http://www.w3.org/2000/svg"><style>{style}</style>{body}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("docs/img"))
    parser.add_argument("--point", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        print(tokens_per_s(args.rounds, **USUAL))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    figures = {}
    for curve, values in CURVES.items():
        points = [(value, measure(curve, value, args.rounds)) for value in values]
        figures[curve] = {value: round(speed) for value, speed in points}
        print(curve, figures[curve], flush=True)
        draw(curve, points, args.out)
    (args.out / "growth.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
