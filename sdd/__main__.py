"""`python -m sdd`."""

from sdd.cli import main

main()
