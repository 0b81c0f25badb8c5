"""Every config file parses, is commented, builds, and stands in the table of sizes with its true count."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import yaml

from mhf_lightning.model import Decoder, DecoderConfig, count_parameters

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
MODELS = sorted((CONFIGS / "model").glob("*.yaml"))
PAPER_MODELS = [path for path in sorted((CONFIGS / "paper").rglob("*.yaml")) if path.stem != "recipe"]


def load_size_table():
    spec = importlib.util.spec_from_file_location("size_table", CONFIGS / "size_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_key_has_a_comment(path):
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        if re.match(r"\s*[a-z_0-9]+:", line):
            above = lines[number - 1].strip() if number else ""
            assert re.search(r"\S\s+# \S+", line) or above.startswith("# "), f"{path}:{number + 1}: {line}"


def fit_parser():
    from lightning.pytorch import Trainer
    from lightning.pytorch.cli import LightningArgumentParser

    from mhf_lightning.callbacks import MonitorConfig
    from mhf_lightning.callbacks.checkpoint import CheckpointConfig
    from mhf_lightning.data.datamodule import TokenDataModule
    from mhf_lightning.training.module import PretrainModule

    parser = LightningArgumentParser(parser_mode="omegaconf+", exit_on_error=False)
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.add_lightning_class_args(PretrainModule, "model")
    parser.add_lightning_class_args(TokenDataModule, "data")
    parser.add_class_arguments(CheckpointConfig, "checkpoint")
    parser.add_class_arguments(MonitorConfig, "monitor")
    for key, type_, default in (
        ("run_dir", str, "x"),
        ("sample_prompt", str | None, None),
        ("seed_everything", int, 1),
    ):
        parser.add_argument(f"--{key}", type=type_, default=default)
    return parser


@pytest.fixture(scope="module")
def parser():
    return fit_parser()


def deep_merge(base: dict, extra: dict) -> dict:
    for key, value in extra.items():
        base[key] = deep_merge(base.get(key) or {}, value) if isinstance(value, dict) else value
    return base


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if path.name != "quickstart_data.yaml"],
    ids=lambda path: str(path.relative_to(CONFIGS)),
)
def test_every_file_parses(path, parser):
    """Alone where it names a model, else on top of a model and the datamodule's file, as it is meant to be used."""
    base = {}
    for name in ("model/flash_mhf.yaml", "data/default.yaml"):
        deep_merge(base, yaml.safe_load((CONFIGS / name).read_text()))
    own = yaml.safe_load(path.read_text())
    if "ffn" in own.get("model", {}).get("decoder", {}):
        base["model"] = {}
    parser.parse_object(deep_merge(base, own))


def test_an_unknown_key_is_refused(parser):
    own = yaml.safe_load((CONFIGS / "model/flash_mhf.yaml").read_text())
    own["model"]["decoder"]["d_modell"] = 3
    with pytest.raises(Exception, match="d_modell"):
        parser.parse_object(own)


@pytest.mark.parametrize("path", PAPER_MODELS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_paper_models_keep_the_released_initialisation(path):
    assert load_size_table().decoder_config(path).initialization == "paper"


def test_small_models_match_each_other_within_three_percent():
    table = load_size_table()
    counts = {path.stem: table.count(table.decoder_config(path))[1] for path in MODELS}
    assert len(counts) == 6
    for name, count in counts.items():
        assert abs(count / counts["swiglu"] - 1) <= table.TOLERANCE, (name, count, counts["swiglu"])


def test_the_table_of_sizes_is_what_the_configs_give():
    assert (CONFIGS / "paper/SIZES.md").read_text() == load_size_table().table(), "run `make sizes`"


def test_the_table_counts_the_paper_s_models_right():
    """SwiGLU at 128M by hand: 12 layers of attention, FFN and two norms, a final norm, a tied embedding."""
    config = load_size_table().decoder_config(CONFIGS / "paper/128m/swiglu.yaml")
    with torch.device("meta"):
        count = count_parameters(Decoder(config))
    layers = 12 * (4 * 768**2 + 3 * 768 * 2048 + 2 * 768) + 768
    assert count == (layers + 50432 * 768, layers)


def test_defaults_in_comments_are_the_code_s_defaults():
    """Each 'default X' in a comment of a model file is DecoderConfig's or FFNConfig's."""
    defaults = {**vars(DecoderConfig()), **vars(DecoderConfig().ffn)}
    seen = 0
    for path in MODELS:
        for line in path.read_text().splitlines():
            match = re.match(r"\s*([a-z_]+):.*default (\S+)", line)
            if match:
                seen += 1
                default = defaults[match[1]]
                shown = {None: "null", True: "true", False: "false"}.get(default, str(default))
                assert match[2] == shown, f"{path}: {line}"
    assert seen > 50
