"""The command lines' parser: no abbreviated options, unknown ones answered with the nearest, imports only of ours."""

import argparse
import difflib
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings
from omegaconf import DictConfig, OmegaConf
from omegaconf.resolvers import oc

# What a value of a config (``class_path``, a callable) may name. Checked before anything is imported.
IMPORTABLE = ("mhf_lightning", "lightning.pytorch", "torch.optim")


class SuggestingParser(ArgumentParser):
    """jsonargparse's parser, in which a mistyped key is never taken for another one, and its nearest is named."""

    _config_file: Any = None  # that is being read

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Parse a config file; of several, what is wrong names the one."""
        self._config_file = path
        try:
            return super().parse_path(path, *args, **kwargs)
        finally:
            self._config_file = None

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Report an error, with the nearest option where one is unknown, and exit with code 2."""
        unknown = re.search(r"does not accept option '([^']+)'|[Uu]nrecognized arguments: --([^\s=]+)", message)
        if unknown:
            near = difflib.get_close_matches(unknown[1] or unknown[2], self._known_options(), n=1)
            message += f"; did you mean '{near[0]}'?" if near else ""
        if denied := re.search(r"Importing '([^']+)' is not allowed", message):
            message = (
                f"a config names {denied[1]}, which is under none of the packages that configs may import from "
                f"({', '.join(IMPORTABLE)}). If you trust it, add --allow-import {denied[1].rpartition('.')[0]}"
            )
        if message.startswith("Unexpected config: "):
            message = "is empty, or no mapping of options to values"
        if self._config_file is not None:
            message = f"{self._config_file}: {message}"
        super().error(message, ex)

    def _known_options(self) -> list[str]:
        parsers: list[Any] = [self]
        for parser in parsers:  # grows while it is walked: subcommands of subcommands too
            for action in parser._actions:
                if isinstance(action.choices, dict):
                    parsers += [p for p in action.choices.values() if isinstance(p, ArgumentParser)]
        return [option[2:] for parser in parsers for option in parser._option_string_actions if option.startswith("--")]


def take_allowed_imports(args: list[str]) -> list[str]:
    """Let configs import from ``IMPORTABLE`` and from what ``--allow-import`` names; return the other arguments.

    The option is taken from the command line alone: a config cannot allow anything to itself.

    Raises:
        ValueError: The option's value is no dotted name.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--allow-import", action="append", default=[], metavar="PREFIX")
    allowed, others = parser.parse_known_args(args)
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[*IMPORTABLE, *allowed.allow_import])
    return others


@contextmanager
def environment_references() -> Iterator[dict[Any, Any]]:
    """Find what a parse takes from environment variables.

    Yields:
        A mapping that is filled when the parse is done: shaped like the configuration (indices are the keys of a list),
        it holds the values that depend on ``${oc.env:NAME}``, directly or by another key, as they were written.
    """
    found: dict[Any, Any] = {}
    asked = 0
    unresolved: Any = None

    def env(*arguments: Any, _root_: DictConfig) -> Any:
        nonlocal asked, unresolved
        asked += 1
        if unresolved is None:  # later, OmegaConf has replaced some of it
            unresolved = OmegaConf.create(OmegaConf.to_container(_root_, resolve=False))
        return oc.env(*arguments)

    def references(raw: Any, config: Any) -> dict[Any, Any]:
        below: dict[Any, Any] = {}
        for key, value in raw.items() if isinstance(raw, dict) else enumerate(raw):
            if isinstance(value, dict | list):
                below[key] = references(value, config[key])
            elif isinstance(value, str) and "${" in value:
                before = asked
                if OmegaConf.is_config(target := config[key]):
                    OmegaConf.to_container(target, resolve=True)
                below[key] = value if asked > before else {}
        return {key: reference for key, reference in below.items() if reference}

    _register("oc.env", env)
    try:
        yield found
        if unresolved is not None:
            found |= references(OmegaConf.to_container(unresolved, resolve=False), unresolved)
    finally:
        _register("oc.env", oc.env)


def _register(name: str, resolver: Callable[..., Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer releases have another name for it, which older ones take for another
        OmegaConf.register_new_resolver(name, resolver, replace=True)


def put_references(resolved: Any, references: dict[Any, Any]) -> Any:
    """Return a resolved configuration with the values of :func:`environment_references` as they were written."""
    changed = resolved.copy()
    for key, reference in references.items():
        changed[key] = put_references(changed[key], reference) if isinstance(reference, dict) else reference
    return changed
