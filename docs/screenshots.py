"""The pictures of the panel, from real runs on CPU cores in JupyterLab: `python docs/screenshots.py`.

Needs the extra `browser`, a `chromium`, and for the preview of data the hub's tokenizer `gpt2`, or a folder that
`COLLIE_LAB_GPT2` names. Writes docs/preview.png and docs/panel_{light,dark,finished,failed,comparison}.png.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from tests.browser.lab import PANEL, Notebook, jupyterlab  # noqa: E402

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
arms = {"adamw": exp.optimizer, "lion": lab.Lion(lr=6e-4), "lomo": lab.Lomo(lr=5e-2, clip_by="previous_norm")}
short = exp.replace(parallel=lab.Parallel(), training=exp.training.replace(steps=200))
runs = [short.replace(name=name, optimizer=optimizer).launch(wait=False, show=False)
        for name, optimizer in arms.items()]
lab.watch(*runs, labels=list(arms))
"""
PREVIEW = """
import os
import collie_lab as lab
lab.Instructions([
    {"instruction": "Name three primary colours of light.", "output": "Red, green and blue."},
    {"instruction": "Mend the program.", "input": "for i in range(3)\\n    print(i)",
     "output": "for i in range(3):\\n    print(i)"},
    {"instruction": "Is a < b, if a = 2 and b = 3?", "output": "Yes: 2 is less than 3, so a < b."},
], holdout=0).preview(lab.Model("llama-1m", init="random", tokenizer=os.environ.get("COLLIE_LAB_GPT2", "gpt2")))
"""

#: CSS pixels around a panel, so that no letter touches the edge; above it is the cell's code.
SIDE, ABOVE, BELOW = 14, 4, 8


def main() -> None:
    """Take all pictures."""
    with jupyterlab(scale=2) as lab:
        notebook = lab.open("preview.ipynb", PREVIEW)
        notebook.run_all()
        notebook.until_panel("less than 3")
        save(notebook, "preview")

        notebook = lab.open("panel.ipynb", EXPERIMENT, RUN)
        notebook.run_all()
        notebook.until_panel(r"step (2[4-9]|3\d)\d/", seconds=600)
        for theme in ("Light", "Dark"):
            notebook.theme(theme)
            save(notebook, f"panel_{theme.lower()}")
        notebook.theme("Light")
        notebook.until_panel("took", seconds=600)
        save(notebook, "panel_finished")

        notebook = lab.open("failed.ipynb", EXPERIMENT, FAILS)
        notebook.run_all()
        notebook.until_idle(seconds=600)
        save(notebook, "panel_failed")

        notebook = lab.open("comparison.ipynb", EXPERIMENT, COMPARISON)
        notebook.run_all()
        notebook.until_panel(r"step 1[4-9]\d/", seconds=600)
        save(notebook, "panel_comparison")


def save(notebook: Notebook, name: str) -> None:
    """Write what the first panel shows as a small PNG."""
    # In one go: a live panel is another element every moment.
    box = notebook.page.evaluate("""(selector) => {
        const panel = document.querySelector(selector);
        panel.scrollIntoView({block: "nearest"});
        return panel.getBoundingClientRect().toJSON();
    }""", PANEL)
    taken = notebook.page.screenshot(clip={
        "x": box["x"] - SIDE, "y": box["y"] - ABOVE,
        "width": box["width"] + 2 * SIDE, "height": box["height"] + ABOVE + BELOW})
    path = HERE / f"{name}.png"
    picture = Image.open(io.BytesIO(taken)).convert("RGB")
    picture.quantize(128, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.relative_to(HERE.parent)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
