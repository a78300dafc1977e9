"""`python -m baton`: the command `baton`, where only the package is there."""

import sys

from .deploy.cli import main

if __name__ == "__main__":
    sys.exit(main())
