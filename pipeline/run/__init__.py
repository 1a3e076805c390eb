"""Run directory, signals, child processes, Slurm."""
