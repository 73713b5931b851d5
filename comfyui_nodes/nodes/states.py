"""Save the state of a stream, and load it."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from .. import folders, saved_states
from ..compat import NodeError, output, schema, widget, work
from ..handles import StateType, StreamState


class QARVDSaveState(io.ComfyNode):
    """Save the state of a stream."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and texts of the node."""
        return schema(
            node_id="QARVDSaveState",
            display_name="Q-ARVD Save State",
            description="Saves the state of a stream in output/qarvd_states. Q-ARVD Load State continues the video "
            "from it, also after a restart of ComfyUI, bit for bit.",
            search_aliases=["save stream", "checkpoint", "continue video", "resume"],
            is_output_node=True,
            inputs=[
                StateType.Input("state", tooltip="From Q-ARVD Stream Generate."),
                widget(io.String, "name", default="stream", tooltip="Name of the state, also in a subfolder."),
                widget(
                    io.Boolean,
                    "overwrite",
                    default=False,
                    optional=True,
                    tooltip="Replace a state of this name; otherwise a number is added to the name.",
                ),
            ],
            outputs=[output(io.String, "name", "Name of the saved state.")],
        )

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        """Check the name before the graph runs."""
        try:
            if name is not None:
                saved_states.files_of(name)
        except NodeError as error:
            return error.line
        return True

    @classmethod
    @work
    def execute(cls, state: StreamState, name: str, overwrite: bool = False) -> io.NodeOutput:
        """Save, and return the name."""
        wanted, number = name, 2
        while not overwrite and any(path.exists() for path in saved_states.files_of(name)):
            name, number = f"{wanted}-{number}", number + 1
        saved_states.save(state, name)
        frames = state.latents.shape[2]
        how = "exactly" if state.saved is not None else "by encoding its frames again"
        text = f"saved {name} in output/qarvd_states: {frames} latent frames of {state.model}, continues {how}"
        return io.NodeOutput(name, ui=ui.PreviewText(text))


class QARVDLoadState(io.ComfyNode):
    """Load the state of a stream."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and texts of the node."""
        return schema(
            node_id="QARVDLoadState",
            display_name="Q-ARVD Load State",
            description="Loads a state that Q-ARVD Save State saved. Connect it to state of Q-ARVD Stream Generate to "
            "continue the video.",
            search_aliases=["load stream", "continue video", "resume"],
            inputs=[
                widget(io.Combo, "name", options=saved_states.names(), tooltip="A state in output/qarvd_states."),
            ],
            outputs=[output(StateType, "state", "For Q-ARVD Stream Generate, with the same model and prompt.")],
        )

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        """Check that the state exists before the graph runs."""
        if name is not None and name not in saved_states.names():
            return f"There is no state {name!r} in output/qarvd_states. Save one with Q-ARVD Save State and press R."
        return True

    @classmethod
    def fingerprint_inputs(cls, name: str = "", **_: Any) -> str:
        """Return text that changes with the files."""
        if name not in saved_states.names():
            return ""
        return "|".join(folders.stamp(path) for path in saved_states.files_of(name))

    @classmethod
    @work
    def execute(cls, name: str) -> io.NodeOutput:
        """Return the state."""
        return io.NodeOutput(saved_states.load(name))
