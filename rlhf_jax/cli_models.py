"""The commands that use a trained model: chat, serve, evaluate. As in `cli.py` nothing heavy is imported before it is needed."""

import importlib
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf_jax.errors import UserError


class Dtype(StrEnum):
    """What a model computes in when it only answers."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class LongPrompts(StrEnum):
    """What becomes of prompts that leave no room for an answer: as data.long_prompts."""

    drop = "drop"
    truncate_left = "truncate_left"
    error = "error"


ModelDir = Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="Directory in Hugging Face layout.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
MaxLength = Annotated[
    int | None, typer.Option(metavar="TOKENS", help="Prompt and answer together; default: what config.json says.")
]


def _not_too_cold(temperature: float) -> float:
    from rlhf_jax import config

    if 0 < temperature < config.COLDEST:
        raise UserError(f"--temperature {temperature:g}: must be 0 (the likeliest token) or at least {config.COLDEST:g}")
    return temperature


Temperature = Annotated[float, typer.Option(min=0.0, callback=_not_too_cold, help="0: always the likeliest token.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample in the smallest set with this probability.")]
Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Root of every random key.")]
ChatOption = Annotated[bool, typer.Option("--chat", help="Prompts as a user's messages: for a model trained with data.chat.")]
Columns = Annotated[
    list[str] | None, typer.Option(metavar="OURS=THEIRS", help="Rename a column, as data.columns does; repeatable.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="First so many prompts only.")]
LongPromptsOption = Annotated[LongPrompts, typer.Option(help="Prompts that leave no room for an answer.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Of weights and activations.")]


def chat(
    model_dir: ModelDir,
    system: Annotated[str, typer.Option(help="System message.")] = "",
    max_new_tokens: NewTokens = 512,
    max_length: MaxLength = None,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Talk to a model; piped in, one answer a line."""
    start("chat").chat(
        model_dir,
        system=system,
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        dtype=dtype.value,
    )


def serve(
    model_dir: ModelDir,
    host: Annotated[str, typer.Option(help="Address; others than this machine's own are for networks you trust.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Name that requests call the model by; default: MODEL_DIR.")] = None,
    max_new_tokens: NewTokens = 512,
    max_length: MaxLength = None,
    dtype: DtypeOption = Dtype.float32,
    tensor: Annotated[int, typer.Option(min=1, help="Devices that share the model.")] = 1,
) -> None:
    """Serve a model as OpenAI's API, or a reward model's scores."""
    start("serving").serve(
        model_dir,
        host=host,
        port=port,
        name=name,
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        dtype=dtype.value,
        tensor=tensor,
    )


def evaluate(
    model_dir: ModelDir,
    prompts: Annotated[Path, typer.Option(help="Text file, one prompt a line, or data in any form of docs/data.md.")],
    reward: Annotated[
        list[str] | None,
        typer.Option(metavar="REWARD", help="Reward model's directory, shipped reward or path/to/file.py:function; repeatable."),
    ] = None,
    chat: ChatOption = False,
    columns: Columns = None,
    reference: Annotated[str | None, typer.Option(metavar="MODEL_DIR", help="KL of the model to this one.")] = None,
    against: Annotated[str | None, typer.Option(metavar="MODEL_DIR", help="Win rate over this one.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers to each prompt.")] = 1,
    pass_at: Annotated[str, typer.Option(metavar="K,...", help="At least one of K answers is right.")] = "",
    right_from: Annotated[float, typer.Option(help="First reward from which an answer is right.")] = 1.0,
    best_of: Annotated[str, typer.Option(metavar="N,...", help="Reward of the best of N answers.")] = "",
    max_new_tokens: NewTokens = 64,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers at one time.")] = 16,
    limit: Limit = None,
    long_prompts: LongPromptsOption = LongPrompts.drop,
    seed: Seed = 0,
    confidence: Annotated[float, typer.Option(help="Level of the intervals.")] = 0.95,
    dtype: DtypeOption = Dtype.float32,
    out: Annotated[Path | None, typer.Option(help="File for the answers with their rewards, JSON lines.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Reward, KL, win rate, pass@k, best of n, with intervals."""
    named = renames(columns)
    pass_counts, best_counts = numbers("--pass-at", pass_at), numbers("--best-of", best_of)
    room = start("evaluate")
    settings = room.Settings(
        rewards=tuple(dict.fromkeys(reward or ())),
        reference=reference,
        against=against,
        samples=samples,
        pass_at=pass_counts,
        right_from=right_from,
        best_of=best_counts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        batch_size=batch_size,
        limit=limit,
        long_prompts=long_prompts.value,
        seed=seed,
        confidence=confidence,
        dtype=dtype.value,
        chat=chat,
        columns=named,
    )
    found = room.evaluate(model_dir, prompts, settings, out=out, tell=tell)
    typer.echo((room.to_json if json else room.to_text)(found, model_dir, settings))


def tell(text: str) -> None:
    """A line on standard error."""
    typer.echo(f"rlhf-jax: {text}", err=True)


COMMANDS = (chat, serve, evaluate)


def numbers(option: str, text: str) -> tuple[int, ...]:
    """ "1,8" as (1, 8)."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UserError(f"{option} {text}: must be whole numbers with commas between them, such as 1,8") from None


def renames(columns: list[str] | None) -> dict[str, str]:
    """["prompt=problem"] as {"prompt": "problem"}."""
    for text in columns or ():
        if not all(text.partition("=")):
            raise UserError(f"--columns {text}: must be OURS=THEIRS, such as prompt=problem; repeat the option for others")
    return {ours: theirs for ours, _, theirs in (text.partition("=") for text in columns or ())}


def start(module: str) -> Any:
    """Imports the room that does the work, with JAX, after the environment is set."""
    from rlhf_jax import environment

    environment.prepare()
    environment.collect_seldom()
    kept = environment.keep_freed_memory()
    room = importlib.import_module(f"rlhf_jax.{module}")
    if kept and "jax" in sys.modules:
        environment.give_back_after_compiling()
    return room
