"""Turn motions of a camera into the tensors that a world model reads: a ray for every pixel of every latent frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CELL = 8  # pixels per latent, in height and width
_OFF_CENTRE = 0.2  # largest distance of a principal point from the centre, as a share of the picture


class Intrinsics(NamedTuple):
    """Focal lengths and principal point of a camera, in pixels of a picture of a size.

    Attributes:
        fx: focal length in columns.
        fy: focal length in rows.
        cx: column of the principal point.
        cy: row of the principal point.
        height: rows of the picture.
        width: columns of the picture.
    """

    fx: float
    fy: float
    cx: float
    cy: float
    height: int = 480
    width: int = 832

    @classmethod
    def default(cls) -> Intrinsics:
        """Return a camera that looks at the centre, with a horizontal field of view of about 80 degrees."""
        return cls(500.0, 500.0, 416.0, 240.0)

    def check(self, name: str = "intrinsics") -> Intrinsics:
        """Return self.

        Raises:
            ValueError: the numbers cannot be those of a picture of this size.
        """
        numbers = torch.tensor(self, dtype=torch.float64)
        centre = (self.cx / self.width - 0.5, self.cy / self.height - 0.5) if min(self[4:]) > 0 else (1.0, 1.0)
        if not (numbers.isfinite().all() and (numbers > 0).all() and max(map(abs, centre)) <= _OFF_CENTRE):
            likely = f"about {2 * self.cy:g} x {2 * self.cx:g}"
            raise ValueError(
                f"{name} {list(self[:4])} (fx, fy, cx, cy) are not of a picture of {self.height} x {self.width} "
                f"pixels (rather of {likely}): give the size that they were measured at"
            )
        return self


def as_intrinsics(values: Sequence[float], size: Sequence[int] | None = None, name: str = "intrinsics") -> Intrinsics:
    """Return intrinsics.

    Args:
        values: fx, fy, cx, cy.
        size: height and width of the picture that they were measured at; None takes 480 x 832.
        name: of the argument, for errors.

    Raises:
        ValueError: for another number of values, or see `Intrinsics.check`.
    """
    numbers = torch.as_tensor(values).double().flatten().tolist()
    if len(numbers) != 4 or (size is not None and len(size) != 2):
        raise ValueError(f"{name} are {numbers} for a size of {size}, expected fx, fy, cx, cy and height, width")
    return Intrinsics(*numbers, *(() if size is None else (int(pixels) for pixels in size))).check(name)


def rays(rotations: Tensor, intrinsics: Intrinsics, height: int, width: int) -> Tensor:
    """Return the unit ray through the centre of every pixel, `[F, height, width, 3]`, float64.

    Args:
        rotations: `[F, 3, 3]`.
        intrinsics: of the camera.
        height: pixels of a frame.
        width: likewise.
    """
    fx, cx = (value * width / intrinsics.width for value in (intrinsics.fx, intrinsics.cx))
    fy, cy = (value * height / intrinsics.height for value in (intrinsics.fy, intrinsics.cy))
    rows, columns = (torch.arange(size, dtype=torch.float64) + 0.5 for size in (height, width))
    y, x = torch.meshgrid((rows - cy) / fy, (columns - cx) / fx, indexing="ij")
    directions = torch.nn.functional.normalize(torch.stack([x, y, torch.ones_like(x)], dim=-1), dim=-1)
    return torch.einsum("fij,hwj->fhwi", rotations.double(), directions)


def camera_tensor(motions: Tensor, intrinsics: Intrinsics, height: int, width: int) -> Tensor:
    """Return origin and ray of every pixel, `[1, 6 * 64, F, height / 8, width / 8]`, float32.

    This is LingBot-World's camera: a motion's translation, then its rotated rays, with the 8 x 8 pixels of a latent as
    channels.

    Args:
        motions: `[F, 4, 4]`, see `poses.motions`.
        intrinsics: of the camera.
        height: pixels of a frame, a multiple of 8.
        width: likewise.
    """
    directions = rays(motions[:, :3, :3], intrinsics, height, width)
    origins = motions[:, None, None, :3, 3].double().expand_as(directions)
    return _cells(torch.cat([origins, directions], dim=-1))


def action_tensor(motions: Tensor, flags: Tensor, intrinsics: Intrinsics, height: int, width: int) -> Tensor:
    """Return ray and keys of every pixel, `[1, 7 * 64, F, height / 8, width / 8]`, float32; translations have no part.

    Args:
        motions: `[F, 4, 4]`, see `poses.motions`.
        flags: `[F, 4]`, 1 where W, A, S or D is held.
        intrinsics: of the camera.
        height: pixels of a frame, a multiple of 8.
        width: likewise.
    """
    directions = rays(motions[:, :3, :3], intrinsics, height, width)
    held = flags[:, None, None].double().expand(-1, height, width, -1)
    return _cells(torch.cat([directions, held], dim=-1))


def _cells(pixels: Tensor) -> Tensor:
    """Return `[F, H, W, C]` as float32 `[1, C * 64, F, H / 8, W / 8]`; rows of a cell come before columns."""
    cells = pixels.float().unflatten(2, (-1, CELL)).unflatten(1, (-1, CELL))  # F, h, 8, w, 8, C
    return cells.permute(5, 2, 4, 0, 1, 3).flatten(0, 2)[None].contiguous()
