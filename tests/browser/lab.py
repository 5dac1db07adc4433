"""JupyterLab in a headless Chromium, as people have it: a server, its notebooks, what is on the page.

Both listen on the loopback alone, the server with a token. All that they and the runs in them write lies in one
temporary folder, which goes away with them.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal
from unittest import mock

import nbformat
from playwright.sync_api import BrowserContext, Locator, Page, TimeoutError, sync_playwright

from collie_lab.folder import read_json
from collie_lab.rank import die_with_parent
from tests.processes import MARK, marked

__all__ = ["PANEL", "Lab", "Notebook", "jupyterlab"]

_CONTRAST: Final = Path(__file__).with_name("contrast.js").read_text(encoding="utf-8")

#: The panel of a run, or of several; a panel's log is a `.collie` too.
PANEL: Final = ".collie:has(.head, .runs)"

#: The kernel of the notebook that is open.
_KERNEL: Final = "window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel"

#: What an element says, without its style sheet; `innerText` does not know what is scrolled out of sight.
_TEXT: Final = """(element) => {
    const copy = element.cloneNode(true);
    copy.querySelectorAll("style").forEach((sheet) => sheet.remove());
    return copy.textContent;
}"""


class Notebook:
    """A notebook that is open in the browser, with its kernel."""

    def __init__(self, page: Page):
        self.page = page
        self.until(f"{_KERNEL}?.status === 'idle'")

    @property
    def outputs(self) -> Locator:
        """All outputs, first to last."""
        return self.page.locator(".jp-OutputArea-output")

    @property
    def panels(self) -> Locator:
        """The panels of its runs, first to last."""
        return self.outputs.locator(PANEL)

    def texts(self) -> list[str]:
        """What each panel says now."""
        return list(self.page.evaluate(f"[...document.querySelectorAll('{PANEL}')].map({_TEXT})"))

    def record(self) -> None:
        """Keep what the panels say from now on; `self.page.evaluate("said")` gives it in order."""
        self.page.evaluate(f"""() => {{
            window.said = [];
            const record = () => said.push(...[...document.querySelectorAll("{PANEL}")].map({_TEXT}));
            new MutationObserver(record).observe(document.body, {{childList: true, subtree: true}});
        }}""")

    def until_panel(self, pattern: str, seconds: float = 120.0) -> None:
        """Wait for the first panel to say something: a regular expression of JavaScript."""
        self.until(f"new RegExp({json.dumps(pattern)}).test(document.querySelector('{PANEL}')?.textContent)", seconds)

    def command(self, name: str, **arguments: Any) -> None:
        """Begin a command of JupyterLab, such as `notebook:run-all-cells`."""
        self.page.evaluate("([name, args]) => { jupyterapp.commands.execute(name, args) }", [name, arguments])

    def run_all(self) -> None:
        """Begin to run all cells."""
        self.command("notebook:run-all-cells")

    def run_cell(self, number: int) -> None:
        """Begin to run one cell; they count from 0."""
        self.page.evaluate("(n) => { jupyterapp.shell.currentWidget.content.activeCellIndex = n }", number)
        self.command("notebook:run-cell")

    def until(self, condition: str, seconds: float = 120.0) -> None:
        """Wait for a JavaScript expression to be true; `AssertionError` with all outputs where it stays false."""
        try:
            self.page.wait_for_function(condition, timeout=1000 * seconds)
        except TimeoutError:
            outputs = "\n".join(self.outputs.all_inner_texts())
            raise AssertionError(f"not within {seconds:g} s: {condition}\n{outputs or self.page.url}") from None

    def until_idle(self, seconds: float = 120.0) -> None:
        """Wait for the cells that were begun to end."""
        prompts = "[...document.querySelectorAll('.jp-InputPrompt')].map((prompt) => prompt.textContent)"
        self.until(f"{_KERNEL}.status === 'idle' && !{prompts}.includes('[*]:')", seconds)

    def save_and_reload(self) -> None:
        """Save the notebook, open the page anew, and wait for all outputs to be there again."""
        outputs = self.outputs.count()
        self.command("docmanager:save")
        self.until("!jupyterapp.shell.currentWidget.context.model.dirty")
        self.page.reload()
        self.until(f"document.querySelectorAll('.jp-OutputArea-output').length === {outputs}")

    def theme(self, theme: Literal["Light", "Dark"]) -> None:
        """Change the theme of JupyterLab."""
        self.command("apputils:change-theme", theme=f"JupyterLab {theme}")
        self.until(f"document.body.dataset.jpThemeName === 'JupyterLab {theme}'")

    def contrasts(self) -> dict[str, float]:
        """The least contrast of each text of ours with its background: 1 is invisible, 21 black on white."""
        found: dict[str, float] = {}
        # Found and measured in one go: a live panel is another element every moment.
        for item in self.page.evaluate(f"[...document.querySelectorAll('.collie')].flatMap({_CONTRAST})"):
            found[item["text"]] = min(item["ratio"], found.get(item["text"], 21.0))
        return found


class Lab:
    """A JupyterLab server and a browser. `folder` is where its notebooks lie."""

    def __init__(self, folder: Path, url: str, token: str, browser: BrowserContext):
        self.folder, self.url = folder, url
        self._token, self._browser = token, browser

    def open(self, name: str, *cells: str) -> Notebook:
        """Write a notebook of these cells, and open it; without cells, open the one that is there."""
        if cells:
            made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
            made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
            nbformat.write(made, self.folder / name)
        page = self._browser.new_page()
        page.goto(f"{self.url}doc/tree/{name}?token={self._token}")
        return Notebook(page)


@contextmanager
def jupyterlab(scale: float = 1.0) -> Iterator[Lab]:
    """Start both; `scale` is device pixels to a CSS pixel. `AssertionError` where they leave a process or a file."""
    with tempfile.TemporaryDirectory(prefix="lab-") as name:
        home = Path(name)
        places = {key: home / key.lower() for key in (
            "HOME", "TMPDIR", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")}
        for place in (*places.values(), home / "notebooks"):
            place.mkdir()
        token = secrets.token_hex(16)
        # A run ends a moment after its kernel: only then may its folder go.
        with marked(seconds=30) as mark:
            variables = {**{key: str(place) for key, place in places.items()}, "JUPYTER_TOKEN": token, MARK: mark,
                         "TORCHINDUCTOR_CACHE_DIR": str(home / "inductor")}  # torch means to keep it
            with mock.patch.dict(os.environ, variables), _server(home) as url, _browser(scale) as browser:
                yield Lab(home / "notebooks", url, token, browser)
        left = [str(path.relative_to(home)) for path in places["TMPDIR"].rglob("*")]
        assert not left, f"temporary files left behind: {left}"


@contextmanager
def _server(home: Path) -> Iterator[str]:
    settings = home / "jupyter_config_dir/lab/user-settings/@jupyterlab/apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}', encoding="utf-8")
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser",
               "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0", f"--ServerApp.root_dir={home / 'notebooks'}"]
    log = home / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                   preexec_fn=die_with_parent)  # where we are killed ourselves
    try:
        about = home / "jupyter_runtime_dir" / f"jpserver-{process.pid}.json"
        while not (info := read_json(about)):
            assert process.poll() is None, f"JupyterLab did not start:\n{log.read_text(encoding='utf-8')}"
            time.sleep(0.05)
        yield info["url"]
    finally:
        process.terminate()  # it ends its kernels, and these their runs
        process.wait(timeout=60)


@contextmanager
def _browser(scale: float) -> Iterator[BrowserContext]:
    # Chromium refuses its sandbox to root, and in many containers to everybody. It sees our own pages alone.
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser.new_context(viewport={"width": 1100, "height": 1400}, device_scale_factor=scale)
        browser.close()
