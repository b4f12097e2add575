"""The `flashcore` command: a table of commands, each a module whose `main(argv)` parses its own options.

Every module in the table also runs by itself (`python -m flashcore.benchmark.expert_validation`), so its options are
declared there, once. Typer adds the overview and the spelling hints; it belongs to the `bench` extra, so `info`, which
a bug report needs most where an installation is broken, goes around it.
"""

# No `from __future__ import annotations`: Typer reads the annotations of functions that are made after it is loaded.
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from flashcore import diagnostics

if TYPE_CHECKING:
    import typer

COMMANDS: dict[str, tuple[str, str]] = {  # name -> the module, what the overview says
    "info": ("flashcore.diagnostics", "What a bug report needs: GPU, driver, versions, and which kernels run here."),
    "validate": ("flashcore.benchmark.expert_validation", "Is attention correct here, and how fast is it?"),
    "bench": ("flashcore.benchmark.bench", "How fast is it beside the other libraries, on your shapes?"),
    "compare": ("flashcore.benchmark.compare", "Two results files side by side: what got faster or slower?"),
    "submit-results": ("flashcore.benchmark.submit", "One file of what was measured on your GPU, for an issue."),
    "audit": ("flashcore.security.audit", "Does what the kernels execute depend on the data? Reads machine code."),
    "tune": ("flashcore.benchmark.sweep", "Measure which tile is fastest for each problem, and write the table."),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0 = fine, 2 = misused or the `bench` extra is missing."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["info"]:
        return diagnostics.main(args[1:])
    try:
        app = _app()
    except ModuleNotFoundError as missing:
        print(
            f"flashcore: this needs {missing.name}, which the bench extra installs: pip install 'flashcore-attn[bench]'"
            "\n`flashcore info` works without it.",
            file=sys.stderr,
        )
        return 2
    app(args, prog_name="flashcore")  # ends in SystemExit with the command's status
    return 0


def _app() -> "typer.Typer":
    import typer

    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,  # a traceback that can be pasted into a bug report
        help="Attention kernels for NVIDIA GPUs: short sequences, low latency.",
    )
    # A command's own --help and options reach its main untouched.
    untouched = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

    def command(module: str) -> Callable[[typer.Context], None]:
        def run(context: typer.Context) -> None:
            raise typer.Exit(import_module(module).main(context.args))

        return run

    for name, (module, summary) in COMMANDS.items():
        app.command(name, help=summary, context_settings=untouched)(command(module))
    return app
