"""`python -m pipeline` is the command line `nntk`."""

from pipeline.cli import main

main()
