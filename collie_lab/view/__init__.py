"""What people look at while and after a run. A run is known by its folder alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collie_lab.view.composer import compose
    from collie_lab.view.figures import compare, figure
    from collie_lab.view.live import watch

__all__ = ["compare", "compose", "figure", "watch"]


def __getattr__(name: str) -> Any:
    """The verbs, imported when first used: numpy and the drawing libraries are slow to load."""
    if name == "watch":
        from collie_lab.view.live import watch

        return watch
    if name == "compose":
        from collie_lab.view.composer import compose

        return compose
    if name in ("figure", "compare"):
        from collie_lab.view import figures

        return getattr(figures, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
