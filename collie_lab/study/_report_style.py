"""The look of the report: light and dark, on screen and on paper."""

from __future__ import annotations

from typing import Final

from collie_lab.study._markup import CSS
from collie_lab.view.style import COLORS, DARK_COLORS, INK, MUTED

__all__ = ["SCRIPT", "STYLE", "themed"]

#: What colours of a figure become on the page: variables, which have a light and a dark value.
_LIGHT: Final = {**{f"--c{index}": color for index, color in enumerate(COLORS)},
                 "--ink": INK, "--muted": MUTED, "--axis": "#9CA3AF", "--faint": "#E5E7EB", "--paper": "#ffffff"}
_DARK: Final = {**{f"--c{index}": color for index, color in enumerate(DARK_COLORS)},
                "--ink": "#E5E7EB", "--muted": "#A5ADB9", "--axis": "#6B7280", "--faint": "#333A45",
                "--paper": "#161A20"}


def themed(svg: str) -> str:
    """An SVG of matplotlib with the project's colours as the page's variables."""
    for name, color in _LIGHT.items():
        svg = svg.replace(color.lower(), f"var({name})")
    return svg


def _variables(values: dict[str, str]) -> str:
    return ";".join(f"{name}:{value}" for name, value in values.items())


#: Tells the panels of the runs, which follow a notebook's theme, which one the page has.
SCRIPT: Final = """
const dark=matchMedia("(prefers-color-scheme: dark)");
const tell=()=>{document.body.dataset.jpThemeLight=String(!dark.matches)};
dark.addEventListener("change",tell);tell();
""".replace("\n", "")

STYLE: Final = f"""
:root{{color-scheme:light dark;{_variables(_LIGHT)};--page:#F6F7F9;--line:#D9DDE3;--link:#0067A3}}
@media (prefers-color-scheme:dark){{:root{{{_variables(_DARK)};--page:#0E1116;--line:#2B323C;--link:#6CC1F0}}}}
@media print{{:root{{{_variables(_LIGHT)};--page:#fff;--line:#D9DDE3}}nav{{display:none}}}}
""" + """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.6 system-ui,"Segoe UI",Roboto,sans-serif;
 font-variant-numeric:tabular-nums}
main{max-width:960px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:27px;line-height:1.25;margin:0 0 4px;letter-spacing:-.01em}
h2{font-size:18px;margin:38px 0 12px}
h3{font-size:15px;margin:22px 0 6px}
a{color:var(--link)}
p,li{max-width:74ch}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:12.5px}
pre{margin:8px 0;padding:10px 12px;overflow:auto;max-height:420px;border:1px solid var(--line);border-radius:6px}
nav{display:flex;flex-wrap:wrap;gap:2px 18px;margin:16px 0 0;padding:10px 0;border-top:1px solid var(--line);
 border-bottom:1px solid var(--line);font-size:13.5px}
nav a{text-decoration:none}
.quiet{color:var(--muted)}
.badges{display:flex;flex-wrap:wrap;gap:6px;margin:10px 0 0}
.badge{color:#fff;border-radius:10px;padding:0 10px;font-size:12px;font-weight:600;line-height:20px;white-space:nowrap}
.card{background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:14px 18px;margin:12px 0;
 overflow-x:auto}
figure{margin:12px 0}
figure svg{display:block;width:100%;height:auto;max-width:900px;margin:0 auto}
figcaption{font-size:13px;color:var(--muted);margin-top:8px}
table.facts{border-collapse:collapse;font-size:13.5px;width:100%}
table.facts th,table.facts td{padding:5px 12px 5px 0;text-align:left;vertical-align:top;font-weight:400;
 border-top:1px solid var(--line)}
table.facts tr:first-child th,table.facts tr:first-child td{border-top:0}
table.facts th{color:var(--muted);white-space:nowrap}
details{border-top:1px solid var(--line)}
details:last-child{border-bottom:1px solid var(--line)}
summary{cursor:pointer;padding:7px 0;display:flex;gap:10px;align-items:center;flex-wrap:wrap}
summary::before{content:"▸";color:var(--muted);width:10px}
details[open]>summary::before{content:"▾"}
summary .push{margin-left:auto;color:var(--muted);font-size:13px}
details details{margin-left:20px}
""".replace("\n", "") + CSS
