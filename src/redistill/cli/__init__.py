"""The command line: the commands in the order in which `--help` shows them, and how a failure is said.

Each command imports what it needs when it runs, so that `--help` is there at once.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings

import typer

from redistill import ranks
from redistill.cli.measuring import compare, compare_run, evaluate, judge, revise
from redistill.cli.memory import keep_freed_memory
from redistill.cli.showing import play, report, watch
from redistill.cli.training import cache_teacher, demo, estimate, export, profile, prune, train

app = typer.Typer(
    name="redistill",
    help="Distil a large language model into a small one, and revise what the student writes on the way.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

for command in (
    demo,
    train,
    cache_teacher,
    estimate,
    profile,
    prune,
    evaluate,
    judge,
    compare,
    report,
    watch,
    revise,
    play,
    export,
):
    app.command()(command)
app.command(hidden=True)(compare_run)


@app.callback()
def _in_one_process(context: typer.Context) -> None:
    name = context.invoked_subcommand
    if ranks.size() > 1 and name != "train":
        raise ValueError(
            f"only `redistill train` runs in several processes: call `redistill {name}` without the launcher."
        )


def _quiet() -> None:
    """Libraries speak through our own lines; their progress bars and notices would bury them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if ranks.size() > 1:
        # DDP warns that it looked for unused parameters in vain; the engine tells it to look.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # The engine's own option, which it will rename in its next major version; nothing a user can mend here.
    warnings.filterwarnings("ignore", message=".*activation_checkpointing.*", category=FutureWarning)
    # torchao, where it is installed, is imported by the engine and speaks of kernels for other machines.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # What the engine says when it pushes and finds the bars off already.
    warnings.filterwarnings("ignore", message="Cannot enable progress bars", category=UserWarning)


class _OnlyText(logging.Formatter):
    """Warnings name files and quote records: what a terminal would obey in them is left out."""

    def format(self, record: logging.LogRecord) -> str:
        return _plain(super().format(record))


def _speak() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_OnlyText())
    logging.getLogger("redistill").addHandler(handler)


def main() -> None:
    """Run the command line; what a user can mend is one sentence on stderr, never a traceback."""
    _quiet()
    _speak()
    keep_freed_memory()
    try:
        app()
    except ValueError as problem:
        _fail(str(problem), 2)
    except (KeyboardInterrupt, SystemExit) as end:
        if not _interrupted(end):
            raise
        _fail("stopped; what was saved before goes on with the same command", 130)
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _fail(f"the disk is full ({problem.filename or 'while saving'}): what was saved before is whole; "
              "make room and run the same command again", 74)  # fmt: skip
    except RuntimeError as problem:
        if type(problem).__name__ not in ("NotFinite", "OutOfMemory", "LostRank"):
            raise
        _fail(str(problem), 1)


def _interrupted(end: BaseException | None) -> bool:
    """Whether it comes from Ctrl-C, of which typer makes an exit without a word."""
    return end is not None and (isinstance(end, KeyboardInterrupt) or _interrupted(end.__context__))


def _plain(text: str) -> str:
    from redistill.console.plain import plain_text

    return plain_text(text)


def _fail(message: str, code: int) -> None:
    if ranks.is_first_to_fail():
        print(_plain(f"redistill: {message}"), file=sys.stderr)
    raise SystemExit(code)
