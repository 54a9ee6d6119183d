"""`python -m edgezo`."""

from edgezo.cli import main

main()
