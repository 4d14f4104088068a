"""Parse a command's flags: no abbreviations, a flag per knob, one sentence for a mistake."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import shlex
import shutil
from typing import Any

from jaxpt import config, io
from jaxpt.spec import UserError

log = logging.getLogger(__name__)

N_COLUMNS = 100
FLAG_COLUMNS = 46  # the longest flag of a knob, "--config.mixture.allow_changed_data", fits


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help in at most N_COLUMNS columns."""

    def __init__(self, prog: str):
        width = min(shutil.get_terminal_size().columns, N_COLUMNS)
        super().__init__(prog, max_help_position=FLAG_COLUMNS, width=width)


class Parser(argparse.ArgumentParser):
    """A parser that names the nearest flag or command for one that does not exist."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, formatter_class=Formatter, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse unknown flags first: a required one is often missing because it is misspelt."""
        is_leaf = self._subparsers is None
        for word in args if is_leaf else ():
            flag = word.partition("=")[0]
            if flag.startswith("--") and flag not in self._option_string_actions:
                self.refuse_flag(flag)
        return super().parse_known_args(args, namespace)

    def refuse_flag(self, flag: str) -> None:
        """Raise UserError with the nearest flag."""
        known = self._option_string_actions
        if "--config.train.steps" in known and flag.startswith("--config."):
            config.apply_overrides([f"{flag}="])  # raises, with the nearest knob
        flags = [name for name in known if not name.startswith("--config.")]
        hint = config.suggest_name(flag, flags)
        raise UserError(f"{self.prog}: there is no flag {flag}; {hint}")

    def error(self, message: str) -> Any:
        """Raise UserError instead of printing the usage."""
        raise UserError(f"{self.prog}: {message}. See {self.prog} --help.")


class KnobAction(argparse.Action):
    """Collects "--config.SECTION.NAME=VALUE" in `arguments.overrides`, in order."""

    def __init__(self, *args: Any, allowed: tuple[str, ...] = (), **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.allowed = allowed

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        """Add one override."""
        namespace.overrides = (*namespace.overrides, f"{option_string}={values}")

    def completer(self, **_: Any) -> tuple[str, ...]:
        """Return the values that argcomplete offers."""
        return self.allowed


def parse_path(text: str) -> io.Path:
    """Return the path of a flag: on a disk, gs://BUCKET/NAME or s3://BUCKET/NAME."""
    try:
        return io.path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from None


def add_workdir(parser: argparse.ArgumentParser) -> None:
    """Add --workdir."""
    parser.add_argument(
        "--workdir",
        required=True,
        metavar="DIR",
        type=parse_path,
        help="the run directory: read from and written to",
    )


def add_config(
    parser: argparse.ArgumentParser,
    required: bool = True,
    help: str = "a recipe, such as configs/quickstart.py",
) -> None:
    """Add --config."""
    parser.add_argument("--config", required=required, metavar="FILE", help=help)


def add_stage(parser: argparse.ArgumentParser, replaced: str) -> None:
    """Add what a command takes that writes a stage into the run directory, without its knobs."""
    add_config(parser)
    add_workdir(parser)
    parser.add_argument("--replace", action="store_true", help=f"overwrite {replaced} in WORKDIR")
    add_verify(parser)


def add_verify(parser: argparse.ArgumentParser) -> None:
    """Add --verify."""
    parser.add_argument(
        "--verify",
        action="store_true",
        help="where the work is finished already: compare its files' checksums, not only sizes",
    )


def add_knobs(parser: argparse.ArgumentParser, sections: tuple[str, ...]) -> None:
    """Add a flag per knob; the last call on a parser, whose usage then stays short.

    Args:
        parser: of a command that takes --config.
        sections: those that the command reads, which its help lists. The knobs of the others, which
            a script may pass to all commands of a run, are accepted too.
    """
    usage = parser.format_usage().removeprefix("usage: ").rstrip()
    indent = " " * len(f"usage: {parser.prog} ")
    parser.usage = f"{usage}\n{indent}[--config.SECTION.NAME=VALUE ...]"
    parser.set_defaults(overrides=())
    parser.epilog = (
        "Knobs are listed with their defaults; configs/base.py lists those of all commands."
    )
    for field in dataclasses.fields(config.Config):
        section = getattr(config.Config(), field.name)
        group, is_listed = parser, field.name in sections
        if is_listed:
            group = parser.add_argument_group(f"section {field.name}", section.__doc__)
        for knob in dataclasses.fields(section):
            help = knob.metadata["help"].replace("%", "%%")
            group.add_argument(
                f"--config.{field.name}.{knob.name}",
                action=KnobAction,
                allowed=list_values(knob),
                dest="overrides",
                default=argparse.SUPPRESS,
                metavar=format_default(knob.default),
                help=help if is_listed else argparse.SUPPRESS,
            )


def add_export_paths(parser: argparse.ArgumentParser, help: str) -> None:
    """Add --from, a model, --to, what is written, and --replace.

    Args:
        parser: of the command.
        help: of --to.
    """
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        type=parse_path,
        metavar="CHECKPOINT",
        help="a run (its newest checkpoint), a checkpoint, a Hugging Face directory or hf:NAME",
    )
    parser.add_argument("--to", required=True, type=parse_path, metavar="DIR", help=help)
    parser.add_argument("--replace", action="store_true", help="overwrite what --to holds")


def format_default(value: Any) -> str:
    """Return a default as a command line states it: 1000, adamw, ''."""
    return value if isinstance(value, str) and value else repr(value)


def list_values(knob: dataclasses.Field[Any]) -> tuple[str, ...]:
    """Return the values of a knob that has few."""
    if isinstance(knob.default, bool):
        return "True", "False"
    return knob.metadata["choices"]


def suggest_next(*words: object) -> None:
    """Log the command that usually comes next, without its first word."""
    log.info(f"next: {' '.join(['jaxpt', *map(quote, map(str, words))])}")


def quote(word: str) -> str:
    """Return a word as a shell takes it: in double quotes if it holds single ones and no more."""
    if "'" in word and not set(word) & set('"$`\\!'):
        return f'"{word}"'
    return shlex.quote(word)


def suggest_stage(name: str, arguments: argparse.Namespace) -> None:
    """Log the next command of a recipe's run directory, with the same overrides."""
    place = ("--config", arguments.config, "--workdir", arguments.workdir)
    suggest_next(name, *place, *arguments.overrides)


def suggest_report(models: list[str]) -> None:
    """Log the command that shows the runs among the models, or talks with the first model."""
    runs = [model for model in models if io.exists(io.path(model) / "metrics.jsonl")]
    if runs:
        suggest_next("report", "--workdir", *runs, "--to", "report.html")
    else:
        suggest_next("sample", "--model", models[0])


def load_settings(arguments: argparse.Namespace) -> config.Config:
    """Return the config that --config and its overrides state; without --config, the defaults."""
    if arguments.config:
        return config.load_config(arguments.config, arguments.overrides)
    return config.build_config(config.apply_overrides(arguments.overrides))
