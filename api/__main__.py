"""`python -m duet`: the command, for launchers such as torchrun."""

from duet.pipeline.cli.main import entry

entry()
