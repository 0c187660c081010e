"""`python -m pipeline` is the command line `nntk`."""

from pipeline.cli.commands import main

main()
