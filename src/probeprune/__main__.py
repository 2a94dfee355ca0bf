"""`python -m probeprune`, as torchrun and accelerate launch want it."""

from probeprune.cli import main

main()
