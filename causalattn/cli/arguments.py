"""What the commands share: argument types, and a parser whose errors read as all ours do."""

import argparse
import sys
from typing import NoReturn

from ..console import CommandError


class Parser(argparse.ArgumentParser):
    """argparse whose errors read as all our errors do."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        raise CommandError(message)


def numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 0,5, got {text!r}") from None


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1, got {text!r}")
    return int(text)
