"""`python -m ftlib` is the command `ftlib`."""

import sys

from ftlib.cli import main

if __name__ == "__main__": sys.exit(main())
