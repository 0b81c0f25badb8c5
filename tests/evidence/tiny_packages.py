"""A folder of packages as Python installs them."""

import shutil
import sysconfig
from pathlib import Path

STDLIB = Path(sysconfig.get_path("stdlib"))
CONTEXT_LENGTH = 32


def make_packages(folder: Path) -> None:
    """Real sources under made-up names; ``lightning`` is of the validation side, by its hash."""
    for name, source in {"first": "email", "second": "logging", "lightning": "json"}.items():
        shutil.copytree(STDLIB / source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    shutil.copy(STDLIB / "textwrap.py", folder / "single.py")
    (folder / "first/empty.py").write_text("\n \n")
    (folder / "first/latin.py").write_bytes("name = 'Grüße'\n".encode("latin-1"))
    (folder / "first/large.py").write_text("x = 1\n" * 200_000)
    (folder / "first/notes.txt").write_text("no source\n")
    # Copies: the same but for space, almost the same, and of code that is validated on.
    lines = (STDLIB / "argparse.py").read_text().splitlines()
    (folder / "second/original.py").write_text("\n".join(lines))
    (folder / "second/spaced.py").write_text("\n\n".join(line + "  " for line in lines))
    (folder / "third").mkdir()
    (folder / "third/edited.py").write_text("\n".join(["import something_else", *lines[20:], "print('the end')"]))
    (folder / "third/decoder_of_json.py").write_text((STDLIB / "json/decoder.py").read_text() + "# vendored\n")
