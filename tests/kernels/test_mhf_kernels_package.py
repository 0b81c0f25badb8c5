"""The package as a whole: what it imports, what it installs, and that its README tells the truth."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

from extras import need

KERNELS = Path(__file__).parents[2] / "kernels"


def test_a_fresh_import_loads_no_lightning():
    code = (
        "import sys, mhf_kernels; "
        "print([m for m in ('lightning', 'pytorch_lightning', 'mhf_lightning') if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.strip() == "[]"


def test_sources_import_torch_and_the_standard_library_only():
    allowed = {"torch", "triton", "mhf_kernels"} | sys.stdlib_module_names
    sources = list((KERNELS / "mhf_kernels").rglob("*.py"))
    assert sources
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "mhf_kernels"]
            assert {name.split(".")[0] for name in names} <= allowed, source


def test_no_package_named_kernels_is_installed():
    """The name belongs to another distribution, which transformers imports where it is there."""
    assert "mhf-lightning" not in importlib.metadata.packages_distributions().get("kernels", [])
    spec = importlib.util.find_spec("kernels")  # a folder in the working directory is seen as a namespace at most
    assert spec is None or spec.origin is None


def examples_of_the_readme() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (KERNELS / "README.md").read_text(), flags=re.S)


def test_the_example_with_a_model_that_exists_runs():
    need("transformers")
    scope: dict = {}
    exec(examples_of_the_readme()[1], scope)
    assert type(scope["model"].model.layers[0].mlp).__name__ == "FlashMHF"


def test_the_example_of_the_readme_runs():
    example, _ = examples_of_the_readme()
    assert len(example.strip().splitlines()) <= 12
    result = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "torch.Size([2, 128, 512]) torch.Size([8, 8, 192, 64])",
        "torch.bfloat16",
    ]


def test_the_readme_names_every_file():
    readme = (KERNELS / "README.md").read_text()
    for source in (KERNELS / "mhf_kernels").glob("*.py"):
        assert source.name == "__init__.py" or f"`{source.name}`" in readme, source.name
