"""Every key of a run file, as frozen dataclasses. Imports no JAX, so that a typo costs milliseconds.

A run file is YAML: one complete run, read by `config_file.load`. `rlhf-jax config STAGE` prints these keys from this page.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal


def key(default: Any, effect: str, unit: str = "") -> Any:
    """A field with its default, its effect in one sentence and its unit."""
    return dataclasses.field(default=default, metadata={"effect": effect, "unit": unit})


def required(effect: str) -> Any:
    """A field without a default."""
    return dataclasses.field(metadata={"effect": effect, "unit": ""})


def group(cls: type, effect: str) -> Any:
    """A nested group of keys with its own defaults."""
    return dataclasses.field(default_factory=cls, metadata={"effect": effect, "unit": ""})


@dataclass(frozen=True, kw_only=True)
class Lora:
    rank: int = key(16, "rank of the adapter")
    alpha: float = key(32.0, "the adapter is scaled by alpha / rank")
    targets: tuple[str, ...] = key(("q", "k", "v", "o", "gate", "up", "down"), "matrices that get an adapter")
    path: str | None = key(None, "adapter in PEFT layout to begin with, of this rank and these targets; default: a new one")


@dataclass(frozen=True, kw_only=True)
class Scratch:
    """A Llama-type model with random weights."""

    width: int = key(256, "width of the residual stream")
    layers: int = key(4, "number of blocks")
    heads: int = key(4, "query heads")
    kv_heads: int = key(4, "key and value heads; divides heads")
    mlp_width: int = key(704, "width of the gated MLP")
    max_length: int = key(1024, "longest sequence the model is described for", "tokens")
    rope_theta: float = key(10000.0, "base of the rotary frequencies")
    tied: bool = key(True, "the output matrix is the embedding")
    vocabulary: int = key(4096, "size of the byte-level BPE vocabulary trained on the run's own data", "tokens")


@dataclass(frozen=True, kw_only=True)
class Model:
    path: str | None = key(None, "directory in Hugging Face layout (or hub name where there is a network)")
    scratch: Scratch | None = key(None, "make a model with random weights instead of loading one")
    tokenizer: str | None = key(None, "directory of the tokenizer; default: the model's own")
    chat_template: str | None = key(None, "file with a jinja chat template; default: the tokenizer's own")
    param_dtype: Literal["float32", "bfloat16"] = key("float32", "dtype of the master weights")
    compute_dtype: Literal["float32", "bfloat16"] = key("float32", "dtype of matrix products and activations")
    remat: Literal["none", "elementwise", "dots", "save_attention", "full"] = key(
        "elementwise", "what the backward pass recomputes"
    )
    attention: Literal["dense", "flash"] = key("dense", "attention kernel; flash falls back to dense on CPU, and says so")
    logprob_chunk: int | None = key(
        None, "positions whose logits exist at one time; default: 128, on a CPU 16, whose logits its cache holds", "tokens"
    )
    offload: tuple[Literal["reference", "reward", "optimizer"], ...] = key(
        (), "models and optimiser states that wait in the host's memory while no program needs them"
    )
    lora: Lora | None = key(None, "train low-rank adapters instead of the whole model")


@dataclass(frozen=True, kw_only=True)
class Mesh:
    data: int = key(1, "copies of the model, batch split")
    fsdp: int = key(-1, "ways in which parameters and batch are split; -1: all devices that remain")
    tensor: int = key(1, "ways in which heads, MLP and vocabulary are split")


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    learning_rate: float = key(1e-5, "peak learning rate of AdamW")
    schedule: Literal["constant", "linear", "cosine"] = key("linear", "decay from the peak to final_fraction of it")
    warmup_steps: int = key(0, "linear warm-up", "optimiser steps")
    final_fraction: float = key(0.0, "learning rate at the end, as a fraction of the peak")
    beta1: float = key(0.9, "decay of the first moment")
    beta2: float = key(0.95, "decay of the second moment")
    eps: float = key(1e-5, "added to the root of the second moment")
    weight_decay: float = key(0.0, "decoupled weight decay of matrices")
    clip_norm: float = key(1.0, "global gradient norm above which the gradient is scaled down")


COLDEST = 1e-4  # least temperature above 0: float32 logits divided by less are rounded by whole nats, and overflow


@dataclass(frozen=True, kw_only=True)
class Sampling:
    max_new_tokens: int = key(64, "length R of the response", "tokens")
    min_new_tokens: int = key(0, "end-of-sequence is impossible before this many tokens", "tokens")
    temperature: float = key(1.0, "divides the logits of policy, old policy and reference; 0 is greedy (evaluation only)")
    top_k: int = key(0, "sample among the k likeliest tokens; 0: all")
    top_p: float = key(1.0, "sample in the smallest set with this probability; 1: all")
    min_p: float = key(0.0, "drop tokens below this fraction of the likeliest one's probability")
    repetition_penalty: float = key(1.0, "divides (or multiplies) logits of tokens already in the sequence; evaluation only")
    stop: tuple[str, ...] = key((), "more strings, each one token, that end a response")
    rows: int | None = key(
        None,
        "answers decoded at a time: a row that has finished takes the next prompt of the batch, so that long answers do not hold "
        "up short ones (the samples stay the same); default: the whole batch at once",
        "answers",
    )


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set among several."""

    path: str = required("jsonl, json or parquet file, compressed or not (or hub name with the data extra)")
    weight: float = key(1.0, "share of this source in the mixture")


@dataclass(frozen=True, kw_only=True)
class Data:
    path: str | None = key(None, "jsonl, json or parquet file, compressed or not (or hub name with the data extra)")
    sources: tuple[Source, ...] = key((), "several files with weights, instead of path")
    task: Literal["reviews", "addition"] | None = key(None, "an embedded task, instead of a file")
    task_options: dict[str, Any] = dataclasses.field(
        default_factory=dict, metadata={"effect": "what the task makes, such as {digits: 2} of addition", "unit": ""}
    )
    columns: dict[str, str] = dataclasses.field(
        default_factory=dict, metadata={"effect": "renames, ours: theirs, such as {chosen: preferred}", "unit": ""}
    )
    chat: bool = key(False, "questions and answers given as strings become messages, which the chat template writes")
    max_prompt_tokens: int = key(256, "length P of prompts that are answered; fine-tuning has max_tokens alone", "tokens")
    max_tokens: int = key(512, "length of a whole training sequence, and of a packed row", "tokens")
    long_prompts: Literal["error", "drop", "truncate_left"] = key("drop", "what happens to a prompt longer than allowed")
    on_bad_rows: Literal["error", "skip"] = key("error", "what happens to a row that cannot be read")
    eval_fraction: float = key(0.1, "share of the rows kept for evaluation")
    limit: int | None = key(None, "read at most this many rows", "rows")
    packing: bool = key(
        False, "several sequences share a row: conversations, or prompts with answers while they are scored and trained on"
    )
    length_buckets: int = key(1, "widths of prompts; a batch has one of them, each compiles a rollout, score and update")


@dataclass(frozen=True, kw_only=True)
class RewardFunction:
    """One host reward: a name among the shipped ones, or path/to/file.py:function."""

    function: str = required("name of a shipped reward, or path/to/file.py:function")
    weight: float = key(1.0, "factor of this reward in the sum")
    options: dict[str, Any] = dataclasses.field(
        default_factory=dict, metadata={"effect": "keyword arguments of the function", "unit": ""}
    )


@dataclass(frozen=True, kw_only=True)
class Reward:
    model: str | None = key(None, "directory of a trained reward model")
    model_weight: float = key(1.0, "factor of the reward model's score in the sum")
    functions: tuple[RewardFunction, ...] = key((), "host rewards, summed with their weights")
    url: str | None = key(None, "HTTP server that scores prompts and responses")
    url_weight: float = key(1.0, "factor of the server's score in the sum")
    timeout_s: float = key(60.0, "longest wait for a host reward or a server", "s")


@dataclass(frozen=True, kw_only=True)
class AdaptiveKL:
    target: float = key(6.0, "KL per sequence (sum over its tokens) to hold", "nats")
    horizon: float = key(10000.0, "sequences over which the coefficient adapts", "sequences")


@dataclass(frozen=True, kw_only=True)
class PPO:
    epochs: int = key(4, "passes over each batch of experience")
    minibatches: int = key(1, "optimiser steps per pass")
    micro_batches: int = key(1, "parts whose gradients are accumulated into one optimiser step")
    gamma: float = key(1.0, "discount per token")
    lam: float = key(0.95, "lambda of generalised advantage estimation")
    clip_low: float = key(0.2, "ratios below 1 - clip_low gain nothing")
    clip_high: float = key(0.2, "ratios above 1 + clip_high gain nothing")
    dual_clip: float | None = key(None, "bounds the loss of negative advantages at this multiple of them; off by default")
    value_clip: float = key(0.2, "the new value may leave the old one by this much", "reward units")
    kl_coef: float = key(0.05, "weight of the KL penalty (initial weight with adaptive_kl)", "reward units per nat")
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = key("k1", "estimator of the KL to the reference, per token")
    kl_in: Literal["reward", "loss"] = key("reward", "where the KL penalty enters")
    adaptive_kl: AdaptiveKL | None = key(None, "adapt the coefficient to hold the KL per sequence at a target")
    reward_clip: float | None = key(None, "scores are clipped to this size", "reward units")
    missing_eos: Literal["none", "subtract", "replace"] = key("none", "what a truncated answer's score becomes")
    missing_eos_penalty: float = key(1.0, "subtracted from, or (negated) put in place of, a truncated answer's score")
    bootstrap_truncated: bool = key(False, "value the state after a truncated answer instead of 0")
    whiten_advantages: Literal["none", "unbiased", "population"] = key("unbiased", "normalise the advantages, variance by name")
    whiten_scope: Literal["batch", "minibatch"] = key("batch", "tokens over which the advantages are normalised")
    whiten_rewards: Literal["none", "unbiased", "population"] = key("none", "divide the rewards by their deviation (mean kept)")
    entropy_coef: float = key(0.0, "weight of the entropy bonus", "1/nat")
    aggregation: Literal["token_mean", "sequence_mean_token_sum", "sequence_mean_token_mean", "sequence_mean_token_sum_norm"] = (
        key("token_mean", "how token losses become one number; denominators are global")
    )
    kl_stop: float | None = key(
        None, "skip the rest of the epochs once the approximate KL to the old policy passes this", "nats per token"
    )
    critic_warmup: int = key(0, "iterations that train the critic only")
    ptx_coef: float = key(0.0, "weight of the language-modelling loss on fine-tuning data (pretraining mix)")
    ema_decay: float | None = key(
        None, "keep an exponential moving average of the actor in float32, evaluated and exported beside it"
    )
    old_logprobs: Literal["rollout", "recompute"] = key("recompute", "old log-probabilities: from the sampler, or scored again")
    compat: Literal["none", "deepspeed_chat"] = key("none", "train with the classical five functions, quirks included")


@dataclass(frozen=True, kw_only=True)
class RewardModelLoss:
    loss: Literal["bradley_terry", "deepspeed_chat"] = key(
        "bradley_terry", "score at the last token, or per-token from the divergence on"
    )
    centering_coef: float = key(0.0, "weight of the squared sum of both scores")
    label_smoothing: float = key(0.0, "probability that a label is wrong")
    calibrate: bool = key(True, "shift and scale scores so that the answers of training pairs have mean 0 and deviation 1")


# Algorithms beyond PPO. A run's stage is the name of its group: stage "grpo" reads the group `grpo`.


@dataclass(frozen=True, kw_only=True)
class CriticFree:
    """Keys of every online algorithm without a critic; where PPO has a key of the same name it means the same."""

    epochs: int = key(1, "passes over each batch of experience")
    minibatches: int = key(1, "optimiser steps per pass")
    micro_batches: int = key(1, "parts whose gradients are accumulated into one optimiser step")
    clip_low: float = key(0.2, "ratios below 1 - clip_low gain nothing")
    clip_high: float = key(0.2, "ratios above 1 + clip_high gain nothing; 0.28 is DAPO's")
    dual_clip: float | None = key(None, "bounds the loss of negative advantages at this multiple of them; off by default")
    kl_coef: float = key(0.05, "weight of the KL penalty; 0: no reference model is held", "reward units per nat")
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = key("k1", "estimator of the KL to the reference")
    adaptive_kl: AdaptiveKL | None = key(None, "adapt the coefficient to hold the KL per sequence at a target")
    reward_clip: float | None = key(None, "scores are clipped to this size", "reward units")
    missing_eos: Literal["none", "subtract", "replace"] = key("none", "what a truncated answer's score becomes")
    missing_eos_penalty: float = key(1.0, "subtracted from, or (negated) put in place of, a truncated answer's score")
    overlong_buffer: int = key(0, "answers lose score linearly over the last so many tokens before the limit (DAPO)", "tokens")
    overlong_penalty: float = key(1.0, "score that an answer at the limit loses, with overlong_buffer", "reward units")
    entropy_coef: float = key(0.0, "weight of the entropy bonus", "1/nat")
    aggregation: Literal["token_mean", "sequence_mean_token_sum", "sequence_mean_token_mean", "sequence_mean_token_sum_norm"] = (
        key("token_mean", "how token losses become one number; denominators are global")
    )
    kl_stop: float | None = key(
        None, "skip the rest of the epochs once the approximate KL to the old policy passes this", "nats per token"
    )
    ptx_coef: float = key(0.0, "weight of the language-modelling loss on fine-tuning data (pretraining mix)")
    ema_decay: float | None = key(
        None, "keep an exponential moving average of the actor in float32, evaluated and exported beside it"
    )
    old_logprobs: Literal["rollout", "recompute"] = key("recompute", "old log-probabilities: from the sampler, or scored again")


@dataclass(frozen=True, kw_only=True)
class GRPO(CriticFree):
    """Published GRPO by default; Dr.GRPO and DAPO are values of these keys (docs/algorithms.md)."""

    group_size: int = key(8, "answers per prompt; divides batch_size", "answers")
    advantage_scale: Literal["std", "batch_std", "none"] = key(
        "std", "deviation that divides score - group mean; none is Dr.GRPO's"
    )
    kl_coef: float = key(
        0.04, "weight of the KL in the loss; 0 (Dr.GRPO, DAPO): no reference model is held", "reward units per nat"
    )
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = key("k3", "estimator of the KL in the loss")
    aggregation: Literal["token_mean", "sequence_mean_token_sum", "sequence_mean_token_mean", "sequence_mean_token_sum_norm"] = (
        key(
            "sequence_mean_token_mean",
            "how token losses become one number; DAPO: token_mean, Dr.GRPO: sequence_mean_token_sum_norm",
        )
    )
    drop_uninformative: bool = key(False, "leave groups whose scores are all equal out of the loss and its denominator (DAPO)")


@dataclass(frozen=True, kw_only=True)
class GSPO(GRPO):
    clip_low: float = key(3e-4, "sequence ratios (geometric mean over tokens) below 1 - clip_low gain nothing")
    clip_high: float = key(4e-4, "sequence ratios above 1 + clip_high gain nothing")
    kl_coef: float = key(0.0, "weight of the KL in the loss; 0: no reference model is held", "reward units per nat")


@dataclass(frozen=True, kw_only=True)
class RLOO(CriticFree):
    group_size: int = key(4, "answers per prompt; divides batch_size", "answers")
    advantage_scale: Literal["batch_std", "none"] = key("none", "deviation that divides the advantages")
    aggregation: Literal["token_mean", "sequence_mean_token_sum", "sequence_mean_token_mean", "sequence_mean_token_sum_norm"] = (
        key("sequence_mean_token_sum", "how token losses become one number; the default is REINFORCE on whole answers")
    )


@dataclass(frozen=True, kw_only=True)
class ReinforcePP(CriticFree):
    """REINFORCE++."""

    group_size: int = key(1, "answers per prompt; divides batch_size; above 1 with baseline: group", "answers")
    baseline: Literal["batch", "group"] = key(
        "batch", "mean that is subtracted: of the batch (by whiten_advantages), or of each prompt's answers first"
    )
    gamma: float = key(1.0, "discount per token")
    whiten_advantages: Literal["none", "unbiased", "population"] = key(
        "unbiased", "normalise over the batch's tokens, variance by name"
    )


@dataclass(frozen=True, kw_only=True)
class ReMax(CriticFree):
    """The baseline is the score of the greedy answer: one more generation per prompt."""

    aggregation: Literal["token_mean", "sequence_mean_token_sum", "sequence_mean_token_mean", "sequence_mean_token_sum_norm"] = (
        key("sequence_mean_token_sum", "how token losses become one number; the default is REINFORCE on whole answers")
    )


@dataclass(frozen=True, kw_only=True)
class DPO:
    loss: Literal["dpo", "conservative", "robust", "ipo", "ipo_sum"] = key("dpo", "loss of a pair (docs/algorithms.md)")
    beta: float = key(0.1, "strength of the reference", "reward units per nat")
    label_smoothing: float = key(0.0, "probability that a label is wrong; read by conservative and robust")


@dataclass(frozen=True, kw_only=True)
class KTO:
    beta: float = key(0.1, "strength of the reference", "reward units per nat")
    desirable_weight: float = key(1.0, "weight of good answers")
    undesirable_weight: float = key(1.0, "weight of bad answers")


@dataclass(frozen=True, kw_only=True)
class Save:
    every: int = key(50, "steps between checkpoints; 0: only at the end", "steps")
    keep_last: int = key(2, "newest checkpoints kept")
    keep_every: int | None = key(None, "checkpoints at multiples of this step are kept for good", "steps")


@dataclass(frozen=True, kw_only=True)
class Log:
    every: int = key(1, "steps between rows of metrics.jsonl", "steps")
    eval_every: int = key(10, "steps between evaluations; 0: only at start and end", "steps")
    eval_rows: int | None = key(1024, "held-out rows that an offline stage measures at every evaluation; null: all", "rows")
    eval_prompts: int = key(32, "answers written down at every evaluation, of the batch_size that are measured; greater: all")
    profile_step: int | None = key(None, "step of which a trace is written to OUT/profile (docs/profiling.md)", "step")
    backends: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = key((), "more places for metrics (extras)")


@dataclass(frozen=True, kw_only=True)
class Health:
    """When a run is told to be ill. Alarms only speak; steps that are not finite, and hangs, end the run."""

    max_bad_steps: int = key(3, "the run ends after this many updates in a row whose loss or gradient was not finite", "steps")
    patience: int = key(3, "an alarm speaks after its condition held this long", "steps")
    kl_nats: float = key(100.0, "alarm: KL to the reference per sequence above this", "nats")
    ratio: float = key(10.0, "alarm: probability ratio of new to old policy above this, or its mean below the inverse")
    entropy_nats: float = key(0.02, "alarm: entropy per token below this", "nats")
    score_std: float = key(1e-6, "alarm: spread of the scores of a batch at or below this", "reward units")
    stall_factor: float = key(10.0, "the stacks are printed when a step takes this many times the median")
    stall_s: float = key(120.0, "no step shorter than this counts as stalled", "s")
    exit_s: float = key(3600.0, "the process ends with status 75 when a step takes this long; 0: never", "s")


@dataclass(frozen=True, kw_only=True)
class Run:
    """Keys that every stage has."""

    out: str = key("runs/run", "directory of the run; the same command again continues it")
    seed: int = key(0, "root of every random key and of the data order")
    steps: int = key(100, "iterations of the loop", "steps")
    batch_size: int = key(64, "sequences (pairs, prompts) per step, over all devices")
    model: Model = group(Model, "the model that is trained")
    mesh: Mesh = group(Mesh, "devices")
    data: Data = group(Data, "training data")
    save: Save = group(Save, "checkpoints")
    log: Log = group(Log, "metrics and samples")
    health: Health = group(Health, "alarms, limits and the watchdog")


@dataclass(frozen=True, kw_only=True)
class SFTRun(Run):
    optimizer: Optimizer = group(Optimizer, "optimiser")
    micro_batches: int = key(1, "parts whose gradients are accumulated into one optimiser step")


@dataclass(frozen=True, kw_only=True)
class RewardRun(Run):
    optimizer: Optimizer = group(Optimizer, "optimiser")
    micro_batches: int = key(1, "parts whose gradients are accumulated into one optimiser step")
    reward_model: RewardModelLoss = group(RewardModelLoss, "loss of the reward model")


@dataclass(frozen=True, kw_only=True)
class OnlineRun(Run):
    """Keys of every stage that samples answers; `batch_size` counts answers, so prompts are batch_size / group_size."""

    reference: str | None = key(
        None, "directory of the reference model; default: model.path, with the adapter of model.lora.path"
    )
    reward: Reward = group(Reward, "where scores come from")
    sampling: Sampling = group(Sampling, "how the actor answers")
    actor_optimizer: Optimizer = group(Optimizer, "optimiser of the actor")
    score_parts: int = key(1, "parts in which a batch is scored one after the other, to save memory")
    ptx_data: Data | None = key(None, "fine-tuning data of the pretraining-mix loss; needed when ptx_coef > 0")


@dataclass(frozen=True, kw_only=True)
class PPORun(OnlineRun):
    ppo: PPO = group(PPO, "the algorithm")
    critic: str | None = key(None, "directory the critic starts from; default: the reward model, else the actor with a zero head")
    critic_optimizer: Optimizer = group(Optimizer, "optimiser of the critic")


@dataclass(frozen=True, kw_only=True)
class GRPORun(OnlineRun):
    grpo: GRPO = group(GRPO, "the algorithm")


@dataclass(frozen=True, kw_only=True)
class GSPORun(OnlineRun):
    gspo: GSPO = group(GSPO, "the algorithm")


@dataclass(frozen=True, kw_only=True)
class RLOORun(OnlineRun):
    rloo: RLOO = group(RLOO, "the algorithm")


@dataclass(frozen=True, kw_only=True)
class ReinforcePPRun(OnlineRun):
    reinforce_pp: ReinforcePP = group(ReinforcePP, "the algorithm")


@dataclass(frozen=True, kw_only=True)
class ReMaxRun(OnlineRun):
    remax: ReMax = group(ReMax, "the algorithm")


@dataclass(frozen=True, kw_only=True)
class DPORun(Run):
    reference: str | None = key(
        None, "directory of the reference model; default: model.path, with the adapter of model.lora.path"
    )
    optimizer: Optimizer = group(Optimizer, "optimiser")
    micro_batches: int = key(1, "parts whose gradients are accumulated into one optimiser step")
    dpo: DPO = group(DPO, "the algorithm")


@dataclass(frozen=True, kw_only=True)
class KTORun(Run):
    reference: str | None = key(
        None, "directory of the reference model; default: model.path, with the adapter of model.lora.path"
    )
    optimizer: Optimizer = group(Optimizer, "optimiser")
    micro_batches: int = key(1, "parts whose gradients are accumulated into one optimiser step")
    kto: KTO = group(KTO, "the algorithm")


STAGES: dict[str, type[Run]] = {
    "sft": SFTRun,
    "reward": RewardRun,
    "ppo": PPORun,
    "grpo": GRPORun,
    "gspo": GSPORun,
    "rloo": RLOORun,
    "reinforce_pp": ReinforcePPRun,
    "remax": ReMaxRun,
    "dpo": DPORun,
    "kto": KTORun,
}
OFFLINE = ("sft", "reward", "dpo", "kto")  # stages that learn from a fixed data set
