"""What the algorithms reach from a fine-tuned start, seed by seed, with the run files of configs/.

    python scripts/measure_algorithms.py --out runs/measure                                every file, seeds 0, 1 and 2
    python scripts/measure_algorithms.py --out runs/measure --seeds 0 --only grpo_addition dpo_reviews

Sums: share of exact answers to held-out sums, sampled at temperature 1, as the run logs it (eval/score). Reviews: gold reward
of 512 sampled answers, which training never sees. Prints a line a file and seed: before, after, seconds of the fine-tuning (0
where an earlier line has paid for it) and of the run, compilation, evaluations and export included.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from rlhf_jax import environment

environment.prepare()  # before JAX is imported

import numpy as np

from rlhf_jax import config, config_file, generate, metrics, offline, online
from rlhf_jax.data.tasks import reviews

CONFIGS = Path(__file__).parent.parent / "configs"
ANSWERS = 512


def run(name: str, out: Path, seed: int, *changes: str) -> Path:
    """Run configs/NAME.yaml below `out`; what is finished is not run again."""
    stage = config_file.stage_of(CONFIGS / f"{name}.yaml")
    settings: Any = config_file.load(
        CONFIGS / f"{name}.yaml", [f"out={out / name}", f"seed={seed}", *changes], config.STAGES[stage]
    )
    return (offline if stage in config.OFFLINE else online).run(stage, settings)


def gold_of(model: Path, seed: int) -> float:
    """Mean gold reward of sampled reviews."""
    generator = generate.open_model(model)
    prompts = [row["prompt"] for row in reviews.prompts(seed, ANSWERS)]
    ids = [generate.encode_prompt(generator.tokenizer, prompt) for prompt in prompts]
    settings = config.Sampling(max_new_tokens=reviews.RESPONSE_TOKENS)
    found = list(generate.answer(generator, ids, settings, seed=seed, batch_size=128))
    return float(reviews.gold(prompts, [each.text for each in found], [each.finished for each in found]).mean())


def measure(name: str, out: Path, seed: int, start_seed: int, changes: list[str]) -> tuple[float, float, float, float]:
    """Score before and after, seconds of the fine-tuning and of the run."""
    task = name.rpartition("_")[2]
    launched = time.perf_counter()
    start = run(f"sft_{task}", out / f"seed{start_seed}", start_seed) / "final"
    began = time.perf_counter()
    trained = run(name, out / f"seed{seed}", seed, f"model.path={start}", *changes)
    seconds = (began - launched, time.perf_counter() - began)
    if task == "reviews":
        return gold_of(start, seed), gold_of(trained / "final", seed), *seconds
    scores = [row["eval/score"] for row in metrics.read_rows(trained / metrics.METRICS) if "eval/score" in row]
    return scores[0], scores[-1], *seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/measure")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--start", type=int, help="seed of the fine-tuning; default: that of the run")
    parser.add_argument("--only", nargs="*", help="names of run files")
    parser.add_argument("--change", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the run files, not the start's")
    args = parser.parse_args()
    files = sorted(path.stem for task in ("addition", "reviews") for path in CONFIGS.glob(f"*_{task}.yaml"))
    for name in args.only or [name for name in files if not name.startswith("sft_")]:
        found = []
        for seed in args.seeds:
            start = seed if args.start is None else args.start
            found.append(measure(name, Path(args.out), seed, start, args.change))
            before, after, tuning, seconds = found[-1]
            print(f"{name} seed {seed}: {before:.3f} -> {after:.3f} in {tuning:.0f} + {seconds:.0f} s", flush=True)
        before, after, _, seconds = np.mean(found, axis=0)
        print(f"{name} mean: {before:.3f} -> {after:.3f} (least {min(each[1] for each in found):.3f}), {seconds:.0f} s a seed")


if __name__ == "__main__":
    main()
