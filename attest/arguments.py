"""Command lines whose errors are one sentence, as all other errors are, and no page of usage."""

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from attest.document import DocumentError

_NUMBER = re.compile(r"-|-\d+|-\d*\.\d+")  # as argparse has it, or standard input


class Parser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` that raises DocumentError for a wrong command line, and names the nearest option."""

    def error(self, message: str) -> NoReturn:
        what = message.removeprefix("argument ").replace("not allowed with argument", "not allowed with")
        missing = what.removeprefix("the following arguments are required: ")
        raise DocumentError(what if missing == what else f"{missing} missing: see {self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As its parent's, but nothing unknown is left. No error quotes what may be a prompt or a key."""
        words = sys.argv[1:] if args is None else list(args)
        self._check_names(words)
        options, extra = super().parse_known_args(words, namespace)
        if extra:
            taken = " ".join(str(each.metavar) for each in self._get_positional_actions())
            count = f"{len(extra)} word{'s' if len(extra) > 1 else ''}"
            self.error(
                f"got {count} after {taken}: what has spaces needs quotes, as in {self.prog} 'one two'"
                if taken
                else f"got {count}, wanted options only: see {self.prog} --help"
            )
        return options, extra

    def _check_names(self, words: Sequence[str]) -> None:
        """Refuses an option that there is not: before its parent says that the right one is missing."""
        for word in words:
            name = word.partition("=")[0]
            known = {name, word[:2].removesuffix("--")} & self._option_string_actions.keys()  # -oFILE is -o FILE
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                return  # what follows is no option, or one of the command
            if word.startswith("-") and " " not in word and not _NUMBER.fullmatch(word) and not known:
                near = nearest(name, self._option_string_actions)
                hint = f"did you mean {near}?" if near else f"see {self.prog} --help"
                self.error(f"{name[:60]}: there is no such option: {hint}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = list(map(str, action.choices))
            near = nearest(str(value), choices)
            hint = f"did you mean {near}?" if near else f"wanted {', '.join(choices)}"
            raise argparse.ArgumentError(action, f"got {str(value)[:60]!r}: {hint}")


def nearest(word: str, words: Sequence[str] | dict[str, Any]) -> str | None:
    """The word that was probably meant, if one is near."""
    longer = [each for each in words if len(word.strip("-")) > 2 and each.startswith(word)]
    return next(iter(longer or difflib.get_close_matches(word, list(words), 1)), None)
