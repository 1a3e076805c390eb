"""Claims the run directory; signals, child processes, Slurm."""
