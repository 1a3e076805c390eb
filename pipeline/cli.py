"""The command `duet`: arguments in, exit codes out. 0 done, 2 the user can mend it, 75 interrupted but resumable."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import click

from cache.errors import EXIT_BUG, EXIT_DONE, EXIT_INTERRUPTED, EXIT_USER, Interrupted, UserError

log = logging.getLogger("duet")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="duet-unlearn")
def duet() -> None:
    """Make a language model forget a topic: teacher logits to a store, store to students, and proof."""


def _experiment(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that works on an experiment."""
    command = click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one setting, e.g. --set train.lr=1e-5."
    )(command)
    return click.option("--config", "config_path", required=True, metavar="FILE", help="The experiment's YAML file.")(
        command
    )


def _students(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that works on students."""
    command = click.option(
        "--sweep", "sweeps", multiple=True, metavar="KEY=V1,V2,…",
        help="One student per value, e.g. --sweep train.lr=1e-5,1e-4; several make a grid.",
    )(command)  # fmt: skip
    return click.option("--only", multiple=True, metavar="NAME", help="Only this student; can be repeated.")(command)


@duet.command("teacher-logits")
@_experiment
@click.option("--dry-run", is_flag=True, help="Say what it would cost, and start nothing.")
@click.option("--limit", type=click.IntRange(min=1), help="A trial: the first so many queries of each subset.")
@click.option("--child", is_flag=True, hidden=True)
def teacher_logits(limit: int | None, dry_run: bool, child: bool, **asked: Any) -> int:
    """Stage one: run the prefixed teacher once and store its top-k logits."""
    from pipeline import capture
    from pipeline.processes import check_alone
    from pipeline.sweep import Request

    check_alone("teacher-logits", os.environ)
    return capture.teacher_logits(Request(**asked), limit, dry_run, child)


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


class _Evidence(click.Group):
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
    except click.ClickException as error:
        hint = f"hint: duet {' '.join(_command_path(error))} --help".replace("  ", " ")
        _tell(f"error: {error.format_message()}\n{hint}")
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


def _command_path(error: click.ClickException) -> list[str]:
    context = getattr(error, "ctx", None)
    return context.command_path.split()[1:] if context else []


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
