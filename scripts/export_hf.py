"""The same as `jaxpt export_hf`."""

from jaxpt.cli.main import main

if __name__ == "__main__":
    main("export_hf")
