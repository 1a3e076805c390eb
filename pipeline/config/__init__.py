"""One YAML file and --set, checked."""
