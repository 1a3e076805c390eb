"""One YAML file and --set, checked; names of a run's files."""
