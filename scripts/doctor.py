"""The same as `jaxpt doctor`."""

from jaxpt.cli.main import main

if __name__ == "__main__":
    main("doctor")
