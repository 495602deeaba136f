"""The command ``dilated-attention``: one file a command, loaded when it is called.

To add a command, write ``cli/<name>.py`` with a function ``<name>`` that typer can call (or a ``typer.Typer`` of that
name, for a command with commands of its own), and add a line to `COMMANDS`. The module may import typer at its top;
what loads torch belongs inside the function.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from .errors import WRONG_INPUT, fail


class CommandEntry(NamedTuple):
    """Where a command is, relative to this package (what typer calls has that name too), and a line of help."""

    module: str
    help: str


COMMANDS: dict[str, CommandEntry] = {
    "train": CommandEntry("train", "Train a byte-level LongNet language model on text."),
    "generate": CommandEntry("generate", "Continue texts with a trained model."),
    "evaluate": CommandEntry("evaluate", "Measure what context is worth to a trained model: bits per byte, a plot."),
    "explain": CommandEntry("explain", "Show which calls compute a pattern on given shapes, and what they cost."),
    "verify": CommandEntry("verify", "Check outputs and gradients on this machine against the oracle."),
    "doctor": CommandEntry("doctor", "Report versions, devices, and the backends with a timing of each."),
    "bench": CommandEntry("bench", "Compare attention over sequence lengths: times, memory, a plot."),
    "encode-slide": CommandEntry("encode_slide", "Encode slides, given as features of their tiles, to embeddings."),
    "memory": CommandEntry("memory", "Record, replay and draw what is asked of memory; see who holds it."),
    "plan": CommandEntry("plan", "Predict time, traffic and memory of attention on many devices."),
    "draw": CommandEntry("draw", "Draw a pattern of attention, or the order of a grid and its segments."),
    "convert": CommandEntry("convert", "Convert checkpoints to folders of Hugging Face transformers, and back."),
    "migrate": CommandEntry("migrate", "Rewrite old imports and calls in your code to the new names."),
    "graph": CommandEntry("graph", "Show what imports what: in this package, or old names in your code."),
}


class CommandTable(TyperGroup):
    """A group that lists `COMMANDS` from the table alone and imports a command's module only to run it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = {name: TyperCommand(name, help=entry.help) for name, entry in COMMANDS.items()}

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command's name and help, enough to list it."""
        return self.commands.get(cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that ``args`` name, loaded."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, command if name is None else load_command(name), rest

    def main(self, *args: Any, **options: Any) -> Any:
        """Run, and report arguments that do not parse as one line, like every other wrong input."""
        standalone = options.pop("standalone_mode", True)
        options["standalone_mode"] = False
        if not standalone:
            return super().main(*args, **options)
        try:
            result = super().main(*args, **options)
        except Exception as error:
            # The class of a usage error depends on typer's version: click's, or that of its own copy.
            if (message := getattr(error, "format_message", None)) is None:
                raise
            if not (text := message()):  # the help, for want of a command, is printed already
                raise SystemExit(WRONG_INPUT) from None
            raise SystemExit(fail(text, WRONG_INPUT).exit_code) from None
        raise SystemExit(result if isinstance(result, int) else 0)


def load_command(name: str) -> Any:
    """Import a command of the table and build it."""
    module = importlib.import_module(f"{__name__}.{COMMANDS[name].module}")
    found = getattr(module, COMMANDS[name].module)
    if isinstance(found, typer.Typer):
        return typer.main.get_command(found)
    single = typer.Typer(add_completion=False)
    single.command(name, help=found.__doc__)(found)
    return typer.main.get_command(single)


app = typer.Typer(
    cls=CommandTable,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback()
def main() -> None:
    """Exact dilated attention (LongNet) for PyTorch.

    Exit codes: 0 done, 1 the machine failed (a full disk, too little memory), 2 wrong input, 130 interrupted.
    """
