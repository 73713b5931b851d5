"""Run one stream on several GPUs: tokens are divided among processes, in self-attention heads are (DeepSpeed-Ulysses).

Jacobs et al. 2023, arXiv 2309.14509. The K/V cache is an addition: a process keeps the keys and values of its own
heads for all tokens, so that nothing in the cache is ever sent to another process.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from torch import Tensor, nn

_PRIME = 65521  # period of the weights of a checksum


@dataclass(frozen=True, eq=False)
class ContextParallel:
    """Describe the processes that compute one stream together.

    Attributes:
        group: the processes.
        size: their number.
        rank: index of this process in `group`.
    """

    group: dist.ProcessGroup
    size: int
    rank: int

    def __deepcopy__(self, memo: dict) -> ContextParallel:
        return self  # a copied model runs in the same processes

    @classmethod
    def from_config(cls, config: ContextParallelConfig, heads: int, device: torch.device) -> ContextParallel:
        """Set up the mesh of `config` for the running processes.

        Args:
            config: of diffusers; only `ulysses_degree` and `mesh` are used. Uneven numbers of tokens are supported.
            heads: attention heads of the model.
            device: device of the model in this process.

        Raises:
            ValueError: ring attention, or a number of heads that `ulysses_degree` does not divide.
            RuntimeError: the processes have not been started or not been connected.
        """
        degree = config.ulysses_degree
        if config.ring_degree > 1:
            raise ValueError(
                f"ring_degree is {config.ring_degree}, expected 1: the K/V cache is divided by heads, not by tokens; "
                "use ulysses_degree"
            )
        if heads % degree:
            fitting = [n for n in range(2, heads + 1) if heads % n == 0]
            raise ValueError(
                f"{heads} attention heads cannot be divided among {degree} processes: use a ulysses_degree of "
                f"{', '.join(map(str, fitting))}"
            )
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "enable_parallelism() needs processes that are connected: start the program with "
                f"`torchrun --nproc-per-node {degree}` and call torch.distributed.init_process_group() first"
            )
        world = dist.get_world_size()
        if config.mesh is None and degree != world:
            raise RuntimeError(
                f"ulysses_degree is {degree}, but the job has {world} processes: start {degree}, or pass a mesh"
            )
        kind = "cuda" if dist.get_backend() == "nccl" else device.type  # an offloaded model can be on the CPU
        mesh = config.mesh or dist.device_mesh.init_device_mesh(
            kind, mesh_shape=config.mesh_shape, mesh_dim_names=config.mesh_dim_names
        )
        config.setup(dist.get_rank(), world, device, mesh)
        group = config._ulysses_mesh.get_group()
        return cls(group, degree, dist.get_rank(group))

    def split(self, tokens: int) -> TokenSplit:
        """Divide the tokens of a pass.

        Raises:
            ValueError: there are fewer tokens than processes.
        """
        if tokens < self.size:
            raise ValueError(
                f"a pass over {tokens} tokens cannot be divided among {self.size} processes: use at most {tokens}"
            )
        return TokenSplit(self, tokens)

    def require_same(self, inputs: Mapping[str, Tensor]) -> None:
        """Check that all processes compute the same stream. A collective call, which waits for the device.

        Args:
            inputs: name in error messages -> tensor.

        Raises:
            ValueError: an input is not bit-identical in all processes; names all such inputs.
        """
        checksums = torch.stack([_checksum(tensor) for tensor in inputs.values()])
        gathered = [torch.empty_like(checksums) for _ in range(self.size)]
        dist.all_gather(gathered, checksums, group=self.group)
        differ = (torch.stack(gathered) != gathered[0]).any(dim=0).tolist()
        names = [name for name, differs in zip(inputs, differ, strict=True) if differs]
        if names:
            raise ValueError(
                f"the {self.size} processes of this stream differ in their {' and '.join(names)}: expected the "
                "same in all. Use the same prompt, start and arguments, and a generator with the same seed"
            )


@dataclass(frozen=True, eq=False)
class TokenSplit:
    """Divide the tokens of one pass: process r computes the r-th part; the first parts may have one token more.

    Attributes:
        parallel: the processes.
        tokens: number of tokens of the whole pass.
    """

    parallel: ContextParallel
    tokens: int

    @property
    def sizes(self) -> list[int]:
        """Number of tokens of every process."""
        least, rest = divmod(self.tokens, self.parallel.size)
        return [least + (rank < rest) for rank in range(self.parallel.size)]

    @property
    def _start(self) -> int:
        return sum(self.sizes[: self.parallel.rank])

    def own(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """Return this process's part of `[..., tokens, ...]`, a view."""
        return tensor.narrow(dim, self._start, self.sizes[self.parallel.rank])

    def own_groups(self, values: Tensor) -> Tensor:
        """Return this process's part of `[B, G]`, one value for each of G equal groups of tokens, such as frames.

        A part may begin or end inside a group: the groups of the result `[B, g]` are smaller and again of equal size.
        """
        group, start, size = self.tokens // values.shape[1], self._start, self.sizes[self.parallel.rank]
        step = math.gcd(group, start, size)
        return values.repeat_interleave(group // step, dim=1)[:, start // step : (start + size) // step]

    def own_patches(self, module: nn.Module, inputs: tuple, patches: Tensor) -> Tensor:
        """Reduce patches `[B, C, F, H, W]` to `[B, C, own tokens, 1, 1]`; a forward hook of the patch embedding."""
        return self.own(patches.flatten(2), dim=2)[..., None, None]

    def gathered(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        """Gather `[B, own tokens, C]` to `[B, tokens, C]` in every process; a forward hook of the last layer."""
        own, parts = output.transpose(0, 1).contiguous(), self.parallel.size
        return self._exchange(own.repeat(parts, 1, 1), [len(own)] * parts, self.sizes).transpose(0, 1)

    def to_heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Turn each `[B, own tokens, heads, head_dim]` into `[B, tokens, own heads, head_dim]`, in one exchange."""
        first, parts = tensors[0], self.parallel.size
        batch, own, heads, width = first.shape
        sent = first.new_empty(parts, own, batch, len(tensors), heads // parts, width)
        for index, tensor in enumerate(tensors):
            sent[:, :, :, index] = tensor.unflatten(2, (parts, -1)).permute(2, 1, 0, 3, 4)
        return self._exchange(sent.flatten(0, 1), [own] * parts, self.sizes).transpose(0, 1).unbind(2)

    def to_tokens(self, tensor: Tensor) -> Tensor:
        """Turn `[B, tokens, own heads, head_dim]` back into `[B, own tokens, heads, head_dim]`."""
        parts, own = self.parallel.size, self.sizes[self.parallel.rank]
        received = self._exchange(tensor.transpose(0, 1).contiguous(), self.sizes, [own] * parts)
        return received.unflatten(0, (parts, own)).permute(2, 1, 0, 3, 4).flatten(2, 3)

    def own_heads(self, values: Tensor) -> Tensor:
        """Return this process's part of `[heads]`."""
        return values.tensor_split(self.parallel.size)[self.parallel.rank]

    def _exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send the r-th part of `rows` to process r; return the parts received from all processes, concatenated."""
        result = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(result, rows, received, sent, group=self.parallel.group)
        return result


def _checksum(tensor: Tensor) -> Tensor:
    """Return an int64 scalar that depends on the size and every bit of the values."""
    bits = tensor.detach().contiguous().flatten().view(torch.uint8).long()
    weights = torch.arange(1, len(bits) + 1, device=bits.device) % _PRIME
    return (bits * weights).sum() + len(bits) * _PRIME
