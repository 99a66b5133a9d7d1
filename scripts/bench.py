"""Speed beside the peers, in one run: what is compared takes turns, and only ratios of one run are worth anything.

    python scripts/bench.py [--rounds 7] [--only rollout,score,...] [--json FILE]
        [--torch-python PY] [--tunix-python PY] [--trl-python PY] [--easydel-python PY]

Model S: 4 layers, width 256, 4 heads, 2 key-value heads, gated MLP 704, vocabulary 8192, tied, float32; batch 16, prompt 64,
response 64. Each side is a process of its own in its own environment (`peers/with_*.py`), told to work when its turn comes;
two rounds are not counted, then medians. A peer whose interpreter is not given is left out, with a line.

    rollout    16 x 64 sampled tokens, nothing stops
    score      log-probabilities of the 1,024 response tokens under actor and reference
    update     clipped loss of the actor, value loss of the critic, backward passes, clipping, AdamW
    iteration  one whole iteration of each trainer's own loop, one epoch, one minibatch; reward model: beside TRL, which has no
               other reward; host function: beside tunix and EasyDeL
    start      from starting a process to its first finished iteration, which is its last, and to its end; peak memory to the end;
               compilation cache empty, then filled
    skewed     continuous batching beside the plain batch, answers of geometric length
    qwen       rollout and score at the shape of Qwen2.5-0.5B, batch 4, prompt 64, response 32
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

PEERS = Path(__file__).parent / "peers"
ROOT = Path(__file__).parents[1]
ROWS = ("rollout", "score", "update", "iteration", "start", "skewed", "qwen")
S: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
QWEN = S | {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
}
TARGETS = {  # (row, peer): at least this many times as fast
    ("rollout", "torch"): 2.2,
    ("rollout", "tunix"): 1.3,
    ("score", "torch"): 1.6,
    ("score", "tunix"): 1.3,
    ("update", "torch"): 1.1,
    ("update", "tunix"): 1.6,
    ("iteration, reward model", "trl"): 1.7,
    ("iteration, host reward", "tunix"): 1.5,
    ("iteration, host reward", "easydel"): 3.0,
    ("start, cold", "tunix"): 3.0,
    ("start, warm", "tunix"): 6.0,
    ("skewed", "plain batch"): 1.8,
    ("qwen rollout", "torch"): 1.0,
    ("qwen score", "torch"): 1.0,
}


class Side:
    """A process that works when it is told to."""

    def __init__(self, name: str, python: str, driver: str, *args: str, log: Path, platform: str = "cpu"):
        self.name, self.log = name, log / f"{name}-{args[-1].strip('-')}.log"
        command = [python, str(PEERS / f"with_{driver}.py"), str(log), *args]
        with self.log.open("w") as errors:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            self.process = subprocess.Popen(command, text=True, env=environment(log, platform=platform), **pipes)
        self.works = self.read().get("ready", [])

    def read(self) -> dict[str, Any]:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if line:
            return json.loads(line)
        self.works = []
        print(f"{self.name}: ended early; the last lines of {self.log}:", *self.log.read_text().splitlines()[-5:], sep="\n  ")
        return {}

    def work(self, name: str) -> float:
        """Seconds; nan once the process has died."""
        pipe = self.process.stdin
        try:
            if pipe is not None:
                pipe.write(name + "\n")
                pipe.flush()
        except BrokenPipeError:
            return float("nan")
        return self.read().get("seconds", float("nan"))

    def close(self) -> float:
        """Peak memory, MB; nan if the process has died."""
        with contextlib.suppress(BrokenPipeError), self.process as process:
            if process.stdin is not None:
                process.stdin.close()
            return self.read().get("peak_mb", float("nan"))
        return float("nan")


def environment(directory: Path, cache: str = "xla", platform: str = "cpu") -> dict[str, str]:
    """Threads that wait sleep, so that a side whose turn it is not costs nothing; one compilation cache for all."""
    mine = {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": platform,
        "JAX_COMPILATION_CACHE_DIR": str(directory / cache),
        "OMP_WAIT_POLICY": "passive",
        "KMP_BLOCKTIME": "0",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(directory / "datasets"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    return os.environ | mine


class Figure(NamedTuple):
    """Median seconds of every contestant in one row."""

    row: str
    seconds: dict[str, float]
    peak_mb: dict[str, float]


def take_turns(row: str, contestants: dict[str, tuple[Side, str]], rounds: int) -> Figure:
    """Every contestant once a round, in an order that turns round; the first two rounds are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 2):
        for name, (side, work) in list(contestants.items())[:: 1 if turn % 2 else -1]:
            took = side.work(work)
            if turn > 1:
                seconds[name].append(took)
    return Figure(row, {name: statistics.median(values) for name, values in seconds.items()}, {})


def parts(args: argparse.Namespace, directory: Path, rows: list[str], prefix: str = "") -> list[Figure]:
    """Rollout, score, update."""
    sides = [Side("rlhf_jax", sys.executable, "rlhf_jax", "serve", log=directory)]
    if args.torch_python:
        sides.append(
            Side("torch", args.torch_python, "torch", *(["--compiled"] if args.compiled else ["--eager"]), log=directory)
        )
    if args.tunix_python and not prefix:
        sides.append(Side("tunix", args.tunix_python, "tunix", "serve", log=directory))
    found = []
    for row in rows:
        here = {
            f"{side.name}{work.removeprefix(row)}": (side, work) for side in sides for work in side.works if work.startswith(row)
        }
        found.append(take_turns(prefix + row, here, args.rounds))
    peaks = {side.name: side.close() for side in sides}
    return [figure._replace(peak_mb=peaks) for figure in found]


def iterations(args: argparse.Namespace, directory: Path) -> list[Figure]:
    """Whole iterations: beside TRL with a reward model, beside the others with a host reward."""
    found = []
    for row, mode, peers in (
        ("iteration, reward model", "loop-model", ("trl",)),
        ("iteration, host reward", "loop", ("tunix", "easydel")),
    ):
        sides = [Side("rlhf_jax", sys.executable, "rlhf_jax", mode, log=directory)]
        given = [(peer, python) for peer in peers if (python := getattr(args, f"{peer}_python"))]
        sides += [Side(peer, python, peer, "loop", log=directory) for peer, python in given]
        alive = {side.name: (side, "go") for side in sides if side.works}
        figure = take_turns(row, alive, args.rounds)
        found.append(figure._replace(peak_mb={side.name: side.close() for side in sides}))
    return found


def starts(args: argparse.Namespace, directory: Path) -> list[Figure]:
    """A process that runs one iteration, twice: compilation cache empty, and filled by the first."""
    ours = [sys.executable, "-m", "rlhf_jax", "ppo", str(directory / "run.yaml"), "steps=1", "--from-scratch"]
    commands = {"rlhf_jax": [*ours, "reward.functions=[{function: length}]", f"out={directory}/start"]}
    for peer in ("tunix", "trl", "easydel"):
        if python := getattr(args, f"{peer}_python"):
            commands[peer] = [python, str(PEERS / f"with_{peer}.py"), str(directory), "once"]
    found = {(state, to): Figure(f"start, {state}{to}", {}, {}) for to in ("", ", to the end") for state in ("cold", "warm")}
    for name, command in commands.items():
        told = directory / ("start/metrics.jsonl" if name == "rlhf_jax" else "finished")  # of the iteration, by whoever ran it
        for state in ("cold", "warm"):
            with (directory / f"{name}-{state}.log").open("w") as log:
                started = start(command, told, b"reward/score" if name == "rlhf_jax" else b"", directory, f"xla-{name}", log)
            for to, seconds in (("", started.iteration), (", to the end", started.end)):
                found[state, to].seconds[name] = seconds
                found[state, to].peak_mb[name] = started.peak_mb
    return list(found.values())


class Started(NamedTuple):
    """A process that has ended; nan where it failed."""

    iteration: float  # s, until the iteration was finished
    end: float  # s
    peak_mb: float


def start(command: list[str], told: Path, word: bytes, directory: Path, cache: str, log: Any) -> Started:
    """Run a command; its iteration is finished once the file `told` is there and holds `word`."""
    told.unlink(missing_ok=True)
    began, iteration, ended = time.perf_counter(), float("nan"), 0
    process = subprocess.Popen(command, env=environment(directory, cache), stdout=log, stderr=log)
    while not ended:
        time.sleep(0.01)
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        now = time.perf_counter() - began
        if math.isnan(iteration) and told.is_file() and word in told.read_bytes():
            iteration = now
    process.returncode = status  # or Popen would wait for it again
    return Started(iteration, now, usage.ru_maxrss / 1024) if status == 0 else Started(*[float("nan")] * 3)


def prepare(directory: Path, config: dict[str, Any], batch: int, prompt: int, response: int, *, update: bool) -> None:
    """What the sides read: sizes; for whole iterations also two models, a tokenizer of V words, prompts and a run file."""
    directory.mkdir(parents=True, exist_ok=True)
    sizes = {"config": config, "batch": batch, "prompt": prompt, "response": response, "update": update}
    (directory / "sizes.json").write_text(json.dumps(sizes))
    if not update:
        return
    from rlhf_jax import environment

    environment.prepare()
    import jax
    import numpy as np
    import tokenizers
    import transformers

    from rlhf_jax import models
    from rlhf_jax.data.tokenizer import load_tokenizer

    vocabulary = {
        word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(3, config["vocab_size"]))])
    }
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, **named).save_pretrained(directory / "tokenizer")
    spec = models.spec_of(config)
    model, tokenizer = models.make_model(spec), load_tokenizer(directory / "tokenizer")
    files: dict[str, Any] = {"tokenizer": tokenizer}
    for name, head in (("model", "lm"), ("reward", "score")):
        params = model.init(jax.random.key(0), head=head)
        models.save_checkpoint(directory / name, spec, params, head=head, **files)
    rng = np.random.default_rng(0)
    words = rng.integers(3, config["vocab_size"], (64 * batch, prompt))
    (directory / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": " ".join(f"w{i}" for i in row)}) + "\n" for row in words)
    )
    run = {
        "out": str(directory / "run"),
        "batch_size": batch,
        "model": {"path": str(directory / "model")},
        "data": {"path": str(directory / "prompts.jsonl"), "max_prompt_tokens": prompt},
        "sampling": {"max_new_tokens": response},
        "ppo": {"epochs": 1, "minibatches": 1, "old_logprobs": "rollout"},
        "actor_optimizer": {"learning_rate": 1e-6},
        "critic_optimizer": {"learning_rate": 1e-6},
        "save": {"every": 0},
        "log": {"eval_every": 0},
    }
    (directory / "run.yaml").write_text(json.dumps(run))


def table(figures: list[Figure]) -> str:
    """One line a contestant: median seconds, our time into theirs, the target."""
    lines = ["| work | side | s | rlhf_jax is faster by | target | peak MB |", "|---|---|---|---|---|---|"]
    for figure in figures:
        ours = figure.seconds.get("rlhf_jax", float("nan"))
        for name, seconds in figure.seconds.items():
            peer = name.split(" ")[0] if name != "plain batch" else name
            target = TARGETS.get((figure.row, peer))
            ratio = "" if name == "rlhf_jax" else f"{seconds / ours:.2f}x"
            memory = figure.peak_mb.get(peer)
            lines.append(
                f"| {figure.row} | {name} | {seconds:.3f} | {ratio} | {f'{target}x' if target else ''} | "
                f"{'' if memory is None else f'{memory:.0f}'} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for peer in ("torch", "tunix", "trl", "easydel"):
        parser.add_argument(f"--{peer}-python", metavar="PY", help=f"interpreter of an environment with {peer}")
    parser.add_argument("--compiled", action="store_true", help="also transformers with torch.compile (a minute to compile)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default=",".join(ROWS), help="rows, with commas between")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--keep", type=Path, help="directory for models, logs and caches; default: a temporary one")
    args = parser.parse_args()
    rows = args.only.split(",")
    for peer in ("torch", "tunix", "trl", "easydel"):
        if getattr(args, f"{peer}_python") is None:
            print(f"{peer}: no --{peer}-python, left out")
    directory = args.keep or Path(tempfile.mkdtemp(prefix="rlhf-jax-bench-"))
    prepare(directory, S, 16, 64, 64, update=True)
    figures: list[Figure] = []
    if chosen := [row for row in ("rollout", "score", "update") if row in rows]:
        figures += parts(args, directory, chosen)
    if "iteration" in rows:
        figures += iterations(args, directory)
    if "start" in rows:
        figures += starts(args, directory)
    if "skewed" in rows:
        import growth

        figures.append(Figure("skewed", growth.skewed(args.rounds), {}))
    if "qwen" in rows:
        prepare(directory / "qwen", QWEN, 4, 64, 32, update=False)
        figures += parts(args, directory / "qwen", ["rollout", "score"], "qwen ")
    print(table(figures))
    if args.json:
        args.json.write_text(json.dumps([figure._asdict() for figure in figures], indent=1))
    if args.keep is None:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
