"""Counts lines of logic: lines with code that is not a docstring, an import or a raise.

    python tests/benchmarks/lines.py [--files] [DIRECTORY]

Prints the lines of logic and all lines of every folder of a package (dsvae by default),
and with `--files` those of every file. Comments and blank lines are not counted either. A
statement over several lines counts as many.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

_NO_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE),
    *(tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
}


def logic(source: str) -> int:
    """Returns the number of lines of logic in a module's source."""
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            code |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if (is_text and isinstance(node.value.value, str)) or isinstance(
            node, (ast.Import, ast.ImportFrom, ast.Raise)
        ):
            code -= set(range(node.lineno, node.end_lineno + 1))
    return len(code)


def main() -> None:
    """Prints the table."""
    root = Path(__file__).parents[2] / "dsvae"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", nargs="?", type=Path, default=root)
    parser.add_argument("--files", action="store_true")
    given = parser.parse_args()
    counts, lines = Counter(), Counter()
    for path in sorted(given.directory.rglob("*.py")):
        source, place = path.read_text(encoding="utf-8"), path.relative_to(given.directory)
        for name in {str(place) * given.files, f"{place.parent}/", "in all"} - {""}:
            counts[name] += logic(source)
            lines[name] += len(source.splitlines())
    for name in sorted(counts, key=lambda name: (name == "in all", name)):
        print(f"{counts[name]:6,} {lines[name]:6,}  {name}")


if __name__ == "__main__":
    main()
