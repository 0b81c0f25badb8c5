"""Make the README's pictures: `python docs/screenshots.py RUN [RUN ...]` writes report.png and tensorboard.png.

Draws `mhf report`, and a TensorBoard that it starts and ends, in a headless Chromium. Needs playwright
(`pip install playwright`), and Chromium in the PATH or from `playwright install chromium`.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mhf_lightning.callbacks.summary import tensorboard_command
from mhf_lightning.report.page import render
from mhf_lightning.report.results import load

if TYPE_CHECKING:
    from playwright.sync_api import Browser

WIDTH = 1280
CARDS = ("train/loss", "val/perplexity", "throughput/tokens_per_s_average", "memory/peak_gib")
START_SECONDS = 180.0


@contextmanager
def tensorboard(logdir: Path) -> Iterator[str]:
    """Start the command that `mhf fit` prints, on a free port of this machine; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [*tensorboard_command(logdir), "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                with urllib.request.urlopen(f"{address}/data/runs", timeout=5) as reply:
                    if reply.read() != b"[]":  # it has read the event files
                        break
            except OSError:
                pass
            if server.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"TensorBoard does not answer at {address}, or finds no run in {logdir}")
            time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait()


def find_chromium() -> str | None:
    """Return the system's Chromium or Chrome; None without."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start a headless Chromium: the system's, else playwright's."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        yield browser
        browser.close()


def link_runs(runs: list[Path], logdir: Path) -> None:
    """Put links to runs into a folder, named by their paths below what these have in common.

    The links are to their event files, so that TensorBoard calls them by these names.
    """
    folders = [run.resolve() for run in runs]
    common = os.path.commonpath([folder.parent for folder in folders])
    logdir.mkdir()
    for folder in folders:
        (logdir / "-".join(folder.relative_to(common).parts)).symlink_to(folder / "tensorboard")


def photograph_report(browser: Browser, runs: list[Path], folder: Path, image: Path) -> None:
    """Draw the report's table, curves and bars."""
    path = folder / "report.html"
    path.write_text(render(load(runs)), encoding="utf-8")
    page = browser.new_page(viewport={"width": WIDTH, "height": 1340})
    page.goto(path.as_uri())
    page.locator("#bars .main-svg").first.wait_for()
    page.screenshot(path=image)


def photograph_tensorboard(browser: Browser, runs: list[Path], folder: Path, image: Path) -> None:
    """Draw four of TensorBoard's cards."""
    logdir = folder / "runs"
    link_runs(runs, logdir)
    with tensorboard(logdir) as address:
        page = browser.new_page(viewport={"width": WIDTH, "height": 1040})
        pattern = "|".join(f"^{re.escape(tag)}$" for tag in CARDS)
        page.goto(f"{address}/?tagFilter={pattern}&smoothing=0#timeseries")
        page.get_by_role("button", name="Settings").click()  # closes the pane, and gives the cards its place
        for tag in CARDS:
            page.get_by_text(tag, exact=True).first.wait_for()
        page.wait_for_timeout(2000)  # the lines of the charts fade in
        page.screenshot(path=image)


def main() -> None:
    """Make both pictures; those that are there are replaced."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, metavar="DIR")
    args = parser.parse_args()
    with chromium() as browser, tempfile.TemporaryDirectory() as folder:
        photograph_report(browser, args.runs, Path(folder), args.output / "report.png")
        photograph_tensorboard(browser, args.runs, Path(folder), args.output / "tensorboard.png")
    print(f"wrote {args.output / 'report.png'} and {args.output / 'tensorboard.png'}")


if __name__ == "__main__":
    main()
