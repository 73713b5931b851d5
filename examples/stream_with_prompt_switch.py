"""Stream from the bundled model, change the prompt while it runs, and write one video.

python examples/stream_with_prompt_switch.py
"""

import numpy as np
import torch
from diffusers.utils import export_to_video

from qarvd_diffusers import ARVDPipeline, bundled_model_path

FIRST = "a large red circle moving left on a navy background"
SECOND = "a small yellow square moving up on a black background"

pipe = ARVDPipeline.from_pretrained(bundled_model_path())
frames = []
with pipe.stream(FIRST, generator=torch.Generator().manual_seed(0)) as stream:  # endless: the loop below ends it
    for chunk in stream:
        frames.append(chunk.frames[0])  # of the first sample: float32 [frames, height, width, 3]
        if chunk.index == 2:
            # The bundled model follows a new prompt only through a cut; LongLive is trained for "recache".
            stream.set_prompt(SECOND, on_prompt_switch="new_text_only")
        if chunk.index == 5:
            break
export_to_video(np.concatenate(frames), "prompt_switch.mp4", fps=pipe.config.fps)
