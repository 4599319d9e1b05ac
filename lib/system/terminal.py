"""Command lines: errors in one line, and values by name."""

from __future__ import annotations

import argparse
import ast

from lib.system.errors import CompanionError


class Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str):
        raise CompanionError(message)


def pair(text: str) -> tuple[str, object]:
    """``NAME=VALUE`` -> name and value; a value that is no Python literal is a text.

    Raises:
        CompanionError: without an equals sign.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise CompanionError(f"expected NAME=VALUE, not {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
