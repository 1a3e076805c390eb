"""Commands about this machine: what is installed, what a run would need, completion in the shell."""

from __future__ import annotations

from typing import Any

import click
from click.shell_completion import CompletionItem

from duet.pipeline.cli.arguments import Command, experiment, files


@click.command(cls=Command)
@click.option(
    "--config", "config_path", metavar="FILE", shell_complete=files, help="Also check what this experiment needs."
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one setting of that experiment.")
@click.option("--json", "as_json", is_flag=True, help="Print the checks as one JSON object.")
def doctor(config_path: str | None, overrides: tuple[str, ...], as_json: bool) -> int:
    """Check that everything Duet needs is installed; exit with 2 if something is missing."""
    from duet.pipeline.commands.doctor import doctor

    return doctor(config_path, overrides, as_json)


def _gpu_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from duet.stages.cost.gpus import gpu_names

    return [CompletionItem(name) for name in gpu_names() if name.lower().startswith(incomplete.lower())]


@click.command(cls=Command)
@experiment
@click.option(
    "--gpu",
    metavar="NAME",
    shell_complete=_gpu_names,
    help="A GPU by name, e.g. A100-80; default: the GPU of this machine.",
)
@click.option(
    "--gpu-memory",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GB",
    help="Memory of a GPU, in place of its name; needs --tflops.",
)
@click.option(
    "--tflops", type=click.FloatRange(min=0, min_open=True), metavar="X", help="Dense 16-bit TFLOP/s of that GPU."
)
@click.option(
    "--gpus", type=click.IntRange(min=1), default=1, show_default=True, help="Number of GPUs that train each student."
)
@click.option("--json", "as_json", is_flag=True, help="Print it as one JSON object.")
def estimate(
    gpus: int, as_json: bool, gpu: str | None, gpu_memory: float | None, tflops: float | None, **asked: Any
) -> None:
    """Estimate memory and time of each stage on a GPU, and say what to change if it does not fit."""
    from duet.pipeline.commands.estimate import chosen_device, estimate
    from duet.pipeline.config.selection import Selection

    estimate(Selection(**asked).load(), chosen_device(gpu, gpu_memory, tflops), gpus, as_json)


@click.command(cls=Command)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script that has your shell complete commands and options: eval "$(duet completion bash)"."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None  # click has all three
    click.echo(kind(ctx.find_root().command, {}, "duet", "_DUET_COMPLETE").source())


MACHINE_COMMANDS = (doctor, estimate, completion)
