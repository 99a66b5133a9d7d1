"""This package: the programs of a run by themselves, or whole iterations of its loop.

python with_rlhf_jax.py DIRECTORY serve|loop|loop-model
"""

import dataclasses
import sys
from pathlib import Path

from serve import Gate, serve, settle_jax, sizes

from rlhf_jax import environment

environment.prepare()
environment.keep_freed_memory()

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import build, config, config_file, models, online, parallel, programs, sampling, scoring, setups
from rlhf_jax.types import Frozen, Prompts, RewardInput

GATE = Gate(settle_jax)


def constant(batch: RewardInput) -> np.ndarray:
    """The gate, and a reward that costs nothing."""
    GATE()
    return np.asarray([len(text) % 7 for text in batch.responses], np.float32)


def parts(directory: str) -> dict:
    """Rollout, scoring and update as `programs` makes them, on random weights."""
    shape = sizes(directory)
    batch, prompt, response, vocab = shape["batch"], shape["prompt"], shape["response"], shape["config"]["vocab_size"]
    mesh, spec = parallel.make_mesh(config.Mesh()), models.spec_of(shape["config"])
    settings = config.PPORun(
        batch_size=batch,
        model=config.Model(**shape.get("model", {})),
        data=config.Data(task="reviews"),
        sampling=config.Sampling(max_new_tokens=response),
        ppo=config.PPO(epochs=1, minibatches=1, micro_batches=shape.get("micro_batches", 1)),
    )
    roles = {"actor": ("lm", True), "critic": ("value", True), "reference": ("lm", False)}
    models_ = {
        name: build.abstract_part(settings.model, spec, mesh, head=head, trained=trained)
        for name, (head, trained) in roles.items()
        if shape["update"] or name != "critic"
    }
    model = models_["actor"].model
    kept = build.dtype(settings.model.param_dtype)
    init = jax.jit(lambda key, head: jax.tree.map(lambda leaf: leaf.astype(kept), model.init(key, head=head)), static_argnums=1)
    params = {name: init(jax.random.key(n), roles[name][0]) for n, name in enumerate(models_)}
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(3, vocab, (batch, prompt)), jnp.int32)
    prompts = Prompts(tokens=tokens, mask=jnp.ones((batch, prompt), bool), index=jnp.arange(batch), sample=jnp.zeros(batch, int))
    stops: dict = {"stop_ids": (), "pad_id": 0}
    sample = jax.jit(sampling.make_sampler(model, settings.sampling, **stops))
    frozen = Frozen(reference=params["reference"])
    scorer = jax.jit(scoring.make_scorer(model, needs=("reference",)))
    decoding = jax.jit(model.for_decoding)(params["actor"])
    rollout = sample(decoding, prompts, jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 100_000))
    one = jax.jit(sampling.make_sampler(model, dataclasses.replace(settings.sampling, max_new_tokens=1), **stops))
    works = {
        "prefill": lambda: jax.block_until_ready(one(decoding, prompts, next(keys))),
        "rollout": lambda: jax.block_until_ready(sample(decoding, prompts, next(keys))),
        "score": lambda: jax.block_until_ready(scorer(params["actor"], None, frozen, rollout)),
    }
    if not shape["update"]:
        return works
    optimizers = setups.online_optimizers("ppo", settings)
    made = programs.online_programs(
        "ppo",
        settings,
        build.algorithm("ppo", settings),
        mesh,
        programs.Parts(**models_),
        prompt_length=prompt,
        optimizers=optimizers,
        **stops,
    )
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), made["learn"].args[0])
    state = state.replace(
        actor=programs.init_train_state(optimizers[0], params["actor"]),
        critic=programs.init_train_state(optimizers[1], params["critic"]),
    )
    scored = made["score"].compile()(params["actor"], params["critic"], frozen, rollout)
    learn, scores, held = made["learn"].compile(), jnp.asarray(rng.normal(size=batch), jnp.float32), [state]
    params.pop("critic")

    def update() -> None:
        found, metrics = learn(held.pop(), frozen, rollout, scores, scored, next(keys), None)
        held.append(found)
        jax.block_until_ready((held, metrics))

    return works | {"update": update}


if __name__ == "__main__":
    directory, mode = sys.argv[1:]
    if mode == "serve":
        serve(parts(directory))
    else:
        overrides = [f"out={directory}/{mode}", "steps=1000", f"reward.functions=[{{function: '{Path(__file__)}:constant'}}]"]
        if mode == "loop-model":
            overrides.append(f"reward.model={directory}/reward")
        online.run("ppo", config_file.load(Path(directory) / "run.yaml", overrides, config.PPORun))
