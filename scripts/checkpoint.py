"""The same as `jaxpt checkpoint`."""

from jaxpt.cli.main import main

if __name__ == "__main__":
    main("checkpoint")
