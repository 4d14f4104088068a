"""The same as `jaxpt compare`."""

from jaxpt.cli.main import main

if __name__ == "__main__":
    main("compare")
