"""`python -m jaxpt COMMAND` is `jaxpt COMMAND`."""

from jaxpt.cli.main import main

main()
