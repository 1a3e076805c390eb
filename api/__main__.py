"""`python -m duet`: the command, for launchers such as torchrun."""

from duet.pipeline.cli.main import entry

if __name__ == "__main__":  # tools that read documentation import every module
    entry()
