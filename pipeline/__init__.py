"""How a run starts: command line, config, run directory, report. May print, read arguments and the environment."""
