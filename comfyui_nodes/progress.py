"""Show the progress of long work in its node."""

from __future__ import annotations

import comfy.utils
from server import PromptServer

from .compat import stop_if_interrupted


class Progress:
    """Show progress as a bar and text in a node, and stop if the user asks to."""

    def __init__(self, node_id: str) -> None:
        self._node_id = node_id
        self._bar = comfy.utils.ProgressBar(1, node_id=node_id)
        self._text = ""

    def __call__(self, text: str, step: int, steps: int) -> None:
        """Show a step of the work; the `progress` callback of the library."""
        stop_if_interrupted()
        self._bar.update_absolute(step, steps)
        if text != self._text:
            self._text = text
            self.show(f"{text} ({step}/{steps})")

    def show(self, text: str) -> None:
        """Replace the text in the node."""
        server = PromptServer.instance
        server.send_progress_text(text, self._node_id, server.client_id)
