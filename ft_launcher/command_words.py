"""What the commands beside ft_launcher have in common: a mistake is one line, with the nearest right word."""

import argparse
import difflib
from collections.abc import Callable, Sequence
from typing import NoReturn

__all__ = ["Parser", "one_of"]


class Parser(argparse.ArgumentParser):
    """Ends with code 2 and a line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and end."""
        self.exit(2, f"{self.prog}: {message}\n")


def one_of(words: Sequence[str]) -> Callable[[str], str]:
    """Give the type of an argument that is one of these words."""

    def word(text: str) -> str:
        if text in words:
            return text
        near = difflib.get_close_matches(text, words, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise argparse.ArgumentTypeError(f"{text!r} must be one of {', '.join(words)}{hint}")

    return word
