"""Layers compiled once a kind: one compiled function serves all layers that differ in weights alone.

The compiler then fuses norms, rotary positions, the write to the cache and activations into a few kernels.
A layer gets its weights and its cache storage as tensors. Its index is not among what it reads, since the
compiler would make a function for every index.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from types import FunctionType

import torch
import torch.fx.experimental._config
from torch import Tensor, nn
from torch.func import functional_call

# Variants of one function that torch keeps: a kind, times rows and tokens that are one or more.
VARIANTS = 64

# apply(call, *inputs): `call` is the layer with the weights of the moment.
Apply = Callable[..., Tensor]


class LayerSlots:
    """The cache of one layer, in storage that does not move; what attention layers call a cache.

    keys, values [batch, kv_heads, capacity, d]; slots [batch, m], where the next tokens go; visible:
    slots that attention looks at.
    """

    def __init__(self, keys: Tensor, values: Tensor, slots: Tensor, visible: int):
        self.keys, self.values, self.slots, self.visible = keys, values, slots, visible

    def update(self, keys: Tensor, values: Tensor, *_args, **_kwargs) -> tuple[Tensor, Tensor]:
        """[batch, kv_heads, m, d] each -> all that is visible."""
        rows = torch.arange(keys.shape[0], device=keys.device)[:, None]
        for store, new in ((self.keys, keys), (self.values, values)):
            store[rows, :, self.slots] = new.transpose(1, 2)
        return self.keys.narrow(2, 0, self.visible), self.values.narrow(2, 0, self.visible)


class FusedLayers:
    """Runs layer i by the compiled function of its kind.

    backend: of `torch.compile`. kinds: for each layer the index of its function.
    """

    def __init__(self, layers: Sequence[nn.Module], apply: Apply, backend: str | Callable = "inductor"):
        # Copies without values: were it one of the layers, the compiler would see whose weights are given.
        kinds = [kind_of(layer) for layer in layers]
        order = list(dict.fromkeys(kinds))
        self.kinds = [order.index(kind) for kind in kinds]
        templates = [copy.deepcopy(layers[kinds.index(kind)]).to("meta") for kind in order]
        self.weights = [{**dict(x.named_parameters()), **dict(x.named_buffers())} for x in layers]
        self.functions = [
            torch.compile(_with_weights(template, apply), dynamic=True, fullgraph=True, backend=backend)
            for template in templates
        ]

    def __call__(self, index: int, *inputs: Tensor) -> Tensor:
        # Without duck shapes: sizes that happen to be equal at first need not stay so.
        variants = torch._dynamo.config.patch(recompile_limit=VARIANTS)
        with variants, torch.fx.experimental._config.patch(use_duck_shape=False):
            return self.functions[self.kinds[index]](self.weights[index], *inputs)


def _with_weights(template: nn.Module, apply: Apply) -> Callable[..., Tensor]:
    """(weights by name, *inputs) -> what a layer like `template` gives with these weights."""

    def run(weights: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        def call(*args, **kwargs):
            return functional_call(template, weights, args, kwargs)

        return apply(call, *inputs)

    # torch counts the variants of a code object, and all kinds would share this one.
    return FunctionType(run.__code__.replace(), run.__globals__, closure=run.__closure__)


def kind_of(layer: nn.Module) -> Hashable:
    """What a layer computes by, apart from weights and index: classes, plain attributes, shapes."""
    modules = tuple(
        (name, type(module), tuple(sorted((k, repr(v)) for k, v in vars(module).items() if _plain(k, v))))
        for name, module in layer.named_modules()
    )
    tensors = (*layer.named_parameters(), *layer.named_buffers())
    return modules, tuple((name, tuple(x.shape), x.dtype, x.device) for name, x in tensors)


def _plain(name: str, value: object) -> bool:
    counted = name.endswith("layer_idx") or name.startswith("_")
    return not counted and isinstance(value, (bool, int, float, str, type(None)))
