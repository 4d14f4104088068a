"""The same as `jaxpt train_quality`."""

from jaxpt.cli.main import main

if __name__ == "__main__":
    main("train_quality")
