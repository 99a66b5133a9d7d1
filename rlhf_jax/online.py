"""The loop of PPO, GRPO, RLOO and their kin: it does not know which one runs. Read this page third.

    rollout = sample(actor, prompts, key)                             jitted, sharded
    scored  = score(actor, critic, reference, rollout)                log-probabilities and values
    scores  = reward(rollout)                                         reward model, host functions (while the device scores)
    state   = learn(state, rollout, scores, scored, key)              experience, then epochs x minibatches; donated

Dispatch is asynchronous: the metrics of step n - 1 are read while the device computes step n. Randomness is
`fold_in(root, step)` and batches are a function of (seed, step), so the run that was interrupted is the run that was not.
"""

import contextlib
import functools
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax import build, config, health, parallel, processes, setups
from rlhf_jax.rewards import HostReward
from rlhf_jax.rewards.check import RewardError
from rlhf_jax.session import Session, open_session
from rlhf_jax.setups import OnlineSetup
from rlhf_jax.types import Prompts, RewardInput, Rollout, RunState


class Scores(NamedTuple):
    """What the rewards said about a rollout."""

    total: jax.Array  # f32[B], reward units
    parts: dict[str, float | jax.Array]  # each by itself, where there are several: mean of a host reward, f32[B] of the model's


class Pending(NamedTuple):
    """A step that is dispatched and whose results have not been read."""

    step: int
    metrics: dict[str, jax.Array]
    rollout: Rollout
    parts: dict[str, float | jax.Array]
    prompt_tokens: int  # without padding
    answer_tokens: jax.Array  # i32[]
    began: float


def run(stage: str, settings: config.OnlineRun, *, from_scratch: bool = False, override: Collection[str] = ()) -> Path:
    """Train, evaluate, export; the same call again continues an interrupted run.

    Args:
      stage: "ppo" or another key of `algorithms.ALGORITHMS`.
      settings: the run file.
      from_scratch: set an earlier run in the same directory aside instead of continuing it.
      override: keys that may differ from the earlier run that is continued.
    Returns: the run's directory. Raises `UserError` for what a user can mend; what was saved stays.
    """
    plan = processes.together(lambda: setups.plan_online(stage, settings))
    made: list[OnlineSetup] = []

    def restore(checkpoints: Any) -> Any:
        made.append(setups.set_up_online(plan))
        checkpoints.require_space(made[0].abstract)
        return checkpoints.restore(made[0].abstract)

    with open_session(
        stage, settings, plan.fingerprints, from_scratch=from_scratch, override=override, restore=restore, sizes=plan.sizes
    ) as (session, restored):
        if session.directory.completed_step is not None:
            session.recorder.note(f"{settings.out}: already complete at step {session.directory.completed_step}")
            return Path(settings.out)
        for text in plan.notes:
            session.recorder.note(text)
        setup = made[0]
        state = setup.begin(None if restored is None else restored.state)
        with health.phase("update", setup.components, stage=stage):  # what is only seen when results are read
            state = train(setup, state, session)
        with session.recorder.phase("export"), health.phase("export", setup.components):
            setup.export(state)
        processes.together(lambda: session.directory.complete(settings.steps))
    processes.together(session.show)
    return Path(settings.out)


def train(setup: OnlineSetup, state: RunState, session: Session) -> RunState:
    """Iterate from the state's step to the last."""
    settings, do, frozen, recorder = setup.settings, setup.do, setup.frozen, session.recorder
    root = build.root_key(settings, "rollout")
    start = int(state.step)
    pending: Pending | None = None
    if start == 0 or session.owes_evaluation:
        state = evaluate(setup, state, session, start)
    if session.owes_evaluation:
        session.save(start, state, replace=True)
    for step in range(start, settings.steps):
        session.begin(step + 1)
        key, batch = jax.random.fold_in(root, step), setup.prompts(step)
        prompts, prompt_tokens = setup.place(batch), int(batch.mask.sum()) * setup.plan.algorithm.group_size
        critic = None if state.critic is None else state.critic.params
        jax.block_until_ready(state.step)  # or the decoding copy would lie beside the update that its parameters come from
        began = time.perf_counter()
        with recorder.phase("rollout", step + 1) as until, health.phase("rollout", setup.components):
            decoding = do["sync"](state.actor.params, frozen.actor)
            rollout = do["rollout"](decoding, prompts, key)
            greedy = do["greedy"](decoding, prompts, key) if "greedy" in do else None
            del decoding  # or the next step would hold two copies
            until(rollout.finished)
        with recorder.phase("score", step + 1) as until, health.phase("score", setup.components):
            scored = do["score"](state.actor.params, critic, frozen, rollout)
            until(scored.logprobs)
        with recorder.phase("reward", step + 1) as until, stop_saved(setup, session, state, pending):
            scores = reward(setup, rollout)  # on the host while the device scores
            if greedy is not None:
                total = reward(setup, greedy).total
                scored = scored.replace(greedy_score=total, greedy_finished=greedy.finished, greedy_mask=greedy.action_mask)
            until(scores.total)
        with recorder.phase("update", step + 1) as until:
            jax.block_until_ready((rollout, greedy))  # or the decoding copy's memory is not free for the update
            answer_tokens = rollout.action_mask.sum()  # before the update, or who reads it waits for the update
            state, metrics = do["learn"](state, frozen, rollout, scores.total, scored, key, setup.ptx_batch(step))
            until(metrics)
            if pending is not None:
                finish(setup, session, pending, began)
            pending = Pending(step + 1, metrics, rollout, scores.parts, prompt_tokens, answer_tokens, began)
        if session.pause_due(step + 1):
            finish(setup, session, pending)
            pending = None
            if session.evaluation_due(step + 1):
                session.watchdog.pause()
                with stop_saved(setup, session, state, None, owes_evaluation=True):
                    state = evaluate(setup, state, session, step + 1)
            session.settle(step + 1, state)
    return state


@contextlib.contextmanager
def stop_saved(
    setup: OnlineSetup, session: Session, state: RunState, pending: Pending | None, *, owes_evaluation: bool = False
) -> Iterator[None]:
    """A reward from outside that fails is never a reward of 0: the run stops with everything it has learnt saved."""
    try:
        yield
    except RewardError as error:
        if pending is not None:
            finish(setup, session, pending)
        step = int(state.step)
        session.directory.sync()
        session.checkpoints.save(step, state, {"step": step, "owes_evaluation": owes_evaluation})
        session.checkpoints.wait()
        raise RewardError(f"{error}\nStep {step} is saved; mend the reward and give the same command again.") from error


def reward(setup: OnlineSetup, rollout: Rollout) -> Scores:
    """Score a rollout: the reward model on the devices, functions and servers on the host, summed with their weights."""
    settings = setup.settings.reward
    total: Any = None
    parts: dict[str, float | jax.Array] = {}
    if "reward" in setup.do:
        with health.phase("score", setup.components):
            of_model = setup.do["reward"](setup.frozen.reward, rollout)
            total = settings.model_weight * of_model
        if setup.host_reward is not None:
            parts["reward/model"] = of_model
    if setup.host_reward is not None:
        batch = reward_input(setup, rollout)
        answer = processes.shared(functools.partial(_ask, setup.host_reward, batch))
        if "error" in answer:
            raise RewardError(answer["error"])
        parts |= answer["parts"]
        values = setup.place(np.asarray(answer["values"], np.float32))
        total = values if total is None else total + values
    return Scores(total, parts)


def _ask(host_reward: HostReward, batch: RewardInput) -> dict[str, Any]:
    """Host rewards of a whole batch, or why there are none. One process asks, whatever their number: all get its answer."""
    try:
        values, found = host_reward(batch)
    except RewardError as error:
        return {"error": str(error)}
    return {"values": np.asarray(values).tolist(), "parts": {name: float(np.mean(value)) for name, value in found.items()}}


def reward_input(setup: OnlineSetup, rollout: Rollout) -> RewardInput:
    """A rollout as text, with the other columns of its data rows."""
    tokens, chosen, finished, index = parallel.fetch((rollout.tokens, rollout.action_mask, rollout.finished, rollout.index))
    responses = tokens[:, -chosen.shape[1] :]
    texts = [setup.tokenizer.decode(row[keep]) for row, keep in zip(responses, chosen, strict=True)]
    return RewardInput(setup.data.texts(index), texts, finished, setup.data.columns(index))


def finish(setup: OnlineSetup, session: Session, pending: Pending, ended: float | None = None) -> None:
    """Read the results of a step and write its row; blocks until the device has computed them: at `ended`, or just now."""
    found: dict[str, Any] = dict(pending.metrics)
    found |= {name: float(np.mean(parallel.fetch(part))) for name, part in pending.parts.items()}
    if setup.gold is not None:
        found["reward/gold"] = float(np.mean(setup.gold(reward_input(setup, pending.rollout))))
    tokens = int(parallel.fetch(pending.answer_tokens))
    jax.block_until_ready(pending.metrics)
    seconds = (time.perf_counter() if ended is None else ended) - pending.began
    found |= {"time/step_s": seconds, "throughput/tokens_per_s": tokens / seconds}
    slots, answers = pending.rollout.tokens.size, pending.rollout.action_mask.size
    found.setdefault("data/padded_fraction", 1 - (pending.prompt_tokens + tokens) / slots)  # packed, the update knows it
    found["data/prompt_padded_fraction"] = 1 - pending.prompt_tokens / (slots - answers)
    session.write(pending.step, measured(found), lambda: pending.rollout)


def measured(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of a step on the host, without those that are NaN because nothing was there to train on (see `update._summary`)."""
    found: dict[str, Any] = parallel.fetch(dict(metrics))
    if found.get("update/minibatches") != 0:
        return found
    return {
        name: x for name, x in found.items() if not (name.startswith(("policy/", "value/", "kl/loss", "data/")) and np.isnan(x))
    }


def evaluate(setup: OnlineSetup, state: RunState, session: Session, step: int) -> RunState:
    """Answer the fixed prompts with the current actor (and its moving average); rows of samples.jsonl; the best score so far."""
    with session.recorder.phase("evaluate"), health.phase("rollout", setup.components):
        key = build.root_key(setup.settings, "evaluate")
        prompts = setup.place(setup.evaluation_prompts())
        found = _evaluate_one(setup, state, session, step, prompts, key, state.actor.params, "eval")
        if state.ema is not None:
            found |= _evaluate_one(setup, state, session, step, prompts, key, setup.average(state), "eval_ema")
        best = max(float(state.best), found["eval/score"])
        session.recorder.log(step, found | {"eval/best_score": best})
    return state.replace(best=setup.scalar(best))


def _evaluate_one(
    setup: OnlineSetup, state: RunState, session: Session, step: int, prompts: Prompts, key: jax.Array, params: Any, name: str
) -> dict[str, float]:
    do, frozen = setup.do, setup.frozen
    rollout = do.get("answer", do["rollout"])(do["sync"](params, frozen.actor), prompts, key)
    total = parallel.fetch(reward(setup, rollout).total)
    critic = None if state.critic is None else state.critic.params
    scored = do["score"](params, critic, frozen, rollout)
    chosen, lp, ref = parallel.fetch((rollout.action_mask, scored.logprobs, scored.ref_logprobs))
    kl = None if ref is None else np.where(chosen, lp - ref, 0.0).sum(1)
    text = reward_input(setup, rollout)
    gold = None if setup.gold is None else np.asarray(setup.gold(text))
    if name == "eval":
        count = min(setup.settings.log.eval_prompts, len(chosen))
        rows = [
            {
                "index": int(i),
                "prompt": text.prompts[n],
                "response": text.responses[n],
                "score": float(total[n]),
                "gold": None if gold is None else float(gold[n]),
                "kl_nats": None if kl is None else float(kl[n]),
                "length_tokens": int(chosen[n].sum()),
                "finished": bool(text.finished[n]),
            }
            for n, i in enumerate(parallel.fetch(rollout.index)[:count])
        ]
        session.recorder.samples(step, rows)
    found = {
        f"{name}/score": float(total.mean()),
        f"{name}/length_tokens": float(chosen.sum(1).mean()),
        f"{name}/eos_rate": float(np.mean(text.finished)),
    }
    found |= {} if kl is None else {f"{name}/kl_per_sequence_nats": float(kl.mean())}
    return found if gold is None else found | {f"{name}/gold": float(gold.mean())}
