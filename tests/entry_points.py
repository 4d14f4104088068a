"""Run a command as a terminal does, in a process that has everything imported."""

import contextlib
import io
import runpy
import sys


def run_script(script: str, arguments: list[str], cwd: str) -> tuple[int, str]:
    """Return the exit status and the output (stdout and stderr) of a script."""
    output = io.StringIO()
    before, sys.argv = sys.argv, [script, *arguments]
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        try:
            runpy.run_path(script, run_name="__main__")
            status = 0
        except SystemExit as exit:
            is_message = isinstance(exit.code, str)
            status = 1 if is_message else exit.code or 0
            output.write(f"{exit.code}\n" if is_message else "")
        finally:
            sys.argv = before
    return status, output.getvalue()
