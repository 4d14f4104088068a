"""The same as `jaxpt plan`."""

from jaxpt.cli.main import main

if __name__ == "__main__":
    main("plan")
