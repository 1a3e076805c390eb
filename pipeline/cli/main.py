"""The command `duet`: arguments in, exit codes out. 0 done, 2 an error the user can fix, 75 interrupted and resumable."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import click

from duet.cache.errors import EXIT_BUG, EXIT_DONE, EXIT_INTERRUPTED, EXIT_USER, Interrupted, UserError
from duet.pipeline.cli.arguments import Group, experiment, files, students
from duet.pipeline.cli.faults import hint_for, of_the_place, rank, tell
from duet.pipeline.cli.machine import MACHINE_COMMANDS
from duet.pipeline.cli.runs import RUN_COMMANDS
from duet.pipeline.cli.stores import cache_group

log = logging.getLogger("duet")


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="duet-unlearn")
def duet() -> None:
    """Make a language model forget a topic: teacher logits to a store, store to students, and proof."""


@duet.command()
@click.argument("file", metavar="[FILE]", required=False)
@click.option("--topic", help="The topic to forget, as a person would name it.")
@click.option("--model", metavar="PATH", help="The base model: a directory, a .gguf file, or OWNER/NAME on the hub.")
@click.option(
    "--forget", metavar="DATA", shell_complete=files, help="Questions about the topic (.jsonl, .csv, .parquet)."
)
@click.option("--retain", metavar="DATA", shell_complete=files, help="Questions about anything else.")
@click.option(
    "--neighbours", metavar="DATA", shell_complete=files, help="Questions nearest to the topic that must stay."
)
@click.option("--harden", metavar="PRESET", help="How hard to bring back: none, wide or deep; default: none.")
@click.option("--name", help="Name of the run; default: after the topic.")
@click.option("--question-field", metavar="FIELD", help="Field with the question; default: question.")
@click.option("--answer-field", metavar="FIELD", help="Field with the answer; default: answer.")
@click.option("--yes", is_flag=True, help="Ask nothing: use the options given, and defaults for the rest.")
def init(file: str | None, yes: bool, **given: str | None) -> None:
    """Ask for topic, model and data, check them, and write a config; FILE defaults to NAME.yaml."""
    from duet.pipeline.commands.init import init

    init(file, {key.replace("_", "-"): value for key, value in given.items()}, yes)


@duet.command("teacher-logits")
@experiment
@click.option("--dry-run", is_flag=True, help="Print what it would cost, and start nothing.")
@click.option(
    "--limit", type=click.IntRange(min=1), help="A trial: only the first N queries of each subset.", metavar="N"
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Number of processes on this machine that share the work; sets teacher.data_parallel.",
)
@click.option(
    "--worker", is_flag=True, help="Run as one of several workers; exit once every remaining shard is claimed."
)
@click.option("--child", is_flag=True, hidden=True)
@click.option(
    "--only", multiple=True, hidden=True
)  # of `duet run`: which students are checked before the teacher is asked
@click.option("--sweep", "sweeps", multiple=True, hidden=True)
def teacher_logits(
    limit: int | None, dry_run: bool, workers: int | None, worker: bool, child: bool, **asked: Any
) -> int:
    """Stage one: run the prefixed teacher once and store its top-k logits."""
    from duet.pipeline.commands.teacher_logits import teacher_logits
    from duet.pipeline.config.selection import Selection
    from duet.pipeline.run.launch import check_alone

    check_alone("teacher-logits", os.environ)
    for name, value in {"--workers": workers, "--limit": limit, "--dry-run": dry_run}.items():
        if worker and value:
            raise UserError(
                f"--worker cannot be combined with {name}: a worker writes the full store with the others",
                f"leave out {name}",
            )
    if workers:
        asked["overrides"] = (*asked["overrides"], f"teacher.data_parallel={workers}")
    return teacher_logits(Selection(**asked), limit, dry_run, child, worker)


@duet.command()
@experiment
@students
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    help="Students trained at the same time; default: the number of GPUs, at least 1.",
)
@click.option("--child", is_flag=True, hidden=True)
def distill(jobs: int | None, child: bool, **asked: Any) -> int:
    """Stage two: train the students on the store; through torchrun, each on several devices."""
    from duet.pipeline.commands.distill import distill
    from duet.pipeline.config.selection import Selection

    return distill(Selection(**asked), jobs, child)


@duet.command()
@experiment
@students
@click.option(
    "--model", "models", multiple=True, metavar="[NAME=]PATH",
    help="Score this model, made elsewhere, instead of the students; can be repeated. No earlier stage is needed.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print what each attack will cost, and start nothing.")
@click.option(
    "--jobs", type=click.IntRange(min=1), help="Models asked at the same time; default: the number of GPUs, at least 1."
)
@click.option("--part", type=click.IntRange(min=0), hidden=True)
def evaluate(models: tuple[str, ...], dry_run: bool, jobs: int | None, part: int | None, **asked: Any) -> int:
    """Stage three: score base, teacher and students; write results.json and report.html."""
    from duet.pipeline.commands.evaluate import Jobs, evaluate
    from duet.pipeline.config.schema import with_models
    from duet.pipeline.config.selection import Selection
    from duet.pipeline.run.launch import check_alone

    check_alone("evaluate", os.environ)
    request = Selection(**asked)
    named = [part for model in models for part in ("--model", model)]
    at_a_time = Jobs(jobs, [*request.arguments(), *named], part)
    if not models:
        return evaluate(request.load(), at_a_time, dry_run)
    if request.only or request.sweeps:
        raise UserError(
            "--model leaves the students out: --only and --sweep do nothing with it", "leave out one of them"
        )
    return evaluate(with_models(request.load(), models), at_a_time, dry_run, only_models=True)


@duet.command("audit-prefix")
@experiment
@click.option(
    "--prefix",
    "prefixes",
    multiple=True,
    metavar="TEXT",
    help="A further prefix to try, with {topic} filled in; can be repeated.",
)
@click.option("--search", type=click.IntRange(min=1), metavar="N", help="Also try N variations of the best prefixes.")
def audit_prefix(config_path: str, overrides: tuple[str, ...], prefixes: tuple[str, ...], search: int | None) -> None:
    """Measure, before any training, what prefixes make the base model forget and what they damage."""
    from duet.pipeline.commands.audit_prefix import audit_prefixes
    from duet.pipeline.config.load import load_config
    from duet.pipeline.run.launch import check_alone

    check_alone("audit-prefix", os.environ)
    audit_prefixes(load_config(config_path, overrides), prefixes, search or 0)


@duet.command()
@experiment
@click.argument("out", metavar="OUT.jsonl", type=click.Path(path_type=Path))
@click.option(
    "--questions", type=click.IntRange(min=1), metavar="N", help="Write N questions, as a user would ask them."
)
@click.option("--documents", type=click.IntRange(min=1), metavar="N", help="Write N texts that begin from nothing.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the draws.")
@click.option(
    "--temperature", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True,
    help="Temperature at which tokens are drawn.",
)  # fmt: skip
@click.option(
    "--max-tokens", type=click.IntRange(min=1), metavar="N",
    help="Longest text; default: 64 for questions, 256 for documents.",
)  # fmt: skip
def sample(config_path: str, overrides: tuple[str, ...], out: Path, **asked: Any) -> None:
    """Have the base model write questions or documents by itself, as broad rows for which there is no corpus."""
    from duet.pipeline.commands.sample import sample
    from duet.pipeline.config.load import load_config
    from duet.pipeline.run.launch import check_alone

    check_alone("sample", os.environ)
    sample(load_config(config_path, overrides), out, **asked)


@duet.command()
@experiment
@students
@click.option("--force", is_flag=True, help="Run even if the prefix failed its audit.")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    help="Students trained, and models asked, at the same time; default: the number of GPUs, at least 1.",
)
def run(force: bool, jobs: int | None, **asked: Any) -> int:
    """Run all three stages, each in a process of its own."""
    from duet.pipeline.commands.audit_prefix import refuse_failing
    from duet.pipeline.commands.run import run_all
    from duet.pipeline.config.selection import Selection
    from duet.pipeline.run.launch import check_alone

    check_alone("run", os.environ)
    request = Selection(**asked)
    config = request.load()  # a faulty config should not wait for a stage to say so
    if not force:
        refuse_failing(config)
    return run_all(request, jobs)


@duet.command()
@experiment
@click.option(
    "--jobs", type=click.IntRange(min=1), help="Methods trained at the same time; default: the number of GPUs, else 2."
)
@click.option("--part", hidden=True)
def compare(jobs: int | None, part: str | None, **asked: Any) -> int:
    """Compare DUET with other unlearning methods: same data, same budget, one table."""
    from duet.pipeline.commands.compare import compare
    from duet.pipeline.config.selection import Selection
    from duet.pipeline.run.launch import check_alone

    check_alone("compare", os.environ)
    return compare(Selection(**asked), jobs, part)


@duet.command()
@experiment
@students
@click.option(
    "--stage", "stages", multiple=True, type=click.Choice(["teacher-logits", "distill", "evaluate"]),
    help="Only this stage; can be repeated. Default: all.",
)  # fmt: skip
@click.option("--print", "print_only", is_flag=True, help="Show the jobs' scripts, and submit nothing.")
@click.option("--force", is_flag=True, help="Run even if the prefix failed its audit.")
def submit(stages: tuple[str, ...], print_only: bool, force: bool, **asked: Any) -> None:
    """Submit a run to Slurm as a chain of jobs; nothing that is done or queued is submitted again."""
    from duet.pipeline.commands.audit_prefix import refuse_failing
    from duet.pipeline.commands.submit import submit
    from duet.pipeline.config.selection import Selection

    request = Selection(**asked)
    if not force:
        refuse_failing(request.load())
    submit(request, stages, print_only)


for command in (*RUN_COMMANDS, *MACHINE_COMMANDS, cache_group):
    duet.add_command(command)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code; errors of the user are two lines on stderr.

    The run's log gets every error's full trace, once there is a run.
    """
    log.addHandler(logging.NullHandler())
    try:
        result = duet.main(args=arguments, prog_name="duet", standalone_mode=False)
        return result if isinstance(result, int) else EXIT_DONE
    except UserError as error:
        log.error("%s", error, exc_info=True)
        tell(f"error: {error}")
        return EXIT_USER
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return EXIT_USER
    except click.ClickException as error:
        tell(f"error: {error.format_message()}\nhint: {hint_for(error)}")
        return EXIT_USER
    except (Interrupted, KeyboardInterrupt, click.Abort) as error:
        log.error("interrupted: %s", error)
        if not rank():
            tell(f"interrupted: {error}\nhint: run the same command again: it resumes")
        return EXIT_INTERRUPTED
    except Exception as error:
        log.exception("an unexpected error")
        if fault := of_the_place(error):
            tell(f"error: {fault}")
            return EXIT_USER
        tell(f"{traceback.format_exc()}error: this is a bug in Duet\nhint: please report it with the lines above")
        return EXIT_BUG


def entry() -> None:
    """The console script. Keeps model libraries from writing bars and notes of their own between Duet's lines.

    And torch's threads from spinning while they wait: on a shared machine that makes small models train ten times slower.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    sys.exit(main())
