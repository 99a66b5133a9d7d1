"""`transformers` and PyTorch: generation (eager, static cache, compiled), scoring and one PPO update, eager; on a CPU or one GPU.

python with_torch.py DIRECTORY [--compiled]
"""

import sys
from collections.abc import Callable

import torch
from serve import serve, sizes
from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig

directory = sys.argv[1]
shape = sizes(directory)
B, P, R = shape["batch"], shape["prompt"], shape["response"]
config = AutoConfig.for_model(**shape["config"])
torch.manual_seed(0)
device, micro = shape.get("torch_device", "cpu"), shape.get("micro_batches", 1)
torch.set_default_device(device)
torch.set_default_dtype(getattr(torch, shape.get("model", {}).get("param_dtype", "float32")))
actor = AutoModelForCausalLM.from_config(config).eval()
actor.generation_config.eos_token_id = None  # nothing stops
tokens = torch.randint(3, config.vocab_size, (B, P + R))
mask = torch.ones_like(tokens)
old, advantages = torch.randn(B, R) - 9, torch.randn(B, R)
works = {}


def waited(work: Callable[[], object]) -> Callable[[], None]:
    """The same, until the device has finished."""

    def until_done() -> None:
        work()
        if device == "cuda":
            torch.cuda.synchronize()

    return until_done


def generate(**how: object) -> object:
    """Plain sampling of R tokens, whatever is sampled."""
    with torch.inference_mode():
        return actor.generate(
            tokens[:, :P],
            attention_mask=mask[:, :P],
            do_sample=True,
            top_k=0,
            pad_token_id=0,
            **{"max_new_tokens": R, **how},
        )


def logprobs(model: torch.nn.Module, rows: slice) -> torch.Tensor:
    """Of the response's tokens; the head is applied to their positions alone."""
    logits = model(input_ids=tokens[rows], attention_mask=mask[rows], logits_to_keep=R + 1, use_cache=False).logits[:, :-1]
    return torch.log_softmax(logits, -1).gather(-1, tokens[rows, P:, None])[..., 0]


PARTS = [slice(at, at + B // micro) for at in range(0, B, B // micro)]


works["rollout eager"] = generate
works["prefill"] = lambda: generate(max_new_tokens=1)
works["rollout static cache"] = lambda: generate(cache_implementation="static", disable_compile=True)
if "--compiled" in sys.argv:
    how = CompileConfig(mode="default", fullgraph=False)
    vars(how)["_compile_all_devices"] = True  # by itself transformers compiles on GPUs alone
    works["rollout compiled"] = lambda: generate(cache_implementation="static", compile_config=how)

reference = AutoModelForCausalLM.from_config(config).eval()


def score() -> object:
    with torch.inference_mode():
        return [(logprobs(actor, rows), logprobs(reference, rows)) for rows in PARTS]


works["score"] = score
if shape["update"]:
    critic = AutoModelForCausalLM.from_config(config).model
    head = torch.nn.Linear(config.hidden_size, 1, bias=False)
    actor_step = torch.optim.AdamW(actor.parameters(), lr=1e-6, fused=True)
    critic_step = torch.optim.AdamW([*critic.parameters(), *head.parameters()], lr=1e-6, fused=True)

    def update() -> None:
        for rows in PARTS:
            ratio, gain = torch.exp(logprobs(actor, rows) - old[rows]), advantages[rows]
            (torch.maximum(-gain * ratio, -gain * ratio.clamp(0.8, 1.2)).sum() / (B * R)).backward()
        torch.nn.utils.clip_grad_norm_(actor.parameters(), 1.0)
        actor_step.step()
        actor_step.zero_grad()
        for rows in PARTS:
            states = critic(input_ids=tokens[rows], attention_mask=mask[rows], use_cache=False).last_hidden_state
            values = head(states[:, P - 1 : -1])[..., 0]
            (0.5 * (values - advantages[rows]).square().sum() / (B * R)).backward()
        torch.nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
        critic_step.step()
        critic_step.zero_grad()

    works["update"] = update
serve({name: waited(work) for name, work in works.items()})
