"""`python -m baton`: the command `baton`, where only the package is there."""

from .deploy.cli import main

if __name__ == "__main__":
    main()
