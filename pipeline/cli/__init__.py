"""The `duet` command: options and exit codes."""
