"""What looks like a secret, taken out of texts that are kept or published. Imports neither torch nor Lightning."""

from __future__ import annotations

import re
from typing import Any

import yaml

REDACTED = "(redacted)"
_SECRET_NAME = re.compile(
    r"(^|[_\W])(token|key|secret|passw(or)?d|passphrase|pwd|credentials?|auth|authorization|cookie|pat)$", re.I
)
_PUBLIC_NAME = re.compile(r"(^|_)((bos|eos|pad|unk)_token|text_key)$")  # of tokenizers and corpora
_REFERENCE = re.compile(r"\$\{[^{},]+\}")  # of OmegaConf, without a default
_SECRET_VALUE = re.compile(
    r"\b(hf_|gh[pousr]_|github_pat_|glpat-|sk-|xox[a-z]-)[\w-]{12,}"  # Hugging Face, GitHub, GitLab, OpenAI, Slack
    r"|\bAKIA[0-9A-Z]{12,}"  # Amazon
    r"|\beyJ[\w-]{8,}\.[\w.-]+"  # a JSON web token
    r"|(?<=://)(?![^/\s@]*\$\{)[^/\s@]+@"  # user and password of an address
    r"|\b(?i:authorization)\b[\"']?\s*[:=](?!\s*((Bearer|Basic)\s+)?\$\{).+"  # a header as one text
    r"|\bBearer\s+(?!\$\{)\S+"
    r"|(?<![/\w])(?=\w*\d)(?=\w*[A-Za-z])[A-Za-z0-9+]{32,}={0,2}"  # any long key; part of a path is a hash more likely
)


def redact(name: str, value: str) -> str:
    """Return a value without what looks like a secret; nothing of it where the name says that it is one.

    What refers to a variable (``${oc.env:NAME}``) is no secret, and stays.
    """
    if not _names_a_secret(name):
        return _SECRET_VALUE.sub(REDACTED, value)
    literal, references = _REFERENCE.subn("", value)
    return value if references and literal.strip() in ("", "Bearer", "Basic") else REDACTED


def redact_tree(tree: Any) -> tuple[Any, list[str]]:
    """Redact mappings and lists of plain values; all that stands below a secret's name is secret.

    Returns:
        The tree, and the dotted keys of what was redacted.
    """
    keys: list[str] = []

    def redacted(value: Any, path: tuple[str, ...], name: str) -> Any:
        if isinstance(value, dict):
            below = name if _names_a_secret(name) else None
            return {key: redacted(v, (*path, str(key)), below or str(key)) for key, v in value.items()}
        if isinstance(value, list):
            return [redacted(v, (*path, str(i)), name) for i, v in enumerate(value)]
        if value is None or isinstance(value, bool):
            return value
        shown = redact(name, str(value))
        if shown == str(value):
            return value
        keys.append(".".join(path))
        return shown

    return redacted(tree, (), ""), keys


def redact_yaml(text: str) -> str:
    """Redact a YAML document."""
    return yaml.safe_dump(redact_tree(yaml.safe_load(text))[0], sort_keys=False, allow_unicode=True)


def _names_a_secret(name: str) -> bool:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)  # apiKey
    return bool(_SECRET_NAME.search(words)) and not _PUBLIC_NAME.search(words)
