"""Run `jaxpt COMMAND`: a command is a module of this package with `add_arguments` and `run`.

Its docstring is its help. Nothing here imports jax: `jaxpt --help` and completion answer at once,
and a command imports what it needs in `run`.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import sys

from jaxpt import cluster, stage, xla_settings
from jaxpt.cli import options
from jaxpt.config import suggest_name
from jaxpt.spec import UserError
from jaxpt.text import format_table

GROUPS = {
    "Before you pay": ("plan", "doctor"),
    "Data": ("prepare", "train_quality", "train_tokenizer", "pack"),
    "Model": ("initialize", "teacher_logits", "train", "sweep", "export_hf", "export_gguf"),
    "Results": ("evaluate", "compare", "sample", "report"),
    "Look inside": ("trace", "checkpoint"),
    "Several hosts": ("launch",),
}
COMMANDS = [name for names in GROUPS.values() for name in names]
# that use this machine's accelerator themselves: sweep starts train, plan compiles for others
ON_DEVICE = ("doctor", "initialize", "teacher_logits", "train", "export_hf", "export_gguf")
ON_DEVICE += ("evaluate", "compare", "sample", "trace", "checkpoint")
EPILOG = """
jaxpt COMMAND --help lists its flags, and the knobs of the config that it reads.
Any knob of a recipe can be overridden: jaxpt train --config FILE --config.train.steps=300
"""


def main(command: str = "") -> None:
    """Run the command that the command line names, or this one with the flags given."""
    words = [command, *sys.argv[1:]] if command else sys.argv[1:]
    if words[:1] == ["train"]:
        stage.use_large_pages()
    stage.entry_point(lambda: run_command(words))


def run_command(words: list[str]) -> None:
    """Run a command line without its first word, `jaxpt`.

    Raises:
        UserError: there is no such command or flag, or the command refuses its input.
    """
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)  # answers the shell and exits
    if not words:
        words = ["--help"]
    if not words[0].startswith("-"):
        name = words[0].replace("-", "_")
        if name not in COMMANDS:
            hint = suggest_name(name, COMMANDS, "jaxpt ")
            raise UserError(f"jaxpt: there is no command {words[0]}; {hint}")
        words = [name, *words[1:]]
    arguments = parser.parse_args(words)
    if arguments.command != "train":
        cluster.check_is_alone(arguments.command)
    if arguments.command in ON_DEVICE:
        xla_settings.set_variables()  # before jax is imported, which reads them
    if arguments.command in ON_DEVICE and arguments.command != "train":
        from jaxpt.train.distributed import enable_compilation_cache

        enable_compilation_cache()  # train does so when its processes have met
    arguments.run(arguments)


def build_parser() -> options.Parser:
    """Return the parser of all commands."""
    modules = {name: importlib.import_module(f"jaxpt.cli.{name}") for name in COMMANDS}
    summaries = {name: str(module.__doc__).splitlines()[0] for name, module in modules.items()}
    parser = options.Parser(
        "jaxpt",
        usage="jaxpt COMMAND [FLAG ...]",
        description=format_overview(summaries),
        epilog=EPILOG,
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", help=argparse.SUPPRESS
    )
    for name, module in modules.items():
        command = commands.add_parser(
            name, prog=f"jaxpt {name}", help=summaries[name], description=module.__doc__
        )
        command.set_defaults(run=module.run)
        module.add_arguments(command)
    return parser


def format_overview(summaries: dict[str, str]) -> str:
    """Return a line per command, in groups."""
    table = format_table([(name, summaries[name]) for name in COMMANDS], "<", indent="  ")
    rows = iter(table.splitlines())
    lines = []
    for title, names in GROUPS.items():
        lines += [f"{title}:", *itertools.islice(rows, len(names)), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
