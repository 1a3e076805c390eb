"""The command `duet`: arguments in, exit codes out. 0 done, 2 the user can mend it, 75 interrupted but resumable."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from cache.errors import EXIT_BUG, EXIT_DONE, EXIT_INTERRUPTED, EXIT_USER, Interrupted, UserError
from pipeline.arguments import Group

log = logging.getLogger("duet")


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="duet-unlearn")
def duet() -> None:
    """Make a language model forget a topic: teacher logits to a store, store to students, and proof."""


def _experiment(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that works on an experiment."""
    command = click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one setting, e.g. --set train.lr=1e-5."
    )(command)
    return click.option(
        "--config",
        "config_path",
        required=True,
        metavar="FILE",
        shell_complete=_files,
        help="The experiment's YAML file.",
    )(command)


def _files(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Completed by the shell itself."""
    return [CompletionItem(incomplete, type="file")]


def _students(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that works on students."""
    command = click.option(
        "--sweep", "sweeps", multiple=True, metavar="KEY=V1,V2,…",
        help="One student per value, e.g. --sweep train.lr=1e-5,1e-4; several make a grid.",
    )(command)  # fmt: skip
    return click.option("--only", multiple=True, metavar="NAME", help="Only this student; can be repeated.")(command)


@duet.command()
@click.argument("file", metavar="[FILE]", required=False)
@click.option("--topic", help="What is to be forgotten, as a person would name it.")
@click.option("--model", metavar="PATH", help="The base model: a directory, or OWNER/NAME on the hub.")
@click.option(
    "--forget", metavar="DATA", shell_complete=_files, help="Questions about the topic (.jsonl, .csv, .parquet)."
)
@click.option("--retain", metavar="DATA", shell_complete=_files, help="Questions about anything else.")
@click.option("--name", help="Name of the run; default: after the topic.")
@click.option("--question-field", metavar="FIELD", help="Field with the question, where it is not called so.")
@click.option("--answer-field", metavar="FIELD", help="Field with the answer, where it is not called so.")
@click.option("--yes", is_flag=True, help="Ask nothing: take what is given, and defaults for the rest.")
def init(file: str | None, yes: bool, **given: str | None) -> None:
    """Ask for topic, model and data, check them, and write a config; FILE defaults to NAME.yaml."""
    from pipeline import init as questions

    questions.init(file, {key.replace("_", "-"): value for key, value in given.items()}, yes)


@duet.command("teacher-logits")
@_experiment
@click.option("--dry-run", is_flag=True, help="Say what it would cost, and start nothing.")
@click.option("--limit", type=click.IntRange(min=1), help="A trial: the first so many queries of each subset.")
@click.option(
    "--workers", type=click.IntRange(min=1), help="Processes here that share the work; as teacher.data_parallel."
)
@click.option("--worker", is_flag=True, help="Be one of many: end when all that is left is in others' hands.")
@click.option("--child", is_flag=True, hidden=True)
def teacher_logits(
    limit: int | None, dry_run: bool, workers: int | None, worker: bool, child: bool, **asked: Any
) -> int:
    """Stage one: run the prefixed teacher once and store its top-k logits."""
    from pipeline import capture
    from pipeline.processes import check_alone
    from pipeline.sweep import Request

    check_alone("teacher-logits", os.environ)
    if worker and (workers or limit):
        raise UserError("--worker is one process of many that write the whole store", "leave out --workers and --limit")
    if workers:
        asked["overrides"] = (*asked["overrides"], f"teacher.data_parallel={workers}")
    return capture.teacher_logits(Request(**asked), limit, dry_run, child, worker)


@duet.command()
@_experiment
@_students
@click.option("--jobs", type=click.IntRange(min=1), help="Students at a time; default: the number of GPUs, at least 1.")
@click.option("--child", is_flag=True, hidden=True)
def distill(jobs: int | None, child: bool, **asked: Any) -> int:
    """Stage two: train the students on the store; through torchrun, each on several devices."""
    from pipeline.distill import distill as train
    from pipeline.sweep import Request

    return train(Request(**asked), jobs, child)


@duet.command()
@_experiment
@_students
@click.option(
    "--model", "models", multiple=True, metavar="[NAME=]PATH",
    help="Score this model, made elsewhere, instead of the students; can be repeated. Needs no stage before.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Say what each attack will cost, and start nothing.")
def evaluate(models: tuple[str, ...], dry_run: bool, **asked: Any) -> None:
    """Stage three: score base, teacher and students; write results.json and report.html."""
    from pipeline import commands
    from pipeline.config import with_models
    from pipeline.processes import check_alone
    from pipeline.sweep import Request

    check_alone("evaluate", os.environ)
    request = Request(**asked)
    if not models:
        commands.evaluate(request.load(), dry_run)
    elif request.only or request.sweeps:
        raise UserError(
            "--model leaves the students out: --only and --sweep do nothing with it", "leave out one of them"
        )
    else:
        commands.evaluate(with_models(request.load(), models), dry_run, only_models=True)


@duet.command("audit-prefix")
@_experiment
@click.option(
    "--prefix", "prefixes", multiple=True, metavar="TEXT", help="One more; {topic} is filled; can be repeated."
)
@click.option("--search", type=click.IntRange(min=1), metavar="N", help="Try N variations of the best, too.")
def audit_prefix(config_path: str, overrides: tuple[str, ...], prefixes: tuple[str, ...], search: int | None) -> None:
    """Ask, before any training, what prefixes make the base model forget and what they damage."""
    from pipeline.audit import audit_prefixes
    from pipeline.config import load_config
    from pipeline.processes import check_alone

    check_alone("audit-prefix", os.environ)
    audit_prefixes(load_config(config_path, overrides), prefixes, search or 0)


@duet.command()
@_experiment
@_students
@click.option("--force", is_flag=True, help="Also with a prefix that failed its audit.")
def run(force: bool, **asked: Any) -> int:
    """All three stages, each in a process of its own."""
    from pipeline import commands
    from pipeline.audit import refuse_failing
    from pipeline.processes import check_alone
    from pipeline.sweep import Request

    check_alone("run", os.environ)
    request = Request(**asked)
    config = request.load()  # a faulty config should not wait for a stage to say so
    if not force:
        refuse_failing(config)
    return commands.run_all(request)


@duet.command()
@click.argument("run", metavar="[RUN_DIR]", required=False)
@click.option("--pdf", is_flag=True, help="Print it to report.pdf, too; needs Chromium or Chrome.")
def report(run: str | None, pdf: bool) -> None:
    """Render a run's report.html anew from its results.json; RUN_DIR defaults to the only run in runs/."""
    from pipeline import printing

    printing.report(run, pdf)


class _Evidence(Group):
    """`duet evidence OUT.zip` is `duet evidence pack OUT.zip`: what is no command is the file to write."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        packs = any(arg.endswith(".zip") for arg in args) and args[0] not in self.commands
        return super().parse_args(ctx, ["pack", *args] if packs else args)


@duet.group("evidence", cls=_Evidence)
def evidence_group() -> None:
    """Bundle a run's report, numbers and settings for others, and check such a bundle."""


@evidence_group.command("pack")
@click.argument("out", metavar="OUT.zip")
@click.option("--run", metavar="RUN_DIR", help="The run's directory; default: the only run in runs/.")
def pack_evidence(out: str, run: str | None) -> None:
    """Write a zip file with hashes over all that is in it; `duet evidence OUT.zip` does the same."""
    from pipeline import evidence

    evidence.pack(out, run)


@evidence_group.command("verify")
@click.argument("out", metavar="OUT.zip")
def verify_evidence(out: str) -> None:
    """Check that nothing is missing, additional or changed, and that the report is what the numbers say."""
    from pipeline import evidence

    evidence.verify(out)


@duet.command()
@_experiment
@click.option("--jobs", type=click.IntRange(min=1), help="Methods at a time; default: the number of GPUs, else 2.")
@click.option("--part", hidden=True)
def compare(jobs: int | None, part: str | None, **asked: Any) -> int:
    """DUET against other unlearning methods: same data, same budget, one table."""
    from pipeline.compare import compare as compare_methods
    from pipeline.processes import check_alone
    from pipeline.sweep import Request

    check_alone("compare", os.environ)
    return compare_methods(Request(**asked), jobs, part)


@duet.command()
@_experiment
@_students
@click.option(
    "--stage", "stages", multiple=True, type=click.Choice(["teacher-logits", "distill", "evaluate"]),
    help="Only this stage; can be repeated. Default: all.",
)  # fmt: skip
@click.option("--print", "print_only", is_flag=True, help="Show the jobs' scripts, and submit nothing.")
@click.option("--force", is_flag=True, help="Also with a prefix that failed its audit.")
def submit(stages: tuple[str, ...], print_only: bool, force: bool, **asked: Any) -> None:
    """A run as jobs on a Slurm cluster, chained; what is done or in the queue is not submitted again."""
    from pipeline import submit as jobs
    from pipeline.audit import refuse_failing
    from pipeline.sweep import Request

    request = Request(**asked)
    if not force:
        refuse_failing(request.load())
    jobs.submit(request, stages, print_only)


@duet.command(hidden=True)
@click.argument("config_path", type=click.Path(path_type=Path))
@click.argument("task")
def attempt(config_path: Path, task: str) -> None:
    """A Slurm job of ours begins: note it, or refuse one that gets nowhere."""
    from pipeline import submit as jobs

    jobs.attempt(config_path, task)


_run_argument = click.argument(
    "run_dir", metavar="RUN_DIR", type=click.Path(path_type=Path, exists=True, file_okay=False)
)


@duet.command()
@_run_argument
@click.option("--watch", is_flag=True, help="Look again every few seconds, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print it as one JSON object.")
def status(run_dir: Path, watch: bool, as_json: bool) -> None:
    """How far a run is: shards, students, jobs in the queue, rates and time left."""
    from pipeline import status as of_run

    of_run.status(run_dir, watch, as_json)


@duet.command()
@_run_argument
@click.argument("job", required=False)
@click.option(
    "--lines", type=click.IntRange(min=1), default=40, show_default=True, help="The last so many of each log."
)
def logs(run_dir: Path, job: str | None, lines: int) -> None:
    """The end of the newest log of each of a run's jobs, or of the one named; without jobs, of the run's own log."""
    from pipeline import status as of_run

    of_run.logs(run_dir, job, lines)


@duet.command()
@_run_argument
def cancel(run_dir: Path) -> None:
    """Take a run's jobs out of Slurm's queue; `duet submit` goes on from what is done."""
    from pipeline import submit as jobs

    jobs.cancel(run_dir)


@duet.group("cache")
def cache_group() -> None:
    """Look into stores of teacher logits, and after them."""


_store_argument = click.argument("store", metavar="STORE")
_root_argument = click.argument("root", metavar="FOLDER")


@cache_group.command("ls")
@_root_argument
def list_stores(root: str) -> None:
    """List the stores in a folder or under a URL."""
    from pipeline import stores

    stores.list_stores(root)


@cache_group.command()
@_experiment
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON, by teacher.")
def find(config_path: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Say which stores a config would use; exit code 0 if they are complete, else 2."""
    from pipeline import stores

    stores.find_stores(config_path, overrides, as_json)


@cache_group.command()
@_store_argument
@click.option("--json", "as_json", is_flag=True, help="Print the whole manifest as JSON.")
def inspect(store: str, as_json: bool) -> None:
    """Show what a store holds and where it came from."""
    from pipeline import stores

    stores.inspect_store(store, as_json)


@cache_group.command()
@_store_argument
def verify(store: str) -> None:
    """Check every byte of a store against its hashes."""
    from pipeline import stores

    stores.verify_store(store)


@cache_group.command()
@_store_argument
@_experiment
def repair(store: str, config_path: str, overrides: tuple[str, ...]) -> None:
    """Write a store's damaged and missing shards anew."""
    from pipeline import stores

    stores.repair_store(store, config_path, overrides)


@cache_group.command()
@click.argument("source", metavar="STORE")
@click.argument("target", metavar="NEW_STORE")
@click.option(
    "--format", "store_format", type=click.Choice(["arrow", "zarr"]), required=True, help="Format of the copy."
)
@click.option(
    "--compression", type=click.Choice(["none", "lz4", "zstd"]), default="none", show_default=True, help="Of the copy."
)
def convert(source: str, target: str, store_format: str, compression: str) -> None:
    """Write the same rows, bit for bit, in another format."""
    from pipeline import stores

    stores.convert_store(source, target, store_format, compression)


@cache_group.command()
@_root_argument
@click.option("--unused-days", type=float, help="Also complete stores that were not read for so many days.")
@click.option("--yes", is_flag=True, help="Remove them; without it they are only listed.")
def gc(root: str, unused_days: float | None, yes: bool) -> None:
    """List or remove incomplete stores that nobody is writing, and unused ones."""
    from pipeline import stores

    stores.collect_garbage(root, unused_days, yes)


@duet.command()
@click.option(
    "--config", "config_path", metavar="FILE", shell_complete=_files, help="Check what this experiment needs, too."
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one setting of that experiment.")
@click.option("--json", "as_json", is_flag=True, help="Print the checks as one JSON object.")
def doctor(config_path: str | None, overrides: tuple[str, ...], as_json: bool) -> int:
    """Check that everything is here that Duet needs; exits with 2 where something needed is not."""
    from pipeline import doctor as checks

    return checks.doctor(config_path, overrides, as_json)


def _gpu_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from stages.gpus import gpu_names

    return [CompletionItem(name) for name in gpu_names() if name.lower().startswith(incomplete.lower())]


@duet.command("estimate")
@_experiment
@click.option(
    "--gpu", metavar="NAME", shell_complete=_gpu_names, help="A GPU by name, e.g. A100-80; default: what is here."
)
@click.option(
    "--gpu-memory", type=click.FloatRange(min=0, min_open=True), metavar="GB", help="Or its memory, with --tflops."
)
@click.option("--tflops", type=click.FloatRange(min=0, min_open=True), metavar="X", help="Its dense 16-bit TFLOP/s.")
@click.option(
    "--gpus", type=click.IntRange(min=1), default=1, show_default=True, help="So many train each student together."
)
@click.option("--json", "as_json", is_flag=True, help="Print it as one JSON object.")
def estimate_costs(
    config_path: str, overrides: tuple[str, ...], gpu: str | None, gpu_memory: float | None, tflops: float | None,
    gpus: int, as_json: bool,
) -> None:  # fmt: skip
    """Memory and time of each stage on a GPU, and what to change where it does not fit."""
    from pipeline.estimate import chosen_device, estimate

    estimate(config_path, overrides, chosen_device(gpu, gpu_memory, tflops), gpus, as_json)


@duet.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script that has your shell complete commands and options: eval "$(duet completion bash)"."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None  # click has all three
    click.echo(kind(duet, {}, "duet", "_DUET_COMPLETE").source())


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
        _tell(f"error: {error}")
        return EXIT_USER
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return EXIT_USER
    except click.ClickException as error:
        _tell(f"error: {error.format_message()}\nhint: {_hint(error)}")
        return EXIT_USER
    except (Interrupted, KeyboardInterrupt, click.Abort) as error:
        log.error("interrupted: %s", error)
        if not _rank():
            _tell(f"interrupted: {error}\nhint: run the same command again, it goes on from there")
        return EXIT_INTERRUPTED
    except Exception:
        log.exception("a bug")
        _tell(f"{traceback.format_exc()}error: this is a bug in Duet\nhint: please report it with the lines above")
        return EXIT_BUG


def _rank() -> str:
    """Which process of a launch this is; empty for the first and where there is no other."""
    number = os.environ.get("RANK", "") if "WORLD_SIZE" in os.environ else ""
    return "" if number == "0" else number


def _tell(text: str) -> None:
    """Write to stderr; each line says which process it is from, if not from the first."""
    prefix = f"rank {_rank()}: " if _rank() else ""
    click.echo("\n".join(prefix + line for line in text.splitlines()), err=True)


def _hint(error: click.ClickException) -> str:
    """What to do about a faulty command line."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "duet"
    if isinstance(error, click.MissingParameter) and error.param and error.param.name == "config_path":
        return f"{command} --config FILE, the experiment's YAML file; `duet init` writes one"
    return f"{command} --help"


def entry() -> None:
    """The console script. Model libraries are kept from writing bars and notes of their own between our lines.

    And torch's threads from spinning while they wait: on a machine that others use too, that makes small models train ten
    times slower.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    sys.exit(main())


if __name__ == "__main__":
    entry()
