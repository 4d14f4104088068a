"""The same as `jaxpt launch`."""

from jaxpt.cli.main import main

if __name__ == "__main__":
    main("launch")
