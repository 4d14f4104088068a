"""The same as `jaxpt train`."""

from jaxpt.cli.main import main

if __name__ == "__main__":
    main("train")
