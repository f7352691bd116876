"""`python -m tickserve.cli` is the command."""

from tickserve.cli import main

main()
