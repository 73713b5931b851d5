"""Let a streaming pipeline take controls, by a mixin."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from .arguments import parameters
from .inputs import StreamInputs
from .steering import ControlSource, control_source


class SteerableMixin:
    """Check the controls of a stream; a part of `StreamableMixin`.

    Attributes:
        stream_defaults: arguments of `stream` for calls that leave them out, such as `image` and `controls`: those of
            calibration, evaluation and measurements.
    """

    if TYPE_CHECKING:  # the host's

        def run_pass(self, *args: Any, **kwargs: Any) -> Any: ...

        def check_stream_inputs(self, **arguments: Any) -> StreamInputs: ...

    stream_defaults: Mapping[str, Any] = MappingProxyType({})

    def stream_inputs(self, controls: Any = None, **arguments: Any) -> StreamInputs:
        """Check the arguments of `stream` about noise, size, length, start and controls, and return them."""
        inputs = self.check_stream_inputs(**arguments)
        return self.with_default_controls(inputs) if controls is None else self.steered_by(inputs, controls)

    def steered_by(self, inputs: StreamInputs, controls: Any) -> StreamInputs:
        """Return the inputs of a stream with `controls`, an argument of `stream`.

        Raises:
            ValueError: they do not fit the model or the number of chunks.
        """
        known = not callable(controls) and not isinstance(controls, Iterator)
        source = control_source(controls, inputs.num_chunks)
        chunks = range(inputs.num_chunks or 0) if known else ()
        return dataclasses.replace(inputs, controls=self.prepare_controls(source, inputs, chunks))

    def prepare_controls(
        self, source: ControlSource, inputs: StreamInputs, chunks: Iterable[int] = ()
    ) -> ControlSource:
        """Check controls and return a source of what `run_pass` gets as `controls`: here the entries as they are.

        A pipeline whose model takes other values overrides it. What a source returns may have a method `event`, which
        returns the prompt that a chunk switches to, or None.

        Args:
            source: entry of each chunk.
            inputs: of the stream.
            chunks: those whose entries are known and can be checked now.

        Raises:
            ValueError: `run_pass` takes no controls, or an entry does not fit.
        """
        names, open_ended = parameters(self.run_pass)
        if "controls" not in names and not open_ended:
            raise ValueError(f"controls were passed, but {type(self).__name__} takes none: leave them out")
        return source

    def held(self, entry: Any, inputs: StreamInputs) -> ControlSource:
        """Check controls that are set while a stream runs, and prepare a source that holds them."""
        return self.prepare_controls(lambda chunk: entry, inputs)

    def with_default_controls(self, inputs: StreamInputs) -> StreamInputs:
        """Return the inputs of a stream that is not steered, with controls if the model needs some."""
        return inputs
