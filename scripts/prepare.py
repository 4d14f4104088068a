"""The same as `jaxpt prepare`."""

from jaxpt.cli.main import main

if __name__ == "__main__":
    main("prepare")
