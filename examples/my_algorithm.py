"""A new online algorithm in one file, with no change in the package: GRPO whose advantage is the *rank* of an answer's score.

    python examples/my_algorithm.py          fine-tunes on sums of which half are wrong, then trains: minutes on two cores

Ranks do not care how a reward is scaled. PPO's clipped loss, checkpoints, the report come with the package.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax import algorithms, config, offline, online
from rlhf_jax.algorithms import critic_free


def rank_advantages(scores: jax.Array, group_size: int) -> jax.Array:
    """Mean rank among the answers to the same prompt, scaled to [-1, 1]; equal scores share one: f32[B] -> f32[B]."""
    groups = critic_free.in_groups(scores, group_size)
    above = groups[:, :, None] > groups[:, None, :]
    return ((above.sum(2) - above.sum(1)) / max(group_size - 1, 1)).reshape(-1)


def build(settings: config.GRPO) -> algorithms.Algorithm:
    def advantages(answers: critic_free.Answers) -> jax.Array:
        return rank_advantages(answers.scores, settings.group_size).astype(jnp.float32)

    return critic_free.build(settings, advantages, group_size=settings.group_size, kl_in="loss")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankRun(config.OnlineRun):
    rank: config.GRPO = dataclasses.field(default_factory=config.GRPO)


algorithms.ALGORITHMS["rank"], config.STAGES["rank"] = build, RankRun


def main(out: str = "runs/rank", tuning_steps: int = 1000, steps: int = 200, sums: int = 20000) -> None:
    model = config.Model(scratch=config.Scratch(width=64, layers=2, heads=16, kv_heads=16, mlp_width=256))
    data = config.Data(task="addition", task_options={"digits": 2, "count": sums}, max_prompt_tokens=8, max_tokens=12)
    fast = config.Optimizer(learning_rate=3e-3, schedule="cosine", warmup_steps=20, eps=1e-8, clip_norm=0.5)
    tuning = config.SFTRun(out=f"{out}/sft", steps=tuning_steps, batch_size=128, model=model, data=data, optimizer=fast)
    run = RankRun(
        out=f"{out}/rank",
        steps=steps,
        batch_size=256,
        model=config.Model(path=str(offline.run("sft", tuning) / "final")),
        data=data,
        sampling=config.Sampling(max_new_tokens=6),
        rank=config.GRPO(kl_coef=0.0),
        actor_optimizer=config.Optimizer(learning_rate=1e-3),
    )
    online.run("rank", run)


if __name__ == "__main__":
    main()
