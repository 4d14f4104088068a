"""The same as `jaxpt sample`."""

from jaxpt.cli.main import main

if __name__ == "__main__":
    main("sample")
