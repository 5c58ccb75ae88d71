"""What an operator asks of a run through its folder alone, on a login node: no torch, no Slurm."""
