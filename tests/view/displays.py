"""A front-end that remembers: what `display` would have shown, and what became of it."""

from __future__ import annotations

from typing import Any


class Displays:
    """Stands in for `IPython.display.display`."""

    def __init__(self) -> None:
        #: The latest content of every output, in their order: a bundle, or a widget.
        self.shown: list[Any] = []
        #: The index of the output of every update.
        self.updates: list[int] = []

    def __call__(self, content: Any, **_: Any) -> _Handle:
        self.shown.append(content)
        return _Handle(self, len(self.shown) - 1)


class _Handle:
    def __init__(self, displays: Displays, index: int):
        self._displays, self._index = displays, index

    def update(self, content: dict[str, Any], **_: Any) -> None:
        shown = self._displays.shown[self._index]
        if isinstance(shown, dict):
            shown.clear()
            shown.update(content)
        else:
            self._displays.shown[self._index] = content
        self._displays.updates.append(self._index)
