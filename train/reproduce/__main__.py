"""``python -m train.reproduce``: see ``train.reproduce.run``."""

from .. import cli
from .run import main

if __name__ == "__main__":
    cli.run(main)
