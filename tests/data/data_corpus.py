"""What the data tests share besides fixtures."""

import json
from pathlib import Path

CONTEXT_LENGTH = 64


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), encoding="utf-8")
    return path
