"""Run `jaxpt COMMAND` as a terminal does, in a process that has everything imported."""

import contextlib
import io
import sys

from jaxpt.cli.main import main


def run_command(name: str, arguments: list[str], cwd: str) -> tuple[int, str]:
    """Return the exit status and the output (stdout and stderr) of a command."""
    output = io.StringIO()
    before, sys.argv = sys.argv, ["jaxpt", name, *map(str, arguments)]
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        try:
            main()
            status = 0
        except SystemExit as exit:
            is_message = isinstance(exit.code, str)
            status = 1 if is_message else exit.code or 0
            output.write(f"{exit.code}\n" if is_message else "")
        finally:
            sys.argv = before
    return status, output.getvalue()
