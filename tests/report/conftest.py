"""Run folders for the report: written by hand with TensorBoard's writer, and one by a real, resumed `mhf fit`."""

import importlib.util
import os
import sys
import sysconfig
from pathlib import Path

import pytest
from forked import mhf

from mhf_lightning.data.prepare import prepare

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "docs"))  # the script that makes the README's pictures


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A run of 8 steps, continued to 12: two event files, one restart."""
    folder = tmp_path_factory.mktemp("report")
    inputs = [str(path) for path in sorted((Path(sysconfig.get_path("stdlib")) / "json").glob("*.py"))]
    prepare(inputs, str(folder / "data"), context_length=16, vocab_size=300, validation_fraction=0.2, num_workers=1)
    args = [
        *("fit", "--config", str(ROOT / "configs/model/flash_mhf.yaml")),
        *("--config", str(ROOT / "configs/trainer/cpu.yaml")),
        *("--model.decoder.vocab_size", "300", "--model.decoder.d_model", "64", "--model.decoder.num_layers", "2"),
        *("--model.decoder.ffn.d_e", "32", "--trainer.limit_val_batches", "3", "--trainer.val_check_interval", "4"),
        *("--trainer.log_every_n_steps", "1", "--checkpoint.every_n_steps", "4", "--model.schedule.warmup_steps", "2"),
        *("--data.path", str(folder / "data"), "--data.micro_batch_size", "4", "--run_dir", str(folder / "runs/real")),
        *("--ckpt_path", "auto"),
    ]
    mhf(*args, "--trainer.max_steps", "8")
    mhf(*args, "--trainer.max_steps", "12")
    return folder / "runs/real"


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium; closed with the module, since other tests cannot run an event loop beside playwright's."""
    import screenshots

    missing = [] if screenshots.find_chromium() else ["Chromium or Chrome in the PATH"]
    missing += [] if importlib.util.find_spec("playwright") else ["the package playwright"]
    if missing:
        reason = f"the tests of the pages need {' and '.join(missing)}"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    with screenshots.chromium() as browser:
        yield browser


@pytest.fixture
def page(browser):
    """A page at 1280 pixels. Requests that leave this machine are stopped; they and errors on the console fail."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(120_000)  # the machine may be busy
    failures: list[str] = []

    def only_here(route) -> None:
        url = route.request.url
        if url.startswith(("file://", "http://127.0.0.1:", "data:", "blob:")):
            route.continue_()
        else:
            failures.append(f"request to {url}")
            route.abort()

    page.route("**/*", only_here)
    page.on("console", lambda message: failures.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: failures.append(str(error)))
    yield page
    page.close()
    assert failures == []
