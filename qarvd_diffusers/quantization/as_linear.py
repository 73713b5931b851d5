"""See all that computes as a Linear as one: Linears, 1x1 convolutions, and the experts of a stacked tensor."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .convolution import CONVOLUTIONS
from .experts import QARVDExpert, QARVDExperts, QARVDTransposedExpert
from .linear import QARVDLinear


class _View(nn.Linear):
    """A float Linear whose weight belongs to another module; it has no parameters of its own."""

    bias: Any

    def __init__(self, owner: Any, in_features: int, out_features: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._owner = (owner,)  # in a tuple it is no submodule
        self.training = owner.training


class ConvView(_View):
    """A 1x1 convolution, seen as the Linear over its channels."""

    def __init__(self, convolution: Any) -> None:
        super().__init__(convolution, convolution.in_channels, convolution.out_channels)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight of the convolution, `[N, K]`."""
        return matrix(self, self._owner[0].weight)

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        """The bias of the convolution."""
        return self._owner[0].bias

    def register_forward_pre_hook(self, hook: Any, **kwargs: Any) -> Any:
        """Show the input of the convolution to a hook as `[..., tokens, K]`; frames may come before the channels."""

        def show(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            rows = x.movedim(1, -1)
            hook(self, (rows.flatten(0 if isinstance(module, nn.Conv2d) else 1, -2),), {})

        return self._owner[0].register_forward_pre_hook(show, with_kwargs=True)


class ExpertView(_View):
    """One expert of a tensor `[E, N, K]`, or `[E, K, N]` if `transposed`, seen as a Linear.

    It runs, hooks included, inside `experts_run`.
    """

    def __init__(self, owner: nn.Module, leaf: str, number: int, transposed: bool) -> None:
        self.leaf, self.number, self.transposed = leaf, number, transposed
        tensor = getattr(owner, leaf)
        super().__init__(owner, *(tensor.shape[1:] if transposed else reversed(tensor.shape[1:])))
        self._tensor = (tensor,)  # in a tuple it is no parameter of this module
        self.bias = None

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight of the expert, `[N, K]`."""
        return matrix(self, self._tensor[0])

    def dequantized(self) -> Tensor:
        """Return the weight `[N, K]`, as the quantized layer of this expert does."""
        return self.weight


def as_linear(module: nn.Module) -> nn.Linear | None:
    """Return a module as a Linear; None if it does not compute one."""
    if isinstance(module, nn.Linear):
        return module
    if type(module) not in CONVOLUTIONS:
        return None
    convolution: Any = module
    ones = {*convolution.kernel_size, *convolution.stride, convolution.groups} == {1}
    padded = not isinstance(convolution.padding, str) and any(convolution.padding)  # "same" and "valid" pad nothing
    return ConvView(convolution) if ones and not padded else None


def experts_of(model: nn.Module) -> dict[str, tuple[dict[str, ExpertView], str]]:
    """Find the tensors of stacked experts: their experts by name, and the name of the router's weight.

    Such are the parameters `[E, a, b]` of a module if it, or the module above, has a matrix `[E, ...]`, that of the
    router. The first one reads the width of the model, of which the router reads a multiple, and another one writes
    it; where that does not tell inputs from outputs, they are not known to be experts.
    """
    found: dict[str, tuple[dict[str, ExpertView], str]] = {}
    for path, module in model.named_modules():
        stacks = {leaf: p for leaf, p in module._parameters.items() if p is not None and p.ndim == 3 and len(p) > 1}
        if not stacks or isinstance(module, nn.Conv1d) or not all(p.is_floating_point() for p in stacks.values()):
            continue
        above = path.rpartition(".")[0]
        for leaf, stack in stacks.items():
            router = _router(model, above, path, len(stack))
            transposed = router and _reads_first(router[1], [p for p in stacks.values() if len(p) == len(stack)])
            if router and transposed is not None:
                name = f"{path}.{leaf}".lstrip(".")
                views = {f"{name}.{i}": ExpertView(module, leaf, i, bool(transposed)) for i in range(len(stack))}
                found[name] = views, router[0]
    return found


def _router(model: nn.Module, above: str, path: str, experts: int) -> tuple[str, int] | None:
    """Find the matrix `[experts, width]` beside or above a module: its name and width."""
    for prefix in dict.fromkeys((path, above)):
        for name, parameter in model.get_submodule(prefix).named_parameters(prefix):
            below = prefix != path and name.startswith(f"{path}.")
            near = not below and name.count(".") <= prefix.count(".") + 2
            if near and parameter.ndim == 2 and len(parameter) == experts:
                return name, parameter.shape[1]
    return None


def _reads_first(width: int, stacks: list[nn.Parameter]) -> bool | None:
    """Tell whether stacked weights are `[E, K, N]`, by the width of their router; None if that cannot be told."""
    (_, a, b), others = stacks[0].shape, [tuple(stack.shape) for stack in stacks[1:]]
    model = max((size for size in (a, b) if width % size == 0), default=0)
    first = a == model and any(shape[2] == model for shape in others)
    last = b == model and any(shape[1] == model for shape in others)
    return None if first == last else first


@contextmanager
def experts_run(linears: Iterable[nn.Linear]) -> Iterator[None]:
    """Run the float experts among some Linears as modules, so that their hooks are called, until the `with` ends."""
    tensors: dict[int, dict[int, ExpertView]] = {}
    for linear in linears:
        if isinstance(linear, ExpertView):
            tensors.setdefault(id(linear._tensor[0]), {})[linear.number] = linear
    replaced = [(next(iter(some.values())), some) for some in tensors.values()]
    try:
        for one, some in replaced:
            owner, tensor = one._owner[0], one._tensor[0]
            every = [some.get(i) or ExpertView(owner, one.leaf, i, one.transposed) for i in range(len(tensor))]
            set_part(owner, one.leaf, QARVDExperts(every))
        yield
    finally:
        for one, _ in replaced:
            set_part(one._owner[0], one.leaf, one._tensor[0])


def quantized_class(linear: nn.Linear) -> type[QARVDLinear]:
    """Return the class of the quantized layer that takes the place of a Linear, or of what is seen as one."""
    if isinstance(linear, ConvView):
        return CONVOLUTIONS[type(linear._owner[0])]
    if isinstance(linear, ExpertView):
        return QARVDTransposedExpert if linear.transposed else QARVDExpert
    return QARVDLinear


def stacked(layers: dict[str, QARVDLinear]) -> dict[str, nn.Module]:
    """Put the layers of experts into one `QARVDExperts` a tensor, under its name; others stay."""
    modules: dict[str, nn.Module] = {}
    experts: dict[str, dict[str, QARVDExpert]] = {}
    for name, layer in layers.items():
        if isinstance(layer, QARVDExpert):
            tensor, _, number = name.rpartition(".")
            experts.setdefault(tensor, {})[number] = layer
        else:
            modules[name] = layer
    for name, members in experts.items():
        numbers = sorted(members, key=int)  # names in a file are sorted as text
        modules[name] = QARVDExperts(members[number] for number in numbers)
    return modules


def require_all_experts(names: Collection[str], linears: Mapping[str, nn.Linear], source: str) -> None:
    """Check that of each tensor of experts all or none are named.

    Raises:
        ValueError: some are missing; the message names the first.
    """
    tensors = {name.rpartition(".")[0] for name in names if isinstance(linears.get(name), ExpertView)}
    for name, linear in linears.items():
        if isinstance(linear, ExpertView) and name.rpartition(".")[0] in tensors and name not in names:
            raise ValueError(f"{source} has other experts of the same tensor, but not {name}: quantize again")


def part(model: nn.Module, name: str) -> Any:
    """Return the module or parameter of a name."""
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)


def set_part(model: nn.Module, name: str, value: nn.Module | nn.Parameter) -> None:
    """Put a module or parameter in the place of what has its name, be it a module or a parameter."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if not isinstance(value, nn.Parameter):
        owner._parameters.pop(leaf, None)
    setattr(owner, leaf, value)


def matrix(linear: nn.Linear, tensor: Tensor) -> Tensor:
    """Take the weight `[N, K]` of a layer out of the float tensor that holds it."""
    if isinstance(linear, ExpertView):
        return tensor[linear.number].T if linear.transposed else tensor[linear.number]
    return tensor.flatten(1)


def weight_key(name: str, linear: nn.Linear) -> str:
    """Return the name of the float tensor that holds the weight of a layer."""
    return name.rpartition(".")[0] if isinstance(linear, ExpertView) else f"{name}.weight"


def layer_label(name: str, linear: nn.Linear) -> str:
    """Return the name of a layer in the float model: that of their tensor for experts."""
    return name.rpartition(".")[0] if isinstance(linear, ExpertView) else name


def float_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield what computes as a Linear, by name and in the order of modules."""
    experts = experts_of(model)
    for name, module in model.named_modules():
        linear = as_linear(module)
        if linear is not None:
            yield name, linear
        for leaf in module._parameters:
            yield from experts.get(f"{name}.{leaf}".lstrip("."), ({}, ""))[0].items()
