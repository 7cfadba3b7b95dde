"""What the scripts here do after their arguments are read."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils import logging

from dsvae.errors import UserError
from dsvae.files import write_json

Results = dict[str, Any]


def run(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    measure: Callable[[argparse.Namespace], Results],
    report: Callable[[Results], str],
) -> None:
    """Measures, writes the results to `args.output` if it is set, and prints the report."""
    logging.disable_progress_bar()
    try:
        results = measure(args)
    except UserError as problem:
        parser.error(str(problem))
    if args.output:
        write_json(Path(args.output), results)
    print(report(results))
