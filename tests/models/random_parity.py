"""Shapes that nobody chose: variants changed at random, written by transformers, compared with it. Needs the torch extra.

    python tests/models/random_parity.py ROUNDS [FIRST_ROUND] [VARIANT ...]

Each round changes every variant's layers, heads, widths, windows, ropes, biases and ties, its storage dtype and its files, and
its config's generation. Compared: logits with left, right and no padding, 24 greedy tokens, scores, gradients (finite), and
what transformers makes of the model that we write again (bits of every tensor, logits). Prints a line each; exit status 1.
"""

import copy
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

sys.path.insert(0, str(Path(__file__).parent))
import make_references as theirs
import reference as ref
import variants as cases

from rlhf_jax.models import load_checkpoint, make_model, save_checkpoint

HEADS = ((1, 1), (2, 1), (2, 2), (3, 1), (4, 4), (5, 1), (6, 2), (6, 3), (8, 2))  # heads, key-value heads
ROPES = (
    cases.rope(100.0),
    cases.rope(1e4),
    cases.rope(37.0, "linear", factor=2.5),
    cases.LLAMA3 | {"factor": 4.0, "low_freq_factor": 1.5, "high_freq_factor": 3.0},
    cases.YARN | {"factor": 8.0, "original_max_position_embeddings": 16},
    cases.YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 0.9},
    cases.YARN_MSCALE,
)
ANY_ROPE = ("llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "mixtral", "gemma", "gemma2", "olmo2", "smollm3")
FLAGS = ("attention_bias", "mlp_bias", "use_parallel_residual", "qk_layernorm", "norm_topk_prob", "enable_bias", "bias")
UNTIED = ("phi", "gptj", "opt", "gpt_oss", "gemma3_text")  # a head with a bias, or classes that cannot be untied
NUMBERS = {
    "intermediate_size": (24, 40, 72),
    "moe_intermediate_size": (16, 40),
    "ffn_dim": (24, 64),
    "ffn_hidden_size": (40, 96),
    "n_inner": (None, 24, 40),
    "sliding_window": (1, 3, 5, 9, 17),
    "query_pre_attn_scalar": (8, 24, 144),
    "attn_logit_softcapping": (None, 3.0, 50.0),
    "final_logit_softcapping": (None, 5.0, 30.0),
    "num_experts": (4, 5, 8),
    "num_local_experts": (4, 5, 8),
    "num_experts_per_tok": (1, 2, 3),
    "rms_norm_eps": (1e-3, 2e-2),
    "layer_norm_eps": (1e-3, 2e-2),
    "layer_norm_epsilon": (1e-3, 2e-2),
    "do_layer_norm_before": (True, False),
}


def changed(name: str, rng: random.Random) -> dict[str, Any]:
    """The variant's settings with other values; each still means something to its class."""
    model_type, settings = cases.VARIANTS[name]
    settings = copy.deepcopy(settings)
    by_layer = settings.keys() & {"layer_types", "no_rope_layers", "mlp_only_layers"} or name == "olmo3"
    for key, values in NUMBERS.items():
        if key in settings and settings[key] is not None:
            settings[key] = rng.choice(values)
    for key in ("num_hidden_layers", "n_layer"):
        if key in settings and not by_layer:
            settings[key] = rng.choice((1, 2, 3, 5))
    settings |= {key: rng.random() < 0.5 for key in FLAGS if key in settings}
    if model_type not in UNTIED:
        settings["tie_word_embeddings"] = rng.random() < 0.5
    if model_type in ANY_ROPE:
        settings["rope_parameters"] = copy.deepcopy(rng.choice(ROPES))
    heads, shared = rng.choice(HEADS)
    if "num_key_value_heads" in settings and model_type != "phi3":
        settings |= {"num_attention_heads": heads, "num_key_value_heads": shared}
        settings["hidden_size"] = heads * rng.choice((8, 12, 16))
        if "head_dim" in settings:
            settings["head_dim"] = rng.choice((8, 10, 16, 24))
        if "num_experts_per_tok" in settings:  # torch's grouped product wants rows of whole 16 bytes
            settings["hidden_size"] = -(-settings["hidden_size"] // 8) * 8
        if model_type == "phi":
            settings["hidden_size"] = heads * 16
    elif "n_embd" in settings:
        settings["n_head"], settings["n_embd"] = heads, heads * rng.choice((8, 16))
    elif model_type == "bloom":
        settings["n_head"], settings["hidden_size"] = heads, heads * rng.choice((4, 8))
    elif model_type == "opt":
        settings["num_attention_heads"], settings["hidden_size"] = heads, heads * rng.choice((8, 16))
    elif model_type == "gpt_neox":
        settings["num_attention_heads"], settings["hidden_size"] = heads, heads * rng.choice((16, 32))
    return settings


def written(name: str, rng: random.Random, folder: Path) -> tuple[Any, Path, dict[str, Any]]:
    """transformers' model in float32, and the directory it was written to: some dtype, some number of files, some spelling."""
    settings, eager = changed(name, rng), cases.EAGER[name]
    model, _ = theirs.build(cases.VARIANTS[name][0], settings, folder / "drawn", rng.randrange(1000), eager)
    dtype = rng.choice((torch.float32, torch.bfloat16, torch.float16))
    directory = folder / "theirs"
    model.to(dtype).save_pretrained(directory, max_shard_size=rng.choice(("5GB", "15KB", "40KB")))
    attention = "eager" if eager else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation=attention).eval()
    return model, directory, settings


def older(directory: Path) -> None:
    """Leave only the keys that transformers 4 knows, of those that we write in both spellings."""
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in ("rope_parameters", "dtype")}))


def continued(model: Any, prompts: np.ndarray, mask: np.ndarray, *, cache: bool) -> tuple[np.ndarray, float]:
    """24 greedy tokens of transformers, and how far the closest choice was from a tie."""
    theirs.forget(model)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=24, pad_token_id=0, eos_token_id=None, use_cache=cache
    )
    options = {"return_dict_in_generate": True, "output_logits": True}
    out = model.generate(torch.tensor(prompts), attention_mask=torch.tensor(mask), **options)
    top = torch.stack(out.logits, 1).float().topk(2).values
    return out.sequences[:, prompts.shape[1] :].numpy(), float((top[..., 0] - top[..., 1]).min())


def logits_of(spec: Any, params: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    model = make_model(spec)
    run = jax.jit(lambda p: model.logits(p, model.hidden(p, ids, mask)), compiler_options=ref.FAST)
    return np.asarray(run(params))


def compared(name: str, hf: Any, found: Any, atol: float) -> Iterator[tuple[str, float]]:
    """One model in both: what is compared, and how far it is off, in units of its bound."""
    rows, mask = theirs.tokens_of(theirs.ROWS, 1)
    order = np.argsort(mask == 0, axis=1, kind="stable")
    cut = rows[:1], mask[:1]
    sides = {
        "left": (rows, mask),
        "right": (np.take_along_axis(rows, order, 1), np.take_along_axis(mask, order, 1)),
        "alone": cut,
    }
    for side, (ids, real) in sides.items():
        ours, expected = logits_of(found.spec, found.params, ids, real > 0), theirs.forward(hf, ids, real).numpy()
        yield side, np.abs(ours - expected)[real > 0].max() / atol
    prompts, prompt_mask = theirs.tokens_of(theirs.PROMPTS, 2)
    # A window of one token: transformers' cache answers otherwise than transformers without it, for every family.
    cache = name not in cases.LONG and getattr(hf.config, "sliding_window", None) != 1
    tokens, margin = continued(hf, prompts, prompt_mask, cache=cache)
    model = make_model(found.spec)
    if margin > 2e-3:
        run = jax.jit(lambda p: ref.greedy(model, p, prompts, prompt_mask > 0, 24), compiler_options=ref.FAST)
        yield "greedy", 2.0 * float(not np.array_equal(run(found.params), tokens))

    def spread(params: Any) -> jax.Array:
        return model.logits(params, model.hidden(params, rows, mask > 0)).std()

    slopes = jax.jit(jax.grad(spread), compiler_options=ref.FAST)(found.params)
    yield "gradient", 2.0 * float(not all(np.isfinite(x).all() for x in jax.tree.leaves(slopes)))
    states = jax.jit(lambda p: model.hidden(p, rows, mask > 0), compiler_options=ref.FAST)(found.params)
    head = cases.draw("score.weight", (1, found.spec.head_width), 5)
    score = theirs.score(found.source, hf, rows, mask, cases.EAGER[name], 5)
    yield "score", np.abs(np.asarray(states)[:, -1] @ head[0] - score).max() / 1e-4


def rewritten(name: str, hf: Any, found: Any, out: Path, *, old: bool) -> Iterator[tuple[str, float]]:
    """The model as we write it: every bit of every tensor, and what transformers and we read from it."""
    rows, mask = theirs.tokens_of(theirs.ROWS, 1)
    expected = theirs.forward(hf, rows, mask).numpy()
    save_checkpoint(out, found.spec, found.params, source=found.source)
    before, after = (
        {name: tensor for file in place.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for place in (found.source, out)
    )
    same = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    yield "bits", 2.0 * float(not same or any(before[key].dtype != after[key].dtype for key in before))
    if old:
        older(out)
    attention = "eager" if cases.EAGER[name] else "sdpa"
    again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation=attention).eval()
    yield "written", np.abs(theirs.forward(again, rows, mask).numpy() - expected)[mask > 0].max() / 1e-5
    ours = load_checkpoint(out)
    yield "read again", np.abs(logits_of(ours.spec, ours.params, rows, mask > 0) - expected)[mask > 0].max() / 2e-4


def differences(name: str, rng: random.Random, folder: Path) -> dict[str, float]:
    """What is compared -> how far it is off; greater than 1 is too far. Empty where experts are tied: either choice is right."""
    hf, directory, settings = written(name, rng, folder)
    mixture = "num_experts_per_tok" in settings
    if mixture and theirs.router_margin(hf, *theirs.tokens_of(theirs.ROWS, 1)) < 1e-4:
        return {}
    found = load_checkpoint(directory)
    first = dict(compared(name, hf, found, 2e-4 if mixture else 1e-4))
    return first | dict(rewritten(name, hf, found, folder / "ours", old=rng.random() < 0.5))


@torch.no_grad()
def main() -> None:
    rounds, first, names = int(sys.argv[1]), int((sys.argv[2:] or ["0"])[0]), sys.argv[3:]
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    total = failed = 0
    for number in range(first, first + rounds):
        for name in names or cases.VARIANTS:
            rng = random.Random(f"{name} {number}")  # noqa: S311
            with tempfile.TemporaryDirectory() as folder:
                found = differences(name, rng, Path(folder))
            bad = [what for what, size in found.items() if not size <= 1.0]
            total, failed = total + bool(found), failed + bool(bad)
            worst = max(found.get(side, 0.0) for side in ("left", "right", "alone"))
            sys.stdout.write(f"{name:24} {number:3}  worst logits {worst:5.0%} of the bound  {', '.join(found)}  {bad or ''}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{total - failed} of {total} models within the bounds\n")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
