import pytest
import torch
from torch import nn

from lori_manager.engine.frozen import freeze_convolutions

SHAPES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2, "bias": False},
    {"kernel_size": 1, "groups": 2},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
]


def pair(**settings):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, **settings).requires_grad_(False)
    frozen = nn.Conv2d(4, 6, **settings).requires_grad_(False)
    frozen.load_state_dict(conv.state_dict())
    assert freeze_convolutions(frozen) == 1
    return conv, frozen


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("settings", SHAPES)
def test_a_frozen_convolution_is_torchs_own_with_the_same_gradient(settings, layout):
    conv, frozen = pair(**settings)
    x = torch.randn(2, 4, 9, 8).to(memory_format=layout).requires_grad_()
    y, ours = conv(x), frozen(x)
    assert torch.equal(y, ours)
    dy = torch.randn_like(y)
    (wanted,), (got,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(ours, x, dy)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def kept(module, x):
    found = []
    with torch.autograd.graph.saved_tensors_hooks(found.append, lambda t: t):
        module(x)
    return [tuple(t.shape) for t in found]


def test_it_keeps_its_weight_alone_and_torchs_keeps_the_input_too():
    conv, frozen = pair(kernel_size=3, padding=1)
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    assert kept(frozen, x) == [(6, 4, 3, 3)]
    assert (2, 4, 5, 5) in kept(conv, x)


def test_weights_that_train_get_their_gradient():
    _, frozen = pair(kernel_size=3, padding=1)
    frozen.requires_grad_(True)
    frozen(torch.randn(2, 4, 5, 5)).sum().backward()
    assert frozen.weight.grad is not None
    assert frozen.bias.grad is not None


def test_other_kinds_of_padding_are_left_alone():
    assert freeze_convolutions(nn.Conv2d(2, 2, 3, padding="same")) == 0
    assert freeze_convolutions(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")) == 0
