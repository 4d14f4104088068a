"""The same as `jaxpt trace`."""

from jaxpt.cli.main import main

if __name__ == "__main__":
    main("trace")
