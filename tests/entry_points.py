"""The doors as a terminal opens them, but one after the other in a process that has everything imported."""

import contextlib
import io
import runpy
import sys


def opened(script: str, words: list[str], cwd: str) -> tuple[int, str]:
    """(exit status, what it said) of a script called with these words."""
    said = io.StringIO()
    before, sys.argv = sys.argv, [script, *words]
    with contextlib.chdir(cwd), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            runpy.run_path(script, run_name="__main__")
            status = 0
        except SystemExit as ended:
            status = 1 if isinstance(ended.code, str) else ended.code or 0
            said.write(f"{ended.code}\n" if isinstance(ended.code, str) else "")
        finally:
            sys.argv = before
    return status, said.getvalue()
