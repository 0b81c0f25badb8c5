"""The command line's parser: no abbreviated options, and unknown ones answered with the nearest that exists."""

import difflib
import re
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser


class SuggestingParser(LightningArgumentParser):
    """LightningCLI's parser with ``allow_abbrev`` off: a mistyped key is never taken for another one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Report an error, with the nearest option where one is unknown, and exit with code 2."""
        unknown = re.search(r"does not accept option '([^']+)'|[Uu]nrecognized arguments: --([^\s=]+)", message)
        if unknown:
            name = unknown[1] or unknown[2]
            near = difflib.get_close_matches(name, self._known_options(), n=1)
            message += f"; did you mean '{near[0]}'?" if near else ""
        super().error(message, ex)

    def _known_options(self) -> list[str]:
        parsers: list[Any] = [self]
        for action in self._actions:
            if isinstance(action.choices, dict):
                parsers += [p for p in action.choices.values() if isinstance(p, LightningArgumentParser)]
        return [option[2:] for parser in parsers for option in parser._option_string_actions if option.startswith("--")]
