"""`python -m lowrank_pl`."""

from lowrank_pl.cli import console

if __name__ == "__main__":
    console()
