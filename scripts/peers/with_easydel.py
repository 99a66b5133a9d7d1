"""EasyDeL's PPOTrainer: whole iterations, or one run of a single iteration.

    python with_easydel.py DIRECTORY loop|once

Its critic is a value head on the actor's own trunk, so it computes one trunk less than the others. Random weights.
"""

# pyright: reportMissingImports=false

import json
import sys
from pathlib import Path

from serve import Gate, finished, settle_jax, sizes

directory, mode = sys.argv[1:]

import easydel as ed
import jax
from datasets import Dataset
from flax import nnx
from jax import numpy as jnp
from transformers import AutoTokenizer, GenerationConfig

shape = sizes(directory)
B, P, R = shape["batch"], shape["prompt"], shape["response"]
tokenizer = AutoTokenizer.from_pretrained(f"{directory}/model", padding_side="left")
prompts = [json.loads(line)["prompt"] for line in Path(directory, "prompts.jsonl").read_text().splitlines()]
steps = 1 if mode == "once" else 1000
prompts = prompts[: B * steps]
gate = Gate(settle_jax) if mode == "loop" else lambda: None


def reward(prompts: list, completions: list, **_: object) -> list[float]:
    gate()
    return [float(len(text) % 7) for text in completions]


sizes_ = {
    name: value for name, value in shape["config"].items() if name not in ("model_type", "architectures", "rope_parameters")
}
config = ed.LlamaConfig(**sizes_, sharding_axis_dims=(1, 1, 1, 1, 1), attn_mechanism="vanilla")
config.eos_token_id, config.pad_token_id, config.bos_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id, None
model = ed.LlamaForCausalLM(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
model.generation_config = GenerationConfig()  # asked for, and set only by from_pretrained
trainer = ed.PPOTrainer(
    arguments=ed.PPOConfig(
        save_directory=f"{directory}/easydel",
        max_prompt_length=P,
        max_completion_length=R,
        max_length=P + R,
        num_ppo_epochs=1,
        num_return_sequences=1,
        total_batch_size=B,
        learning_rate=1e-6,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_training_steps=steps,
        num_train_epochs=1,
        use_wandb=False,
        do_last_save=False,
        save_optimizer_state=False,
        use_esurge_generation=False,
        progress_bar_type="json",
        generation_interval=None,
        clip_grad=1.0,
    ),
    model=model,
    reward_funcs=reward,
    train_dataset=Dataset.from_dict({"prompt": prompts}),
    processing_class=tokenizer,
)
with jax.default_device(jax.devices()[0]):
    trainer.train()
settle_jax()
finished(directory)
