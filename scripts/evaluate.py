"""The same as `jaxpt evaluate`."""

from jaxpt.cli.main import main

if __name__ == "__main__":
    main("evaluate")
