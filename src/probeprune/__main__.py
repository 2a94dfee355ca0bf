"""`python -m probeprune`, as torchrun and accelerate launch want it."""

from probeprune_command import main

main()
