"""The same as `jaxpt export_gguf`."""

from jaxpt.cli.main import main

if __name__ == "__main__":
    main("export_gguf")
