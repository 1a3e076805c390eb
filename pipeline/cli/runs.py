"""Commands that work on a run's directory: its report and evidence, how far it is, its jobs."""

from __future__ import annotations

from pathlib import Path

import click

from duet.pipeline.cli.arguments import Command, Group


@click.command(cls=Command)
@click.argument("run", metavar="[RUN_DIR]", required=False)
@click.option("--pdf", is_flag=True, help="Also print it to report.pdf; needs Chromium or Chrome.")
def report(run: str | None, pdf: bool) -> None:
    """Render a run's report.html again from its results.json; RUN_DIR defaults to the only run in runs/."""
    from duet.pipeline.commands.report import report

    report(run, pdf)


class _Evidence(Group):
    """`duet evidence OUT.zip` is `duet evidence pack OUT.zip`: a word that is not a command is the file to write."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        packs = any(arg.endswith(".zip") for arg in args) and args[0] not in self.commands
        return super().parse_args(ctx, ["pack", *args] if packs else args)


@click.group("evidence", cls=_Evidence)
def evidence_group() -> None:
    """Bundle a run's report, numbers and settings for others, and check such a bundle."""


@evidence_group.command("pack")
@click.argument("out", metavar="OUT.zip")
@click.option("--run", metavar="RUN_DIR", help="The run's directory; default: the only run in runs/.")
def pack_evidence(out: str, run: str | None) -> None:
    """Write a zip file with hashes over its contents; `duet evidence OUT.zip` does the same."""
    from duet.pipeline.commands import evidence

    evidence.pack(out, run)


@evidence_group.command("verify")
@click.argument("out", metavar="OUT.zip")
def verify_evidence(out: str) -> None:
    """Check that nothing is missing, additional or changed, and that the report agrees with the numbers."""
    from duet.pipeline.commands import evidence

    evidence.verify(out)


@click.command(cls=Command, hidden=True)
@click.argument("config_path", type=click.Path(path_type=Path))
@click.argument("task")
def attempt(config_path: Path, task: str) -> None:
    """A Slurm job of the run begins: note it, or refuse one that makes no progress."""
    from duet.pipeline.commands.submit import attempt

    attempt(config_path, task)


_run_argument = click.argument(
    "run_dir", metavar="RUN_DIR", type=click.Path(path_type=Path, exists=True, file_okay=False)
)


@click.command(cls=Command)
@click.argument("run_a", metavar="RUN_A")
@click.argument("run_b", metavar="RUN_B")
@click.option("--json", "as_json", is_flag=True, help="Print it as one JSON object.")
def diff(run_a: str, run_b: str, as_json: bool) -> None:
    """Compare two evaluated runs: what differs in them, and which numbers moved beyond their intervals."""
    from duet.pipeline.commands.diff import diff

    diff(run_a, run_b, as_json)


@click.command(cls=Command)
@_run_argument
@click.option("--watch", is_flag=True, help="Refresh every few seconds, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print it as one JSON object.")
def status(run_dir: Path, watch: bool, as_json: bool) -> None:
    """Show the progress of a run: shards, students, jobs in the queue, rates and time left."""
    from duet.pipeline.commands.status import status

    status(run_dir, watch, as_json)


@click.command(cls=Command)
@_run_argument
@click.argument("job", required=False)
@click.option(
    "--lines",
    type=click.IntRange(min=1),
    default=40,
    show_default=True,
    help="Number of lines from the end of each log.",
)
def logs(run_dir: Path, job: str | None, lines: int) -> None:
    """Show the end of the newest log of each job of a run, or of the one named; without jobs, of the run's own log."""
    from duet.pipeline.commands.status import logs

    logs(run_dir, job, lines)


@click.command(cls=Command)
@_run_argument
def cancel(run_dir: Path) -> None:
    """Remove a run's jobs from Slurm's queue; `duet submit` resumes the run."""
    from duet.pipeline.commands.submit import cancel

    cancel(run_dir)


RUN_COMMANDS = (report, diff, evidence_group, status, logs, cancel, attempt)
