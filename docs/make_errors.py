"""Writes docs/errors.md, every sentence that redistill can say: `python docs/make_errors.py`.

The sentences are read from the source (the syntax tree, nothing is run), so a new one is on the page as soon as it is
in the code. A value stands as `<name>`, after the variable that it comes from.
"""

from __future__ import annotations

import ast
import itertools
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from redistill.config import ConfigError, load_config

SRC = Path(__file__).parents[1] / "src" / "redistill"
TARGET = Path(__file__).with_name("errors.md")
HEADER = """\
# Every message

This page is generated from the code: after changing a message run `python docs/make_errors.py`.

Each sentence that redistill can say is here, so that a search finds it. Search for some of its words, without
your own names, numbers and paths: in their places stands `<what it is>`. What to do is in the sentence itself.

| exit status | what it means |
| --- | --- |
| 0 | done |
| 1 | three steps in a row were not finite, or a run of a comparison failed |
| 2 | something in the recipe, the data, the models or the options is to be mended; the sentence says what |
| 74 | the disk is full; the same command goes on when there is room |
| 130 | stopped by Ctrl-C or SIGTERM; the same command goes on |

A message begins with `redistill:` and goes to standard error. A Python traceback in its place is a fault of ours.

## A recipe that is refused

The smallest recipe with one of these lines in it:

"""
# Sections as somebody might write them, each laid over the smallest recipe.
REFUSED = (
    "rollout: {lambda: 0.5}",
    "rollout: {lmbda: 1.5}",
    "rollout: {lmbda: half}",
    "rollout: {schedule: adaptive}",
    "revision: {rounds: 1.5}",
    "objective: {token_loss: foward_kl}",
    "objective: 3",
    "student: {model_name_or_path: small, prune: {keep: 2}}",
    "distill: {lmbda: 0.5}",
    "training: {learning_rte: 1.0e-5}",
)
SMALLEST = (
    "teacher: {model_name_or_path: large}",
    "student: {model_name_or_path: small}",
    "data: {path: train.jsonl}",
)
# Functions that are named after what they are given.
PLAIN = {
    "dict",
    "get",
    "get_args",
    "int",
    "keys",
    "list",
    "map",
    "max",
    "min",
    "repr",
    "round",
    "rstrip",
    "set",
}
PLAIN |= {"sorted", "splitlines", "str", "strip", "sum", "tuple", "type", "values"}


def render() -> str:
    """The whole page."""
    parts = [HEADER, "\n".join(_refused()) + "\n"]
    for path in sorted(SRC.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if found := dict.fromkeys(_messages(tree)):
            about = (ast.get_docstring(tree) or "").partition("\n")[0]
            listed = "\n".join(f"- {message}" for message in found)
            parts.append(f"## `{path.relative_to(SRC).as_posix()}`\n\n{about}\n\n{listed}\n")
    return "\n".join(parts)


def _refused() -> Iterator[str]:
    """What `load_config` says of the smallest recipe with one of its sections written wrongly."""
    yield "| in the recipe | what is said |\n| --- | --- |"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "my.yaml"
        for line in REFUSED:
            others = [kept for kept in SMALLEST if kept.partition(":")[0] != line.partition(":")[0]]
            path.write_text("\n".join((*others, line)), encoding="utf-8")
            try:
                load_config(path)
            except ConfigError as error:
                said = str(error).replace(str(path), "my.yaml").replace("|", "\\|")
                yield f"| `{line}` | {said} |"


def _messages(tree: ast.Module) -> Iterator[str]:
    """The sentences of a file, in its order."""
    for node, least in _texts(tree, 4):
        for template in _templates(node):
            said = re.sub(r"\0.*?\0", " ", template)
            if len(re.findall(r"(?<![\w.'-])[A-Za-z]{2,}(?![\w='-]|\.\w)", said)) >= least:
                yield _markdown(" ".join(template.split()))


def _markdown(template: str) -> str:
    """A template for the page: what stood between backticks is code already, values become code."""
    parts = template.split("`")
    for place, part in enumerate(parts):
        inside = place % 2 == 1
        escaped = part if inside else re.sub(r"([*\[])", r"\\\1", part.replace("<", "&lt;"))
        parts[place] = re.sub(r"\0(.*?)\0", r"<\1>" if inside else r"`<\1>`", escaped)
    return "`".join(parts).replace("``", "")


def _texts(node: ast.AST, least: int) -> Iterator[tuple[ast.expr, int]]:
    """The texts under `node`, each with the fewest words that make it a message: two in what is raised, yielded or
    logged, four elsewhere. Docstrings, the constants of a module and the help of options are none."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Assert) or (
            isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
        ):
            continue
        if isinstance(node, ast.Module) and isinstance(child, ast.Assign | ast.AnnAssign):
            continue
        called = ast.unparse(child.func) if isinstance(child, ast.Call) else ""
        if called in {"typer.Option", "typer.Argument"}:
            continue
        if called in {"log.info", "log.warning"} and _is_text(child.args[0]):
            yield _filled_in(child.args), 2
        elif isinstance(child, ast.expr) and _is_text(child):
            yield child, least
        else:
            yield from _texts(child, 2 if isinstance(child, ast.Raise | ast.Yield) else least)


def _filled_in(arguments: list[ast.expr]) -> ast.expr:
    """A log call's `"%d of %d", a, b` as the f-string that says the same."""
    pieces = re.split("%[ds]", ast.literal_eval(arguments[0]))
    parts: list[ast.expr] = [ast.Constant(pieces[0])]
    for value, piece in zip(arguments[1:], pieces[1:], strict=True):
        parts += [ast.FormattedValue(value, -1), ast.Constant(piece)]
    return ast.JoinedStr(parts)


def _is_text(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _is_text(node.left) or _is_text(node.right)
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _templates(node: ast.expr) -> list[str]:
    """Every way in which a text can come out; a value is its name between NULs."""
    match node:
        case ast.Constant(value=str(text)):
            found = [text]
        case ast.JoinedStr(values=parts):
            found = _joined(parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            found = _joined([left, right])
        case ast.IfExp(body=yes, orelse=no):
            found = [*_templates(yes), *_templates(no)]
        case ast.FormattedValue(value=ast.IfExp(body=yes) as choice) if _is_text(yes):
            found = _templates(choice)
        case ast.FormattedValue(value=value):
            found = [f"\0{_name(value)}\0"]
        case _:
            found = [f"\0{_name(node)}\0"]
    return found


def _joined(parts: list[ast.expr]) -> list[str]:
    return ["".join(each) for each in itertools.product(*map(_templates, parts))]


def _name(node: ast.expr) -> str:
    """What a value is called: the variable's name, or that of the function of ours that makes it."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "len":
        return f"number of {_name(node.args[0])}"
    if (inner := _named_after(node)) is not None:
        return _name(inner)
    name = getattr(node, "id", getattr(node, "attr", "value"))
    return name.strip("_").replace("_", " ").lower()


def _named_after(node: ast.expr) -> ast.expr | None:
    """The part of an expression that names it; None where it has a name itself."""
    found: ast.expr | None = None
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Constant()), args=[joined]):
            found = joined
        case ast.Call(func=ast.Name(id=name), args=[*_, last]) if name in PLAIN:
            found = last
        case ast.Call(func=ast.Attribute(value=value, attr=name)) if name in PLAIN:
            found = value
        case ast.Call(func=function):
            found = function
        case ast.BinOp(left=ast.Constant(), right=value) | ast.BinOp(left=value):
            found = value
        case (
            ast.Attribute(value=value, attr="__name__")
            | ast.Subscript(value=value)
            | ast.Starred(value=value)
        ):
            found = value
        case ast.BoolOp(values=[value, *_]) | ast.List(elts=[value, *_]) | ast.Tuple(elts=[value, *_]):
            found = value
        case ast.GeneratorExp(generators=[first]) | ast.ListComp(generators=[first]):
            found = first.iter
    return found


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
