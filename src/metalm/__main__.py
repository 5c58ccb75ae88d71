"""`python -m metalm` and `torchrun -m metalm`."""

from metalm.cli import main

main()
