"""The commands. Each parses, reads its configuration, and only then imports what runs it, so that mistakes cost milliseconds."""

import codecs
import errno
import io
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf_jax import __version__, cli_models
from rlhf_jax.cli_models import start as _start
from rlhf_jax.errors import EXIT_STOPPED, EXIT_USER_ERROR, Stopped, Unheard, UserError

EXAMPLES = """\b
Start here:
  rlhf-jax quickstart                             three stages, then a report
  rlhf-jax sft configs/sft_addition.yaml steps=9  a run of your own
  rlhf-jax config ppo kl                          the keys that concern KL
"""

app = typer.Typer(
    name="rlhf-jax",
    epilog=EXAMPLES,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # rich help costs 0.2 s at every start
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


@app.callback(invoke_without_command=True)
def top(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Reinforcement learning from human feedback in JAX."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


class Task(StrEnum):
    """Embedded tasks of the quickstart."""

    reviews = "reviews"
    addition = "addition"


class Demo(StrEnum):
    """Demonstrations of the quickstart."""

    overoptimization = "overoptimization"


# stage -> what it trains. A test compares the stages with `config.STAGES`, which would cost 50 ms at every start.
TRAINING = {
    "sft": "Supervised fine-tuning of a language model.",
    "reward": "A reward model from chosen and rejected answers.",
    "ppo": "PPO against a reward model, a function or a server.",
    "grpo": "GRPO, Dr.GRPO, DAPO: groups of answers, no critic.",
    "gspo": "GSPO: as GRPO, with ratios of whole answers.",
    "rloo": "RLOO: the other answers are the baseline.",
    "reinforce_pp": "REINFORCE++: the batch is the baseline.",
    "remax": "ReMax: the greedy answer is the baseline.",
    "dpo": "DPO, IPO: pairs of answers, no reward model.",
    "kto": "KTO: answers marked good or bad.",
}

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="Run file (YAML).")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to it, such as ppo.kl_coef=0.1.")]
StageOption = Annotated[
    str | None, typer.Option(metavar="STAGE", help="What the run file describes; default: told from its keys.")
]


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Directory of the run.")] = Path("runs/quickstart"),
    task: Annotated[
        Task, typer.Option(help="reviews: a reward model learnt from pairs; addition: answers are checked.")
    ] = Task.reviews,
    demo: Annotated[
        Demo | None, typer.Option(help="overoptimization: PPO without a KL penalty, hacked, beside PPO with one.")
    ] = None,
    seed: cli_models.Seed = 0,
) -> None:
    """All three stages on an embedded task, with a report.

    Fine-tuning, a reward model and PPO; nothing is downloaded.
    """
    if demo is not None and task is not Task.reviews:
        raise UserError(f"--demo {demo}: only the task reviews has it; leave --task out")
    _go_on_unheard()
    module = _start("quickstart")
    typer.echo(module.run(out=out, demo=demo and demo.value, task=task.value, seed=seed))


def _training_command(stage: str, summary: str) -> None:
    @app.command(name=stage, help=summary)
    def train(
        config: Config,
        overrides: Overrides = None,
        from_scratch: Annotated[bool, typer.Option("--from-scratch", help="Set an earlier run in the same place aside.")] = False,
        resume_override: Annotated[
            str, typer.Option(metavar="KEY,...", help="Keys that may differ from the earlier start.")
        ] = "",
        profile: Annotated[
            int | None, typer.Option(metavar="STEP", help="Write a trace of this step to OUT/profile (log.profile_step).")
        ] = None,
    ) -> None:
        traced = [] if profile is None else [f"log.profile_step={profile}"]
        _go_on_unheard()
        run = _load(config, [*(overrides or ()), *traced], stage)
        from rlhf_jax import environment
        from rlhf_jax.config import OFFLINE

        _start("processes").start(on_tpu=environment.has_tpu() and os.environ.get("JAX_PLATFORMS") != "cpu")
        room = _start("offline" if stage in OFFLINE else "online")
        room.run(stage, run, from_scratch=from_scratch, override=[key for key in resume_override.split(",") if key])


for _stage, _summary in TRAINING.items():
    _training_command(_stage, _summary)


@app.command()
def data(config: Config, overrides: Overrides = None, stage: StageOption = None) -> None:
    """Check the data of a run.

    Rows, columns, token lengths, what is dropped and why, rendered examples.
    """
    stage = stage or _stage_of(config)
    run = _load(config, overrides, stage)
    from rlhf_jax import environment

    environment.prepare()  # and memory is not kept: no program runs that would take it
    from rlhf_jax.data import validate

    typer.echo(validate.validate(run).text)


@app.command()
def fit(
    config: Config,
    overrides: Overrides = None,
    topology: Annotated[str, typer.Option(help="Machine to compile for: v5e-64, v5p-16, 2xv5e-16, cpu-8, ...")] = "v5e-8",
    stage: StageOption = None,
    only: Annotated[list[str] | None, typer.Option(help="Compile this program only; can be repeated.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compile a run for a machine that is not there.

    Memory, collectives and estimated time of every program. Exit status 1 if it does not fit.
    """
    stage = stage or _stage_of(config)
    run = _load(config, overrides, stage)
    from rlhf_jax import topologies

    machine = topologies.parse(topology)
    topologies.prepare_environment(machine)
    module = _start("fit")
    verdict = module.fit(stage, run, machine, only=tuple(only or ()))
    table = _start("fit_table")
    typer.echo(table.to_json(verdict) if json else table.to_text(verdict))
    if not verdict.fits:
        raise typer.Exit(1)


@app.command()
def generate(
    model_dir: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="Directory in Hugging Face layout.")],
    prompts: Annotated[Path, typer.Option(help="Text file, one prompt a line, or data in any form of docs/data.md.")],
    max_new_tokens: cli_models.NewTokens = 64,
    temperature: cli_models.Temperature = 1.0,
    top_p: cli_models.TopP = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at one time.")] = 16,
    seed: cli_models.Seed = 0,
    chat: cli_models.ChatOption = False,
    columns: cli_models.Columns = None,
    limit: cli_models.Limit = None,
    long_prompts: cli_models.LongPromptsOption = cli_models.LongPrompts.drop,
) -> None:
    """Answer the prompts of a file; one JSON object a line."""
    named = cli_models.renames(columns)
    module = _start("generate")
    for line in module.generate(
        model_dir,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        batch_size=batch_size,
        seed=seed,
        chat=chat,
        columns=named,
        limit=limit,
        long_prompts=long_prompts.value,
        tell=cli_models.tell,
    ):
        typer.echo(line)


for _command in cli_models.COMMANDS:
    app.command()(_command)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="Directory of a run, or of one checkpoint.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to make, in Hugging Face layout.")],
    part: Annotated[str, typer.Option(help="model, or critic or ema of an online run.")] = "model",
) -> None:
    """Write a run's model in Hugging Face layout."""
    typer.echo(f"{_start('export').export(source, out, part=part)}")


@app.command()
def models() -> None:
    """Model families that can be loaded, what each covers, and the sizes of the models known by name."""
    typer.echo(_start("models.hf").describe_families())


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Directories of runs.")],
    out: Annotated[Path | None, typer.Option(help="File to write; default: report.html in the run, or here for several.")] = None,
) -> None:
    """Write report.html of a run again, or compare several."""
    default = runs[0] / "report.html" if len(runs) == 1 else Path("report.html")
    writer = _start("report")
    writer.check_run_dirs(runs)
    typer.echo(f"{writer.write_report(runs, out or default)}")


@app.command()
def runs(directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a run, or of several.")]) -> None:
    """List, verify and describe checkpoints; exit status 1 if one is damaged."""
    text, good = _start("runs").describe(directory)
    typer.echo(text)
    if not good:
        raise typer.Exit(1)


@app.command()
def config(
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="sft, reward, ppo, ...")] = "",
    pattern: Annotated[str, typer.Argument(metavar="WORD", help="Only keys that contain this word.")] = "",
    yaml: Annotated[bool, typer.Option("--yaml", help="As a run file with every key at its default.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="All stages as the page docs/configuration.md.")] = False,
) -> None:
    """Keys of a run file: type, unit, default, effect."""
    from rlhf_jax import config_table

    if markdown:
        typer.echo(config_table.markdown(), nl=False)
        return
    cls = _run_class(stage)
    if yaml:
        typer.echo(config_table.dump(cls()), nl=False)
        return
    rows = [row for row in config_table.describe(cls) if pattern in row.name or pattern in row.effect]
    if not rows:
        raise UserError(f"no key of {stage} has to do with {pattern!r}")
    for row in rows:
        typer.echo(config_table.line(row))


@app.command()
def doctor() -> None:
    """Versions, devices, memory, disk, cache, extras."""
    typer.echo(_start("doctor").examine())


def _go_on_unheard() -> None:
    """A run outlives the readers of what it prints."""
    sys.stdout, sys.stderr = Unheard(sys.stdout), Unheard(sys.stderr)  # type: ignore[assignment]


def _run_class(stage: str) -> Any:
    from rlhf_jax.config import STAGES

    if not stage:
        raise UserError(f"name a stage, such as `rlhf-jax config ppo`: {', '.join(STAGES)}")
    if stage not in STAGES:
        raise UserError(f"the stage {stage!r} is not one of {', '.join(STAGES)}")
    return STAGES[stage]


def _load(path: Path, overrides: list[str] | None, stage: str) -> Any:
    from rlhf_jax import config_file

    return config_file.load(path, overrides or (), _run_class(stage))


def _stage_of(path: Path) -> str:
    from rlhf_jax import config_file

    stage, *others = config_file.stages_of(path)
    if others:
        cli_models.tell(f"{path}: taken for a run of {stage}; {', '.join(others)} have all its keys, too: say which with --stage")
    return stage


def _escaped(error: Any) -> tuple[str, int]:
    """Characters that a stream's encoding lacks, escaped as JSON escapes them: what is JSON stays JSON."""
    import json

    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def main() -> None:
    """Entry point. What a user can mend is one message and status 2; everything else keeps its traceback."""
    try:
        _main()
    except SystemExit as end:
        if calls := sys.modules.get("rlhf_jax.rewards.call"):
            calls.leave(int(end.code or 0))
        raise


def _main() -> None:
    codecs.register_error("rlhf_jax", _escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="rlhf_jax")
    try:
        app(prog_name="rlhf-jax")
    except UserError as error:
        sys.stderr.write(f"rlhf-jax: {error}\n")
        sys.exit(EXIT_USER_ERROR)
    except Stopped as stopped:
        sys.stderr.write(f"{stopped}\n")
        sys.exit(EXIT_STOPPED)
    except BrokenPipeError:  # `rlhf-jax config ppo | head`
        if isinstance(sys.stdout, Unheard):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = error.filename or "standard output, or a file"
        sys.stderr.write(f"rlhf-jax: {where}: cannot be written ({error.strerror}); free disk space, or name another place\n")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try it again when it ends
        sys.exit(EXIT_USER_ERROR)
