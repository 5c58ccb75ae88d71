"""What an operator asks of a run through its folder alone, on a login node.

Only `preflight`, which runs on the nodes, needs torch; Slurm is asked where it is there.
"""
