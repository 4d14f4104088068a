"""The same as `jaxpt sweep`."""

from jaxpt.cli.main import main

if __name__ == "__main__":
    main("sweep")
