"""The command lines' parser: no abbreviated options, and unknown ones answered with the nearest that exists."""

import difflib
import re
from typing import Any, NoReturn

from jsonargparse import ArgumentParser


class SuggestingParser(ArgumentParser):
    """jsonargparse's parser, in which a mistyped key is never taken for another one, and its nearest is named."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Report an error, with the nearest option where one is unknown, and exit with code 2."""
        unknown = re.search(r"does not accept option '([^']+)'|[Uu]nrecognized arguments: --([^\s=]+)", message)
        if unknown:
            near = difflib.get_close_matches(unknown[1] or unknown[2], self._known_options(), n=1)
            message += f"; did you mean '{near[0]}'?" if near else ""
        super().error(message, ex)

    def _known_options(self) -> list[str]:
        parsers: list[Any] = [self]
        for parser in parsers:  # grows while it is walked: subcommands of subcommands too
            for action in parser._actions:
                if isinstance(action.choices, dict):
                    parsers += [p for p in action.choices.values() if isinstance(p, ArgumentParser)]
        return [option[2:] for parser in parsers for option in parser._option_string_actions if option.startswith("--")]
