"""`python -m mogine`."""

from mogine.cli import main

main()
