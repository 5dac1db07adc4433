"""How the composer looks. Sizes and colours are CSS's, so that they follow the theme of the page around it."""

from __future__ import annotations

from typing import Final

__all__ = ["COPY", "CSS"]

#: What the button beside the code does. Where a page may not write to the clipboard, the selection is left to copy.
COPY: Final = (
    "const r=document.createRange(),s=getSelection();r.selectNodeContents(this.parentNode.querySelector('pre'));"
    "s.removeAllRanges();s.addRange(r);if(document.execCommand('copy')){this.textContent='Copied';"
    "setTimeout(()=>{this.textContent='Copy';s.removeAllRanges()},1200)}"
)

# JupyterLab marks a dark page by an attribute, VS Code by a class; see also `page`.
CSS: Final = """
.collie-composer{--edge:var(--jp-border-color2,var(--vscode-panel-border,rgba(128,128,128,.35)));
 --paper:var(--jp-layout-color1,var(--vscode-editor-background,transparent));
 --accent:var(--jp-brand-color1,var(--vscode-focusBorder,#0072B2));
 --code:var(--jp-code-font-family,var(--vscode-editor-font-family,ui-monospace,monospace));
 --bad:#B3261E;--warn:#8A6100;--good:#00795A;--string:#A3320B;--number:#00695C;--name:#0067A3;
 max-width:1080px;padding:2px 4px 8px 2px;overflow:visible;font-size:13px;line-height:1.45;
 color:var(--jp-ui-font-color1,var(--vscode-foreground,inherit));
 font-family:var(--jp-ui-font-family,var(--vscode-font-family,system-ui,sans-serif))}
[data-jp-theme-light="false"] .collie-composer,.vscode-dark .collie-composer{
 --bad:#FF8A80;--warn:#F0B955;--good:#5FD3A8;--string:#F0945B;--number:#7FD0B4;--name:#7CC4F0}
.collie-composer .widget-html,.collie-composer .widget-html-content{height:auto;min-height:0;margin:0;font-size:13px;
 line-height:1.45}
.collie-composer .widget-box,.collie-composer .widget-vbox,.collie-composer .widget-hbox{overflow:visible;margin:0}
.collie-composer>.collie-style{display:none}
.collie-composer>.collie-head{align-items:center;gap:14px;margin-bottom:10px;flex-wrap:wrap}
.collie-composer .collie-head>.collie-field .widget-text{flex-direction:row;align-items:center;gap:7px}
.collie-composer .collie-head>.collie-field input{width:190px}
.collie-composer .collie-head .collie-name b{font-size:15px}
.collie-composer .collie-status{margin-left:auto}
.collie-composer .collie-status span{border-radius:10px;padding:1px 11px;font-size:12px;font-weight:600;
 border:1px solid currentColor;white-space:nowrap}
.collie-composer span.ok{color:var(--good)}
.collie-composer span.error{color:var(--bad)}
.collie-composer span.warning{color:var(--warn)}
.collie-composer span.checking{opacity:.6}
.collie-composer .collie-cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(370px,100%),1fr));
 gap:10px;align-items:stretch}
.collie-composer .collie-card{border:1px solid var(--edge);border-radius:6px;padding:8px 12px 10px;min-width:0;
 background:var(--paper)}
.collie-composer>.collie-card{margin-top:10px}
.collie-composer .collie-plan-row{align-items:center;gap:8px;margin-top:10px}
.collie-composer .collie-plan-row .widget-dropdown{width:210px;margin:0}
.collie-composer .collie-plan-row .widget-dropdown label{width:auto;margin-right:7px}
.collie-composer .collie-plan-row button{width:auto;margin:0;height:26px;line-height:24px;padding:0 12px}
.collie-composer .collie-answer{margin-top:6px;overflow-x:auto}
.collie-composer .collie-header{align-items:center;gap:8px;flex-wrap:wrap;min-height:26px}
.collie-composer .collie-title b{font-size:13.5px}
.collie-composer .collie-header .collie-kind{margin:0 0 0 auto;width:190px}
.collie-composer .collie-header .collie-kind select{font-weight:600;color:var(--accent)}
.collie-composer .collie-about div{opacity:.65;font-size:12px;line-height:1.4;display:-webkit-box;-webkit-line-clamp:2;
 -webkit-box-orient:vertical;overflow:hidden}
.collie-composer .collie-about code{font-family:var(--code);font-size:11.5px;background:none;padding:0;color:inherit}
.collie-composer .collie-grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(130px,1fr));gap:7px 12px;
 margin-top:8px;align-items:start}
.collie-composer .collie-grid{grid-auto-flow:dense}
.collie-composer .collie-grid>.collie-field:not(.collie-card){display:contents}
.collie-composer .collie-grid>.collie-card,.collie-composer .wide>.widget-text,
.collie-composer .collie-grid .collie-note{grid-column:1/-1}
.collie-composer .collie-field>.widget-text,.collie-composer .collie-field>.widget-dropdown{display:flex;
 flex-direction:column;align-items:stretch;width:auto;height:auto;margin:0}
.collie-composer .collie-field>.widget-text>label,.collie-composer .collie-field>.widget-dropdown>label{width:auto;
 text-align:left;height:17px;line-height:17px;font-size:12px;opacity:.75;margin:0;padding:0;justify-content:flex-start}
.collie-composer input[type=text],.collie-composer select{box-sizing:border-box;width:100%;min-width:0;height:26px;
 flex:none;
 font-size:12.5px;border-radius:3px;margin:0}
.collie-composer input[type=text]{font-family:var(--code);padding:0 7px}
.collie-composer input::placeholder{color:inherit;opacity:.5}
.collie-composer .collie-field>.widget-checkbox{width:auto;height:auto;margin:17px 0 0;min-height:26px;align-self:start}
.collie-composer .collie-field>.widget-checkbox label{font-size:12.5px;height:26px;line-height:26px;overflow:visible}
.collie-composer .error>.widget-text input,.collie-composer .error>.widget-dropdown select{border-color:var(--bad)}
.collie-composer .warning>.widget-text input,.collie-composer .warning>.widget-dropdown select{border-color:var(--warn)}
.collie-composer .collie-note div,.collie-composer .collie-summary div{overflow-wrap:anywhere}
.collie-composer .collie-field:not(.error):not(.warning)>.collie-note{display:none}
.collie-composer .collie-note div{font-size:12px;line-height:1.4}
.collie-composer .collie-note code,.collie-composer .collie-summary code{font-family:var(--code);font-size:11.5px;
 background:none;padding:0;color:inherit;font-weight:600}
.collie-composer div.error{color:var(--bad)}
.collie-composer div.warning{color:var(--warn)}
.collie-composer .remedy{opacity:.85}
.collie-composer .collie-more{width:auto;height:20px;line-height:20px;padding:0;margin:7px 0 0;align-self:flex-start;
 background:none;border:0;box-shadow:none;font-size:12px;color:var(--accent)}
.collie-composer .collie-add,.collie-composer .collie-remove{width:auto;height:24px;line-height:22px;margin:0;
 padding:0 9px;font-size:12px;background:none;border:1px solid var(--edge);border-radius:12px;color:inherit}
.collie-composer .collie-remove{border:0;padding:0 4px;opacity:.6}
.collie-composer .collie-items{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(370px,100%),1fr));gap:10px}
.collie-composer .collie-items>.collie-card{margin-top:8px}
.collie-composer .collie-items .collie-remove{margin-left:auto}
.collie-composer .collie-items .collie-kind{margin-left:0}
.collie-composer .collie-grid>.collie-card{border:0;border-left:2px solid var(--edge);border-radius:0;
 padding:0 0 0 9px;margin-top:3px}
.collie-composer .collie-grid>.collie-card .collie-title b{font-size:12px;font-weight:400;opacity:.75}
.collie-composer .collie-summary{margin-top:8px}
.collie-composer .collie-source{margin-top:12px}
.collie-composer .collie-language button{width:auto;height:22px;line-height:20px;padding:0 1px;margin:0 14px 5px 1px;
 font-size:12.5px;background:none;border:0;border-bottom:2px solid transparent;box-shadow:none;color:inherit;
 opacity:.65}
.collie-composer .collie-language button.mod-active{border-color:var(--accent);opacity:1;font-weight:600}
.collie-composer .collie-block{position:relative}
.collie-composer pre{margin:0;padding:9px 12px;font:12.5px/1.5 var(--code);color:inherit;white-space:pre;
 overflow:auto;max-height:440px;
 background:var(--jp-cell-editor-background,rgba(128,128,128,.08));border:1px solid var(--edge);border-radius:6px}
.collie-composer .stale pre{opacity:.45}
.collie-composer .collie-block button{position:absolute;right:7px;top:7px;font-size:11.5px;padding:1px 9px;
 border:1px solid var(--edge);border-radius:4px;background:var(--paper);color:inherit;cursor:pointer}
.collie-composer .hl-s1,.collie-composer .hl-s2,.collie-composer .hl-se{color:var(--string)}
.collie-composer .hl-mi,.collie-composer .hl-mf,.collie-composer .hl-kc,.collie-composer .hl-kkc{color:var(--number)}
.collie-composer .hl-nt{color:var(--name)}
.collie-composer .hl-c1{opacity:.6}
""".replace("\n", "")
