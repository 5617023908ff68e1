"""Convolutions with frozen weights that keep nothing of their input for the backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv2d_input


class _FrozenConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.settings = x.shape, settings
        return F.conv2d(x, weight, bias, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        dx = conv2d_input(ctx.shape, weight, dy, *ctx.settings)  # type: ignore[no-untyped-call]
        return dx, None, None, None


def frozen_conv2d(module: nn.Conv2d, x: Tensor) -> Tensor:
    """The module's output, with a gradient for x alone.

    torch's own convolution keeps x for the weight's gradient even where the weight is frozen.
    Shapes: x (n, in_channels, h, w).
    """
    weight = module.weight
    if not (torch.is_grad_enabled() and x.requires_grad):
        return F.conv2d(x, weight, module.bias, *_settings(module))
    y: Tensor = _FrozenConv2d.apply(x, weight, module.bias, _settings(module))  # type: ignore[no-untyped-call]
    return y


def _settings(module: nn.Conv2d) -> tuple[Any, ...]:
    return module.stride, module.padding, module.dilation, module.groups


def _plain(module: nn.Conv2d) -> bool:
    return module.padding_mode == "zeros" and not isinstance(module.padding, str)


class FrozenConv2d(nn.Conv2d):
    """A convolution that keeps nothing of its input while its weights are frozen."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_channels, h, w) -> (n, out_channels, h', w')."""
        if self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad):
            return super().forward(x)
        return frozen_conv2d(self, x)


def freeze_convolutions(model: nn.Module) -> int:
    """Let every plain convolution keep nothing of its input while its weights are frozen.

    Args:
        model: its convolutions change their class; names, weights and outputs stay.
    Returns:
        How many.
    """
    count = 0
    for module in model.modules():
        if type(module) is nn.Conv2d and _plain(module):
            module.__class__ = FrozenConv2d
            count += 1
    return count
