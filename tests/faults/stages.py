"""Tiny runs of the real commands, what kills them, and what an interrupted run must have in common with an uninterrupted one."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

CHILD = Path(__file__).with_name("child.py")
STEPS = 6
KILLED = -9
NOT_REPRODUCIBLE = ("time_s", "time/", "memory/", "throughput/")  # metrics that tell about the machine, not about the run


def write_configs(folder: Path) -> dict[str, Path]:
    """Run files of the three stages, each on what the one before exports; every part of the state is in use."""
    scratch = {"width": 32, "layers": 1, "heads": 2, "kv_heads": 1, "mlp_width": 48, "max_length": 64}
    common: dict[str, Any] = {
        "seed": 3,
        "steps": STEPS,
        "batch_size": 16,
        "save": {"every": 2},
        "log": {"eval_every": 3, "eval_prompts": 4},
    }
    data = {"task": "reviews", "limit": 200, "max_prompt_tokens": 8, "max_tokens": 32, "eval_fraction": 0.1}
    words = ["good", "bad", "warm", "cold", "fresh", "stale", "kind", "rude"]
    with (folder / "pairs.jsonl").open("w") as file:
        for n in range(64):
            row = {
                "prompt": f"the {words[n % 7]} hotel :",
                "chosen": f" i liked the {words[n % 8]} bed .",
                "rejected": " it was .",
            }
            file.write(json.dumps(row) + "\n")
    model = {"path": str(folder / "sft" / "final")}
    adam = {"learning_rate": 1e-3}
    stages = {
        "sft": {"model": {"scratch": scratch}, "data": data, "optimizer": adam},
        "reward": {"model": model, "data": data | {"task": None, "path": str(folder / "pairs.jsonl")}, "optimizer": adam},
        "ppo": {
            "model": model,
            "data": data,
            "reward": {"model": str(folder / "reward" / "final")},
            "sampling": {"max_new_tokens": 8},
            "actor_optimizer": adam,
            "critic_optimizer": adam,
            "ptx_data": data,
            "ppo": {
                "epochs": 2,
                "minibatches": 2,
                "adaptive_kl": {"target": 0.01, "horizon": 100},
                "ema_decay": 0.9,
                "ptx_coef": 0.1,
            },
        },
    }
    # Needs nothing that another stage exports: the embedded task's own reward, a model with random weights.
    stages["alone"] = stages["ppo"] | {"model": {"scratch": scratch}, "reward": {}}
    paths = {}
    for stage, keys in stages.items():
        paths[stage] = folder / f"{stage}.yaml"
        paths[stage].write_text(yaml.safe_dump(common | {"out": str(folder / stage)} | keys))
    return paths


def environment(devices: int) -> dict[str, str]:
    """One process on simulated devices, with the tests' compilation cache."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(Path(__file__).parents[2])}


def start(arguments: list[Any], *, point: str = "none", devices: int = 1, **variables: str) -> subprocess.Popen[str]:
    """The command line in its own process."""
    words = [sys.executable, str(CHILD), point, *map(str, arguments)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words, env=environment(devices) | variables, **pipes)


def start_several(arguments: list[Any], *, processes: int, devices: int, last: Sequence[Any] = ()) -> list[subprocess.Popen[str]]:
    """The same command in several processes of one run, each with its share of the devices; `last`: told to the last alone."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    told = [arguments] * (processes - 1) + [[*arguments, *last]]
    return [start(words, devices=devices, JAX_PROCESS_ID=str(n), **shared) for n, words in enumerate(told)]


def finish(process: subprocess.Popen[str], timeout_s: float = 3000) -> tuple[int, str]:
    """Exit status and everything it printed."""
    try:
        output, _ = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    return process.returncode, output


def run(*arguments: Any, point: str = "none", devices: int = 1) -> tuple[int, str]:
    return finish(start(list(arguments), point=point, devices=devices))


def rows(path: Path) -> list[dict[str, Any]]:
    """Lines of a run's file without what only tells about the machine; a torn line is an error here."""
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{key: value for key, value in row.items() if not key.startswith(NOT_REPRODUCIBLE)} for row in found]


def outcome(out: Path) -> dict[str, Any]:
    """What must be equal: the last checkpoint's whole state, the exported models, metrics and samples row by row."""
    from tests.digests import read_digest

    latest = (out / "checkpoints" / "LATEST").read_text().strip()
    models = {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.glob("final*/**/*"))
        if path.is_file()
    }
    return {
        "step": int(latest),
        "state": read_digest(out / "checkpoints" / latest),
        "models": models,
        "metrics": rows(out / "metrics.jsonl"),
        "samples": rows(out / "samples.jsonl"),
    }
