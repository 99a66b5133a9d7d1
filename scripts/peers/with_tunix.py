"""tunix (google-tunix): its sampler, scoring and PPO losses; whole iterations of its PPOLearner, or one run of a single one.

    python with_tunix.py DIRECTORY serve|loop|once

Random weights. The model is tunix's Qwen 2 in the shape of S: its Llama 3 cannot be a critic (its call knows no segments). The
critic is an untied copy of the shape, because tunix's critic replaces an untied head.
"""

# pyright: reportMissingImports=false

import json
import sys
from pathlib import Path

from serve import Gate, finished, serve, settle_jax, sizes

directory, mode = sys.argv[1:]

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from transformers import AutoTokenizer
from tunix.generate import sampler as tunix_sampler
from tunix.models.qwen2 import model as qwen2
from tunix.rl import common, rl_cluster
from tunix.rl import utils as rl_utils
from tunix.rl.ppo import ppo_learner
from tunix.rl.rollout import base_rollout

shape = sizes(directory)
B, P, R, c = shape["batch"], shape["prompt"], shape["response"], shape["config"]
tokenizer = AutoTokenizer.from_pretrained(f"{directory}/model")
prompts = [json.loads(line)["prompt"] for line in Path(directory, "prompts.jsonl").read_text().splitlines()]
PAD, EOS = tokenizer.pad_token_id, tokenizer.eos_token_id


def decoder(seed: int, *, tied: bool) -> nnx.Module:
    sizes = qwen2.ModelConfig(
        num_layers=c["num_hidden_layers"],
        vocab_size=c["vocab_size"],
        embed_dim=c["hidden_size"],
        hidden_dim=c["intermediate_size"],
        num_heads=c["num_attention_heads"],
        head_dim=c["hidden_size"] // c["num_attention_heads"],
        num_kv_heads=c["num_key_value_heads"],
        rope_theta=10000,
        norm_eps=1e-6,
        use_tied_embedding=tied,
    )
    model = qwen2.Qwen2(sizes, rngs=nnx.Rngs(seed))
    return nnx.merge(nnx.graphdef(model), jax.tree.map(lambda x: x.astype(jnp.float32), nnx.state(model)))


mesh = jax.sharding.Mesh([[jax.devices()[0]]], ("fsdp", "tp"))
with mesh:
    actor, reference = decoder(0, tied=True), decoder(0, tied=True)
    critic = rl_utils.create_critic_model(decoder(1, tied=False))
settings = ppo_learner.PPOConfig(num_iterations=1, beta=0.05, kl_method="kl")


def parts() -> dict:
    """Pieces of an iteration."""
    cache = tunix_sampler.CacheConfig(
        cache_size=P + R + 1,
        num_layers=c["num_hidden_layers"],
        num_kv_heads=c["num_key_value_heads"],
        head_dim=c["hidden_size"] // c["num_attention_heads"],
    )
    sampler = tunix_sampler.Sampler(actor, tokenizer, cache)
    key = iter(jax.random.split(jax.random.key(0), 100_000))
    asked, answered = (jax.random.randint(jax.random.key(n), (B, width), 3, c["vocab_size"]) for n, width in ((1, P), (2, R)))
    noise = jax.random.normal(jax.random.key(3), (B, R))
    example = ppo_learner.TrainExample(
        prompt_ids=asked,
        prompt_mask=jnp.ones((B, P), "int32"),
        completion_ids=answered,
        completion_mask=jnp.ones((B, R), bool),
        advantages=noise,
        ref_per_token_logps=None,
        old_per_token_logps=noise - 9,
        returns=noise,
        old_values=noise,
    )
    from tunix.rl import algo_core

    optimizers = [nnx.Optimizer(m, optax.adamw(1e-6), wrt=nnx.Param) for m in (actor, critic)]

    def learn(model, optimizer, example, value):
        if value:
            loss = lambda m: algo_core.ppo_value_loss_fn(m, example, 0.2, PAD, EOS)  # noqa: E731
        else:
            loss = lambda m: algo_core.ppo_policy_loss_fn(m, example, settings, PAD, EOS)  # noqa: E731
        found, gradients = nnx.value_and_grad(loss, has_aux=True)(model)
        optimizer.update(model, gradients)
        return found[0]

    learn = nnx.jit(learn, static_argnames=("value",))

    def rollout():
        how = {"max_generation_steps": R, "max_prompt_length": P, "temperature": 1.0, "top_p": 1.0, "top_k": None}
        return sampler(prompts[:B], seed=next(key), eos_tokens=[c["vocab_size"] + 1], **how).tokens

    def score():
        found = [common.compute_per_token_logps(*nnx.split(m), asked, answered, PAD, EOS) for m in (actor, reference)]
        jax.block_until_ready(found)

    def update():
        learn(actor, optimizers[0], example, value=False)
        learn(critic, optimizers[1], example, value=True)
        settle_jax()

    return {"rollout": rollout, "score": score, "update": update}


def train() -> None:
    """PPOLearner with a constant reward."""
    gate = Gate(settle_jax) if mode == "loop" else lambda: None

    def reward(prompts: list[str], completions: list[str], **_: object) -> list[float]:
        gate()
        return [float(len(text) % 7) for text in completions]

    steps = 1 if mode == "once" else 1000
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.CRITIC, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    cluster = rl_cluster.RLCluster(
        actor=actor,
        critic=critic,
        reference=reference,
        tokenizer=tokenizer,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            rollout_engine="vanilla",
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.adamw(1e-6),
                critic_optimizer=optax.adamw(1e-6),
                eval_every_n_steps=10**9,
                max_steps=steps,
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=R, max_prompt_length=P, kv_cache_size=P + R + 1, temperature=1.0, top_p=1.0
            ),
        ),
    )
    learner = ppo_learner.PPOLearner(cluster, settings, reward_fns=reward)
    with mesh:
        learner.train({"prompts": np.array(prompts[:B])} for _ in range(steps))
    settle_jax()
    finished(directory)


if mode == "serve":
    serve(parts())
else:
    train()
