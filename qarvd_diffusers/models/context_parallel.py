"""One stream on several GPUs: tokens are shared out between processes, inside attention heads are (DeepSpeed-Ulysses).

Jacobs et al. 2023, arXiv 2309.14509. What is its own here is the K/V cache: a process keeps the keys and values of its heads
and of all tokens, so that nothing cached ever travels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from torch import Tensor, nn

_PRIME = 65521  # weights of a checksum repeat after so many values


@dataclass(frozen=True, eq=False)
class ContextParallel:
    """The processes that make one stream together.

    Attributes:
        group: the processes.
        size: how many there are.
        rank: which of them this one is.
    """

    group: dist.ProcessGroup
    size: int
    rank: int

    def __deepcopy__(self, memo: dict) -> ContextParallel:
        return self  # a copied model runs in the same processes

    @classmethod
    def from_config(cls, config: ContextParallelConfig, heads: int, device: torch.device) -> ContextParallel:
        """Set up `config` (its mesh) for the running processes.

        Args:
            config: diffusers' own; only `ulysses_degree` and `mesh` are followed, uneven numbers of tokens always work.
            heads: attention heads of the model.
            device: of the model, one for each process.

        Raises:
            ValueError: for ring attention, or heads that cannot be shared out.
            RuntimeError: if the processes have not been started, or not connected.
        """
        degree = config.ulysses_degree
        if config.ring_degree > 1:
            raise ValueError(
                f"ring_degree is {config.ring_degree}: a K/V cache is shared out by heads, not by tokens; use ulysses_degree"
            )
        if heads % degree:
            fitting = [n for n in range(2, heads + 1) if heads % n == 0]
            raise ValueError(
                f"{heads} attention heads cannot be shared out between {degree} processes: use a ulysses_degree of "
                f"{', '.join(map(str, fitting))}"
            )
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "enable_parallelism() works on processes that know each other: start the program with "
                f"`torchrun --nproc-per-node {degree}` and call torch.distributed.init_process_group() first"
            )
        world = dist.get_world_size()
        if config.mesh is None and degree != world:
            raise RuntimeError(
                f"ulysses_degree is {degree}, but the job has {world} processes: start {degree}, or give a mesh"
            )
        kind = "cuda" if dist.get_backend() == "nccl" else device.type  # an offloaded model may lie on the CPU
        mesh = config.mesh or dist.device_mesh.init_device_mesh(
            kind, mesh_shape=config.mesh_shape, mesh_dim_names=config.mesh_dim_names
        )
        config.setup(dist.get_rank(), world, device, mesh)
        group = config._ulysses_mesh.get_group()
        return cls(group, degree, dist.get_rank(group))

    def split(self, tokens: int) -> TokenSplit:
        """How a pass over `tokens` tokens is shared out."""
        if tokens < self.size:
            raise ValueError(f"a pass over {tokens} tokens cannot be shared out between {self.size} processes")
        return TokenSplit(self, tokens)

    def require_same(self, inputs: Mapping[str, Tensor]) -> None:
        """Refuse to make different streams together. A collective call, which waits for the device.

        Raises:
            ValueError: for inputs that are not bit by bit those of the first process; names them.
        """
        mine = torch.stack([_checksum(tensor) for tensor in inputs.values()])
        all_of_them = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(all_of_them, mine, group=self.group)
        differ = (torch.stack(all_of_them) != all_of_them[0]).any(dim=0).tolist()
        names = [name for name, differs in zip(inputs, differ, strict=True) if differs]
        if names:
            raise ValueError(
                f"the {self.size} processes of this stream differ in their {' and '.join(names)}: all have to make the same "
                "one. Give each the same prompt, start and arguments, and a generator with the same seed"
            )


@dataclass(frozen=True, eq=False)
class TokenSplit:
    """How the tokens of one pass are shared out; process r holds the r-th part, a few have one token more than others.

    Attributes:
        parallel: the processes.
        tokens: of the pass, in all processes together.
    """

    parallel: ContextParallel
    tokens: int

    @property
    def sizes(self) -> list[int]:
        """Tokens of every process."""
        least, rest = divmod(self.tokens, self.parallel.size)
        return [least + (rank < rest) for rank in range(self.parallel.size)]

    @property
    def _start(self) -> int:
        return sum(self.sizes[: self.parallel.rank])

    def own(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """This process's part of `[..., tokens, ...]`."""
        return tensor.narrow(dim, self._start, self.sizes[self.parallel.rank])

    def own_groups(self, values: Tensor) -> Tensor:
        """This process's part of `[B, G]`, a value for each of G equal groups of tokens (such as frames).

        A part may begin or end inside a group: the result `[B, g]` has smaller groups, of equal size again.
        """
        group, start, size = self.tokens // values.shape[1], self._start, self.sizes[self.parallel.rank]
        step = math.gcd(group, start, size)
        return values.repeat_interleave(group // step, dim=1)[:, start // step : (start + size) // step]

    def own_patches(self, module: nn.Module, inputs: tuple, patches: Tensor) -> Tensor:
        """Forward hook of a patch embedding: `[B, C, F, H, W]` -> `[B, C, own tokens, 1, 1]`, which flattens alike."""
        return self.own(patches.flatten(2), dim=2)[..., None, None]

    def gathered(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        """Forward hook of the last layer: `[B, own tokens, C]` -> `[B, tokens, C]` in every process."""
        mine = output.transpose(0, 1).contiguous()
        everyone = self._exchange(mine.repeat(self.parallel.size, 1, 1), [len(mine)] * self.parallel.size, self.sizes)
        return everyone.transpose(0, 1)

    def to_heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Each `[B, own tokens, heads, head_dim]` -> `[B, tokens, own heads, head_dim]`, in one exchange."""
        first, parts = tensors[0], self.parallel.size
        batch, own, heads, width = first.shape
        sent = first.new_empty(parts, own, batch, len(tensors), heads // parts, width)
        for index, tensor in enumerate(tensors):
            sent[:, :, :, index] = tensor.unflatten(2, (parts, -1)).permute(2, 1, 0, 3, 4)
        return self._exchange(sent.flatten(0, 1), [own] * parts, self.sizes).transpose(0, 1).unbind(2)

    def to_tokens(self, tensor: Tensor) -> Tensor:
        """`[B, tokens, own heads, head_dim]` -> `[B, own tokens, heads, head_dim]`."""
        parts, own = self.parallel.size, self.sizes[self.parallel.rank]
        received = self._exchange(tensor.transpose(0, 1).contiguous(), self.sizes, [own] * parts)
        return received.unflatten(0, (parts, own)).permute(2, 1, 0, 3, 4).flatten(2, 3)

    def own_heads(self, values: Tensor) -> Tensor:
        """This process's part of `[heads]`."""
        return values.tensor_split(self.parallel.size)[self.parallel.rank]

    def _exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send the r-th part of `rows` to process r, and join what comes from all."""
        result = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(result, rows, received, sent, group=self.parallel.group)
        return result


def _checksum(tensor: Tensor) -> Tensor:
    """int64 scalar; depends on the shape and every bit of the values."""
    bits = tensor.detach().contiguous().flatten().view(torch.uint8).long()
    weights = torch.arange(1, len(bits) + 1, device=bits.device) % _PRIME
    return (bits * weights).sum() + len(bits) * _PRIME
