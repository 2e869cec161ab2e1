"""`python -m alight`: the same as the command `alight`."""

from alight.cli import main

main()
