"""The pictures of the panel, from real runs on CPU cores in JupyterLab: `python docs/screenshots.py`.

Needs the extra `browser` and a `chromium`. Writes docs/panel_{light,dark,finished,failed,comparison}.png.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Locator

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from tests.browser.lab import jupyterlab  # noqa: E402

EXPERIMENT = """
import collie_lab as lab
exp = lab.Experiment(
    name="skills",
    model=lab.Model("llama-1m", init="random"),
    data=lab.Skills(tasks=("copy", "first", "next", "repeat"), size=20_000, packing=True, max_length=256),
    optimizer=lab.AdamW(lr=4e-3, weight_decay=0.01, betas=(0.9, 0.99)),
    parallel=lab.Parallel(dp=2),
    training=lab.Training(steps=400, batch_size=4, schedule="cosine", warmup=0.1, final_lr=0.1, clip_grad_norm=1.0),
    evaluate=[lab.Perplexity(every=80)],
)
"""
RUN = "run = exp.launch(wait=False)"
FAILS = """
def probe(trainer):
    if trainer.step == 60 and trainer.rank == 1:
        scores = {"copy": 0.5}
        print(scores["uppercase"])

exp.replace(callbacks=(probe,)).launch()
"""
COMPARISON = """
short = exp.with_("training.steps", 150)
optimizers = {"adamw": exp.optimizer, "lion": lab.Lion(lr=6e-4), "adalomo": lab.AdaLomo(lr=2e-2)}
runs = [short.replace(name=name, optimizer=optimizer).launch(show=False) for name, optimizer in optimizers.items()]
lab.compare(runs, labels=list(optimizers))
"""


def main() -> None:
    """Take all pictures."""
    with jupyterlab(scale=2) as lab:
        notebook = lab.open("panel.ipynb", EXPERIMENT, RUN)
        notebook.run_cell(0)
        notebook.run_cell(1)
        notebook.until("/step (2[4-9]|3).\\d\\//.test(document.querySelector('.collie')?.textContent)", seconds=600)
        for theme in ("Light", "Dark"):
            notebook.theme(theme)
            save(notebook.outputs.first, f"panel_{theme.lower()}")
        notebook.theme("Light")
        notebook.until("document.querySelector('.collie').textContent.includes('took')", seconds=600)
        save(notebook.outputs.first, "panel_finished")

        notebook = lab.open("failed.ipynb", EXPERIMENT, FAILS)
        notebook.run_all()
        notebook.until_idle(seconds=600)
        save(notebook.outputs.first, "panel_failed")

        notebook = lab.open("comparison.ipynb", EXPERIMENT, COMPARISON)
        notebook.run_all()
        notebook.until_idle(seconds=1200)
        save(notebook.outputs.first, "panel_comparison")


def save(output: Locator, name: str) -> None:
    """Write what the output shows as a small PNG."""
    output.scroll_into_view_if_needed()
    picture = Image.open(io.BytesIO(output.screenshot())).convert("RGB")
    path = HERE / f"{name}.png"
    picture.quantize(128, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.relative_to(HERE.parent)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
