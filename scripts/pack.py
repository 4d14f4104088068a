"""The same as `jaxpt pack`."""

from jaxpt.cli.main import main

if __name__ == "__main__":
    main("pack")
