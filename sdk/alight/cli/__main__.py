"""`python -m alight.cli`"""

from alight.cli import main

main()
