"""The same as `jaxpt initialize`."""

from jaxpt.cli.main import main

if __name__ == "__main__":
    main("initialize")
