"""How well one GPU or TPU chip is used, in bfloat16: rollout, scoring and update, on a GPU beside the same work in PyTorch.

    python scripts/bench_accelerator.py [--shapes 0.5B,1.5B] [--batch 64] [--prompt 512] [--response 512] [--micro-batches 8]
        [--rounds 5] [--attention flash] [--remat elementwise] [--torch-python PY] [--json FILE]

Shapes are those of Qwen2.5, weights random. Two rates of the device are measured first: of a large bfloat16 matrix product and
of copying memory. What is told of each work:

    rollout    tokens/s; of the decoding loop, the least time in which memory gives weights and cache once a step, into the time
               that it took: a rollout of one token, which is the prefill, taken off
    score      log-probabilities of the response tokens under actor and reference; the model's FLOP/s into the matrix rate
    update     actor and critic, forward, backward, AdamW; three times the forward FLOP, whatever is computed twice

The model's FLOP are those of its matrix products, of attention half of the square, of the head at the response's positions.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import bench

SHAPES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 1024},
    "0.5B": {},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    "3B": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16},
}
TARGETS = {"decode": 0.6, "update": 0.45}  # on a GPU
BYTES = 2  # of a bfloat16


class Rates(NamedTuple):
    """What the device gives at best."""

    device: str
    flops: float  # FLOP/s of a bfloat16 matrix product
    bytes: float  # bytes/s, read and written


class Work(NamedTuple):
    """What a model's works cost at least."""

    prefill: float  # FLOP of the prompts' forward pass, head at the last token
    forward: float  # FLOP of one forward pass over all tokens, head at the response's
    update: float  # FLOP of an update of actor and critic
    decode: float  # bytes that the decoding steps read


def least(config: dict[str, Any], batch: int, prompt: int, response: int) -> Work:
    """FLOP and bytes, from the shape alone."""
    width, layers, vocab = config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]
    keys = width // config["num_attention_heads"] * config["num_key_value_heads"]
    weights = layers * (2 * width * width + 2 * width * keys + 3 * width * config["intermediate_size"])

    def trunk(length: int) -> float:
        return 2.0 * weights * batch * length + layers * 2 * width * batch * length**2

    every, head = trunk(prompt + response), 2.0 * width * vocab * batch
    positions = sum(range(prompt + 1, prompt + response))  # that the steps after the prefill attend to
    cache = 2 * layers * keys * batch * positions
    read = BYTES * ((response - 1) * (weights + width * vocab) + cache)
    return Work(trunk(prompt) + head, every + head * response, 3 * (2 * every + head * response), read)


def measure_rates(side: int, count: int) -> Rates:
    """Best of eight: a product of two [side, side] matrices, a copy of `count` numbers; in a process of its own."""
    import time

    import jax
    import jax.numpy as jnp

    def best(work: Any, *args: Any) -> float:
        took = []
        for _ in range(9):  # the first compiles
            began = time.perf_counter()
            jax.block_until_ready(work(*args))
            took.append(time.perf_counter() - began)
        return min(took[1:])

    square = jnp.ones((side, side), jnp.bfloat16)
    flops = 2 * side**3 * 8 / best(jax.jit(lambda a: jax.lax.fori_loop(0, 8, lambda _, b: a @ b, a)), square)
    moved = 2 * 4 * count / best(jax.jit(lambda a: a + 1), jnp.zeros(count, jnp.float32))
    return Rates(jax.devices()[0].device_kind, flops, moved)


def told(work: str, seconds: dict[str, float], cost: Work, tokens: int, rates: Rates) -> tuple[float, str, float]:
    """Seconds of a work, its rate in words, its share of what the device gives."""
    took = seconds["rollout"] - seconds["prefill"] if work == "decode" else seconds[work]
    if work == "decode":
        return took, f"{cost.decode / took / 1e9:.0f} GB/s", cost.decode / took / rates.bytes
    flop = {"prefill": cost.prefill, "score": 2 * cost.forward, "update": cost.update}.get(work, 0.0)
    words = f"{tokens / took:,.0f} tokens/s" if work == "rollout" else f"{flop / took / 1e12:.3g} TFLOP/s"
    return took, words, flop / took / rates.flops


def table(shape: str, sides: dict[str, dict[str, float]], cost: Work, tokens: int, rates: Rates) -> str:
    """One line a work and side."""
    lines = [f"| {shape} | side | s | rate | of the device | wanted | rlhf_jax is faster by |", "|---|---|---|---|---|---|---|"]
    for work in ("rollout", "decode", "prefill", "score", "update"):
        for side, seconds in sides.items():
            took, words, share = told(work, seconds, cost, tokens, rates)
            ours = told(work, sides["rlhf_jax"], cost, tokens, rates)[0]
            wanted = f"{100 * TARGETS[work]:.0f} %" if work in TARGETS else ""
            cells = [
                "" if work == "rollout" else f"{100 * share:.1f} %",
                wanted,
                "" if side == "rlhf_jax" else f"{took / ours:.2f}x",
            ]
            lines.append(f"| {work} | {side} | {took:.4f} | {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="0.5B,1.5B", help=f"of {', '.join(SHAPES)}")
    for name, default in (("batch", 64), ("prompt", 512), ("response", 512), ("micro-batches", 8), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--attention", default="flash", choices=("dense", "flash"))
    parser.add_argument("--remat", default="elementwise", help="what the backward pass recomputes (model.remat)")
    parser.add_argument(
        "--platform", default="", help="as JAX_PLATFORMS: cuda, tpu, cpu (a trial); default: what JAX takes by itself"
    )
    parser.add_argument("--torch-python", metavar="PY", help="interpreter of an environment with PyTorch for this device")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--rates", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rates:
        small = args.platform == "cpu"
        print(json.dumps(measure_rates(1024 if small else 8192, 2**24 if small else 2**28)))
        return
    directory = Path(tempfile.mkdtemp(prefix="rlhf-jax-bench-"))
    again = [sys.executable, __file__, "--rates", "--platform", args.platform]
    measured = subprocess.run(
        again, check=True, capture_output=True, text=True, env=bench.environment(directory, platform=args.platform)
    )
    rates = Rates(*json.loads(measured.stdout.splitlines()[-1]))
    print(f"{rates.device}: {rates.flops / 1e12:.4g} TFLOP/s in bfloat16, {rates.bytes / 1e9:.4g} GB/s")
    sides = {"rlhf_jax": (sys.executable, "rlhf_jax", "serve")}
    if args.torch_python:
        sides["torch"] = (args.torch_python, "torch", "--eager")
    else:
        print("torch: no --torch-python, left out")
    found = []
    for shape in args.shapes.split(","):
        config = bench.QWEN | SHAPES[shape]
        sizes = {name: getattr(args, name) for name in ("batch", "prompt", "response", "micro_batches")}
        model = {"param_dtype": "bfloat16", "compute_dtype": "bfloat16", "attention": args.attention, "remat": args.remat}
        more = {"update": True, "model": model, "torch_device": "cpu" if args.platform == "cpu" else "cuda"}
        (directory / "sizes.json").write_text(json.dumps({"config": config, **sizes, **more}))
        seconds = {}
        for name, (python, driver, mode) in sides.items():  # one after another: a device holds one side's models and states
            side = bench.Side(name, python, driver, mode, log=directory, platform=args.platform)
            turns = {work: bench.take_turns(work, {name: (side, work)}, args.rounds).seconds[name] for work in side.works}
            side.close()
            if turns:
                seconds[name] = {work.split(" ")[0]: turns[work] for work in sorted(turns, key=lambda work: -turns[work])}
        cost = least(config, args.batch, args.prompt, args.response)
        if "rlhf_jax" in seconds:
            print(table(shape, seconds, cost, args.batch * args.response, rates))
        found.append({"shape": shape, **sizes, **more, "seconds": seconds, "least": cost._asdict(), "rates": rates._asdict()})
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    shutil.rmtree(directory)


if __name__ == "__main__":
    main()
