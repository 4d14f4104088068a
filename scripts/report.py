"""The same as `jaxpt report`."""

from jaxpt.cli.main import main

if __name__ == "__main__":
    main("report")
