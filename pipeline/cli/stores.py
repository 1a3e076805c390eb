"""The commands `duet cache …`."""

from __future__ import annotations

import click

from duet.pipeline.cli.arguments import Group, experiment


@click.group("cache", cls=Group)
def cache_group() -> None:
    """Inspect, verify, repair and clean up stores of teacher logits."""


_store_argument = click.argument("store", metavar="STORE")
_root_argument = click.argument("root", metavar="FOLDER")


@cache_group.command("ls")
@_root_argument
def list_stores(root: str) -> None:
    """List the stores in a folder or under a URL."""
    from duet.pipeline.commands import cache

    cache.list_stores(root)


@cache_group.command("models")
@click.option("--remove", is_flag=True, help="Remove them; a run that needs one makes it again.")
def models(remove: bool) -> None:
    """List the models that GGUF files were dequantised to, in ~/.cache/duet/models."""
    from duet.pipeline.commands import cache

    cache.dequantised_models(remove)


@cache_group.command()
@experiment
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON, by teacher.")
def find(config_path: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """List the stores a config would use; exit code 0 if they are complete, else 2."""
    from duet.pipeline.commands import cache

    cache.find_stores(config_path, overrides, as_json)


@cache_group.command()
@_store_argument
@click.option("--json", "as_json", is_flag=True, help="Print the whole manifest as JSON.")
def inspect(store: str, as_json: bool) -> None:
    """Show what a store holds and where it came from."""
    from duet.pipeline.commands import cache

    cache.inspect_store(store, as_json)


@cache_group.command()
@_store_argument
def verify(store: str) -> None:
    """Check every byte of a store, complete or not, against its hashes."""
    from duet.pipeline.commands import cache

    cache.verify_store(store)


@cache_group.command()
@_store_argument
@experiment
def repair(store: str, config_path: str, overrides: tuple[str, ...]) -> None:
    """Rewrite a store's damaged and missing shards, and restore its other files."""
    from duet.pipeline.commands import cache

    cache.repair_store(store, config_path, overrides)


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
    from duet.pipeline.commands import cache

    cache.convert_store(source, target, store_format, compression)


@cache_group.command()
@_store_argument
@click.argument("target", metavar="FOLDER")
@click.option(
    "--format",
    "exchange_format",
    type=click.Choice(["parquet", "hf", "distillkit"]),
    required=True,
    help="Parquet files, a data set that Hugging Face's datasets loads from disk, or what DistillKit trains on.",
)
def export(store: str, target: str, exchange_format: str) -> None:
    """Write a store's rows to a new folder, for other programs."""
    from duet.pipeline.commands import exchange

    exchange.export(store, target, exchange_format)


@cache_group.command("import")
@click.argument("source", metavar="EXPORT")
@_root_argument
@click.option(
    "--format",
    "store_format",
    type=click.Choice(["arrow", "zarr"]),
    default="arrow",
    show_default=True,
    help="Of the store.",
)
@click.option(
    "--compression", type=click.Choice(["none", "lz4", "zstd"]), default="none", show_default=True, help="Of the store."
)
def import_(source: str, root: str, store_format: str, compression: str) -> None:
    """Write an export back as a store in a folder of stores."""
    from duet.pipeline.commands import exchange

    exchange.import_(source, root, store_format, compression)


@cache_group.command()
@_root_argument
@click.option(
    "--unused-days", type=float, metavar="DAYS", help="Also complete stores that were not read for this number of days."
)
@click.option("--yes", is_flag=True, help="Remove them; without it they are only listed.")
def gc(root: str, unused_days: float | None, yes: bool) -> None:
    """List or remove incomplete stores that nobody is writing, and unused ones."""
    from duet.pipeline.commands import cache

    cache.collect_garbage(root, unused_days, yes)
