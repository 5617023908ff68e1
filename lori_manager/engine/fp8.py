"""Frozen matrices in 8-bit floats (e4m3): products at twice bf16's rate on Hopper and Ada GPUs.

The matrix is quantised once, inputs and incoming gradients row by row as they come; A, B and
z = A x stay in the model's own dtype. torchao's float8 training has no frozen weights: it
quantises every weight anew in every forward and backward, so the products are made here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lori_manager.engine import kernels
from lori_manager.errors import InvalidInput

logger = logging.getLogger(__name__)

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
STEP = 16  # both sides of a matrix are multiples of it, for `torch._scaled_mm`
_LEAST = 2.0**-100  # the least scale: its inverse is finite, also for a row of zeros
_ROWS, _WIDTH = 2048, 1024  # below this many rows or columns one more product costs little
_WIDEST = 32768  # columns of a row that a kernel holds at once
_rounding = True


@contextmanager
def inputs_unrounded() -> Iterator[None]:
    """Products take their inputs as they are inside, for comparisons of two forwards.

    Where two ways to compute the same differ by a rounding of bf16, some entries go to
    another e4m3 number, and logits move five times as far as in bf16 (measured on
    SmolLM2-135M): too far for a tolerance that would still find a fault.
    """
    global _rounding
    before, _rounding = _rounding, False
    try:
        yield
    finally:
        _rounding = before


class Rows(NamedTuple):
    """A matrix in e4m3: `values` (n, k) times `scale`, float32 (n, 1)."""

    values: Tensor
    scale: Tensor

    def wide(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers that it stands for."""
        return self.values.to(dtype) * self.scale.to(dtype)


def quantize_rows(x: Tensor | Sequence[Tensor], by: Tensor | None = None) -> Rows:
    """Round each row to e4m3 after its largest entry was scaled to 448.

    A row of zeros stays one. A row with an infinity or NaN is passed on as NaN in all that
    is made from it: looking for such rows would make the host wait for the GPU, and `fit`
    stops at the loss that is not finite.

    Args:
        x: (n, k), or several such matrices that count as one, side by side. Not modified.
        by: float32 (k,) or (1, k); the columns are multiplied by it first.
    """
    parts = [x] if isinstance(x, Tensor) else list(x)
    if not _rounding:
        whole = torch.cat(parts, dim=1)
        whole = whole if by is None else whole * by.view(1, -1)
        return Rows(whole, torch.ones(len(whole), 1, device=whole.device))
    blocks = [1 << (part.shape[1] - 1).bit_length() for part in parts]
    if (
        kernels.usable(parts[0]) and parts[0].shape[0] and len(parts) <= 3
        and sum(blocks) <= _WIDEST and all(part.stride(1) == 1 for part in parts)
    ):  # fmt: skip
        from lori_manager.engine import triton_fp8

        return Rows(*triton_fp8.quantize_rows(parts, by))
    wide = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).float()
    if by is not None:
        wide = wide * by.view(1, -1)
    scale = (wide.abs().amax(1, keepdim=True) * (1 / LARGEST)).clamp_min(_LEAST)
    return Rows((wide * (1 / scale)).to(E4M3), scale)


@dataclass(frozen=True)
class Matrix:
    """A frozen W (out, in) in e4m3, each row with its scale, in both orders of memory.

    Hopper multiplies 8-bit floats only where both factors lie along the summed dimension, so
    x W' reads `rows` and dy W reads `columns`. Both hold the very same numbers, as many bytes
    together as W in bf16. dy W sums over the rows, whose scales therefore go into dy before
    it is rounded: gradients are those of the function that the forward computes, and the
    matrices of several layers lie side by side whatever their scales are. (With a scale of
    its own for each column, the copy would round W a second time: on SmolLM2-135M dx then is
    4.5% off the forward's gradient instead of 2.5%.)

    Attributes:
        rows: e4m3 (out, in).
        columns: e4m3 (in, out), its transpose.
        scale: float32 (1, out), what each row is multiplied by.
        ones: float32 (1, in).
    """

    rows: Tensor
    columns: Tensor
    scale: Tensor
    ones: Tensor

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        return self.rows.shape

    def wide(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers that it stands for, (out, in)."""
        return Rows(self.rows, self.scale.t()).wide(dtype)

    def split(self, widths: Sequence[int]) -> list[Matrix]:
        """Its rows in parts of so many."""
        if len(widths) == 1:
            return [self]
        cut = list(widths)
        parts = zip(
            torch.split(self.rows, cut), torch.split(self.columns, cut, dim=1),
            torch.split(self.scale, cut, dim=1), strict=True,
        )  # fmt: skip
        return [Matrix(rows, columns, scale, self.ones) for rows, columns, scale in parts]


def quantize_matrix(W: Tensor) -> Matrix:
    """W (out, in), any float dtype, in e4m3. Not modified."""
    values, scale = quantize_rows(W)
    ones = torch.ones(1, W.shape[1], device=W.device)
    return Matrix(values, values.t().contiguous(), scale.t(), ones)


def _product(
    x: Rows,
    W: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    low: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """x (W' * scale) + bias + z C, (n, out) of that dtype.

    Shapes: x (n, in), W in e4m3 (out, in), scale (1, out), bias (out,), low = z (n, rank) and
    C (rank, out). Off GPUs the product is made in float32 (float64) of the numbers that the
    factors stand for.
    """
    if low is not None and _takes(x.values, W, *low):
        from lori_manager.engine import triton_fp8

        return triton_fp8.linear_plus(*x, W, scale, bias, *low)
    if x.values.is_cuda and x.values.dtype == E4M3:
        y = torch._scaled_mm(
            x.values, W.t(), scale_a=x.scale, scale_b=scale, bias=bias, out_dtype=dtype,
            use_fast_accum=True,
        )  # fmt: skip
    else:
        wide = torch.promote_types(dtype, torch.float32)
        y = x.values.to(wide).mm(W.to(wide).t()).mul_(x.scale).mul_(scale)
        y = (y if bias is None else y.add_(bias)).to(dtype)
    return y if low is None else y.addmm_(*low)


def _takes(values: Tensor, W: Tensor, z: Tensor, C: Tensor) -> bool:
    """Whether one kernel makes the product with its low-rank part."""
    large = values.shape[0] >= _ROWS and min(W.shape) >= _WIDTH
    if not (large and values.dtype == E4M3 and kernels.usable(z)):
        return False
    aligned = all(
        max(t.stride()) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in (W, z, C)
    )
    return aligned and z.stride(1) == 1 and 1 in C.stride()


def _gradient(
    dys: Sequence[Tensor] | Rows, W: Matrix, dz: Tensor, A: Tensor, dtype: torch.dtype
) -> Tensor:
    """[dy_1 dy_2 ..] W + dz A."""
    rows = dys if isinstance(dys, Rows) else quantize_rows(dys, W.scale)
    return _product(rows, W.columns, W.ones, dtype, low=(dz, A))


def fp8_plus_low_rank(
    x: Tensor,
    W: Matrix,
    b: Tensor | None,
    A: Tensor,
    Bs: Sequence[Tensor],
    widths: Sequence[int],
) -> tuple[Tensor, ...]:
    """`products.frozen_plus_low_rank` with W in e4m3: y = fp8(x) W' + b + the low-rank parts.

    x is quantised once for all of W's rows. Shapes, gradients and the result are as there:
    dx = fp8(dy) W + (dy B) A, dB = dy' (x A'). Gradients are rounded to e4m3 as well, not to
    e5m2: rows have scales of their own, so that range is not short, and e5m2 rounds twice as
    coarsely (on SmolLM2-135M dx is 3.6% off with e4m3, 5.7% with e5m2).
    """
    B: Tensor = Bs[0] if len(Bs) == 1 else torch.block_diag(*Bs)  # type: ignore[no-untyped-call]
    out: tuple[Tensor, ...] = _Fp8PlusLowRank.apply(x, W, b, A, widths, B)  # type: ignore[no-untyped-call]
    return out


class _Fp8PlusLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Matrix,
        b: Tensor | None,
        A: Tensor,
        widths: Sequence[int],
        B: Tensor,
    ) -> tuple[Tensor, ...]:
        z = F.linear(x, A)
        ctx.save_for_backward(z, A, B)
        ctx.W, ctx.widths = W, list(widths)
        rows = quantize_rows(x)
        if b is None:
            biases: Sequence[Tensor | None] = [None] * len(widths)
        else:
            biases = torch.split(b, ctx.widths)
        parts = zip(W.split(ctx.widths), biases, torch.split(B, ctx.widths), strict=True)
        # A product for each part, so that every y lies in one piece.
        return tuple(
            _product(rows, part.rows, part.scale, x.dtype, bias, (z, own.t()))
            for part, bias, own in parts
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        z, A, B = ctx.saved_tensors
        parts = torch.split(B, ctx.widths)
        dz = dys[0].mm(parts[0])
        for dy, own in zip(dys[1:], parts[1:], strict=True):
            dz.addmm_(dy, own)
        dBs = [dy.t().mm(z) for dy in dys]
        dB = dBs[0] if len(dBs) == 1 else torch.cat(dBs)
        dx = _gradient(dys, ctx.W, dz, A, z.dtype) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None, dB


class _Fp8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Matrix, b: Tensor | None) -> Tensor:
        ctx.W = W
        return _product(quantize_rows(x), W.rows, W.scale, x.dtype, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows = quantize_rows(dy, ctx.W.scale)
        return _product(rows, ctx.W.columns, ctx.W.ones, dy.dtype), None, None


def gated_mlp(
    x: Tensor, W: Matrix, A: Tensor, B: Tensor, W_down: Matrix, A_down: Tensor, B_down: Tensor
) -> Tensor:
    """`kernels.gated_mlp` with both matrices in e4m3.

    [g u] = fp8(x) W' + (x A') B', h = silu(g) * u, y = fp8(h) W_down' + (h A_down') B_down'.
    h and the gradient of [g u] are made and quantised by one kernel each on a GPU that has
    them. What is kept for the backward are [g u] and both z; neither x nor h.
    Shapes: x (n, in), W (2 f, in), A (ranks, in), B (2 f, ranks), W_down (out, f),
    A_down (rank, f), B_down (out, rank); gives y (n, out). Gradients for x, B and B_down.
    """
    out: Tensor = _Fp8GatedMLP.apply(x, W, A, B, W_down, A_down, B_down)  # type: ignore[no-untyped-call]
    return out


class _Fp8GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Matrix, A: Tensor, B: Tensor, W_down: Matrix, A_down: Tensor,
        B_down: Tensor,
    ) -> Tensor:  # fmt: skip
        z = F.linear(x, A)
        both = _product(quantize_rows(x), W.rows, W.scale, x.dtype, low=(z, B.t()))
        h, rows = _gate(both)
        z_down = F.linear(h, A_down)
        ctx.save_for_backward(z, both, z_down, A, B, A_down, B_down)
        ctx.W, ctx.W_down = W, W_down
        low = z_down, B_down.t()
        return _product(rows, W_down.rows, W_down.scale, x.dtype, low=low)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, both, z_down, A, B, A_down, B_down = ctx.saved_tensors
        dB_down = dy.t().mm(z_down)
        dh = _gradient([dy], ctx.W_down, dy.mm(B_down), A_down, dy.dtype)
        dboth, rows = _gate_gradient(both, dh, ctx.W.scale)
        dB = dboth.t().mm(z)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _gradient(rows, ctx.W, dboth.mm(B), A, dy.dtype)
        return dx, None, None, dB, None, None, dB_down


def _gates(both: Tensor) -> bool:
    block = 1 << (both.shape[1] // 2 - 1).bit_length()
    return _rounding and kernels.usable(both) and bool(len(both)) and 2 * block <= _WIDEST


def _gate(both: Tensor) -> tuple[Tensor, Rows]:
    """h = silu(g) * u of contiguous [g u] (n, 2 f): (n, f), also quantised."""
    if _gates(both):
        from lori_manager.engine import triton_fp8

        h, *rows = triton_fp8.gate(both)
        return h, Rows(*rows)
    wide = torch.promote_types(both.dtype, torch.float32)
    g, u = both.to(wide).chunk(2, dim=1)
    h = (F.silu(g) * u).to(both.dtype)
    return h, quantize_rows(h)


def _gate_gradient(both: Tensor, dh: Tensor, by: Tensor) -> tuple[Tensor, Rows]:
    """The gradient for [g u] (n, 2 f) of dh (n, f), also quantised after columns times `by`."""
    if _gates(both):
        from lori_manager.engine import triton_fp8

        dboth, *rows = triton_fp8.gate_gradient(both, dh, by)
        return dboth, Rows(*rows)
    wide = torch.promote_types(both.dtype, torch.float32)
    g, u = both.to(wide).chunk(2, dim=1)
    d, s = dh.to(wide), torch.sigmoid(g)
    dboth = torch.cat([d * u * s * (1 + g * (1 - s)), d * g * s], dim=1).to(both.dtype)
    return dboth, quantize_rows(dboth, by)


class Fp8Linear(nn.Module):
    """y = W x + b with a frozen W in e4m3, in the place of a linear layer.

    Shapes: x (..., in_features) -> (..., out_features), of x's dtype. W has no name `weight`:
    its numbers without their scales are no weights.

    Attributes:
        compute_dtype: of the layer that it stands for, and of what is computed around it.
    """

    scale: Tensor
    columns: Tensor
    ones: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Quantise.

        Args:
            weight: (out_features, in_features), both divisible by 16. Not modified.
            bias: (out_features,).
        Raises:
            ValueError: another shape, or values that are not finite.
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        if self.out_features % STEP or self.in_features % STEP:
            raise ValueError(f"`weight` must have sides divisible by {STEP}, got {weight.shape}")
        self.compute_dtype = weight.dtype
        W = quantize_matrix(weight.detach())
        if not bool(torch.isfinite(W.scale).all()):
            raise ValueError("`weight` holds values that are not finite")
        self.rows = nn.Parameter(W.rows, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        for name in ("columns", "scale", "ones"):
            self.register_buffer(name, getattr(W, name), persistent=False)

    @property
    def matrix(self) -> Matrix:
        """W where it now lies."""
        return Matrix(self.rows.data, self.columns, self.scale, self.ones)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        flat = x.reshape(-1, x.shape[-1])
        y: Tensor = _Fp8Product.apply(flat, self.matrix, self.bias)  # type: ignore[no-untyped-call]
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, e4m3"


def fp8_side_by_side(layers: Sequence[Fp8Linear]) -> tuple[Matrix, Tensor | None]:
    """The layers' matrices as one, and their biases, None where none has one.

    As `siblings.side_by_side`: the layers' own matrices become parts of it, with the same
    values; nothing is held twice, and what lies side by side already stays.
    """
    first = layers[0].matrix
    if len(layers) == 1:
        return first, layers[0].bias
    whole = Matrix(
        _joined([layer.rows.data for layer in layers], 0),
        _joined([layer.columns for layer in layers], 1),
        _joined([layer.scale for layer in layers], 1),
        first.ones,
    )
    widths = [layer.out_features for layer in layers]
    for layer, part in zip(layers, whole.split(widths), strict=True):
        layer.rows.data, layer.columns, layer.scale = part.rows, part.columns, part.scale
    bias = None
    if any(layer.bias is not None for layer in layers):
        bias = torch.cat([
            torch.zeros(layer.out_features, dtype=layer.compute_dtype, device=first.rows.device)
            if layer.bias is None else layer.bias.detach() for layer in layers
        ])  # fmt: skip
    return whole, bias


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Matrices side by side along `dim`: as they lie where they do so already, else copied."""
    first = parts[0]
    place = first.data_ptr()
    for part in parts:
        adjacent = (
            part.data_ptr() == place
            and part.stride() == first.stride()
            and part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        )
        if not adjacent:
            raw = torch.uint8 if first.dtype == E4M3 else first.dtype
            return torch.cat([part.view(raw) for part in parts], dim).view(first.dtype)
        place += part.shape[dim] * part.stride(dim) * part.element_size()
    size = list(first.shape)
    size[dim] = sum(part.shape[dim] for part in parts)
    return first.as_strided(size, first.stride())


def check_device(device: str) -> None:
    """Refuse a device that has no 8-bit products; the CPU's are emulated.

    Raises:
        InvalidInput: neither a CPU nor a GPU of compute capability 8.9 or more.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        logger.warning("fp8 is emulated on the CPU: the same numbers as a GPU's, but no speed")
        return
    if kind != "cuda":
        raise InvalidInput(f"`precision` fp8 needs an NVIDIA GPU, not {kind}: give bf16 or fp32")
    found = torch.cuda.get_device_capability(device)
    if found < (8, 9):
        raise InvalidInput(
            f"`precision` fp8 needs a GPU of compute capability 8.9 or more (Ada, Hopper), this "
            f"one has {found[0]}.{found[1]}: give bf16"
        )


def quantize_base(model: nn.Module, names: Iterable[str]) -> int:
    """Put an `Fp8Linear` in the place of every linear layer of those names that fits.

    Layers with a side that 16 does not divide stay as they are; one line of log says how
    many. The place of each is taken before the next is quantised.

    Args:
        model: frozen; changed in place.
        names: full module names of `nn.Linear` or transformers' Conv1D layers.
    Returns:
        How many were replaced.
    Raises:
        InvalidInput: a layer with weights that are not finite.
    """
    done = left = 0
    for name in names:
        layer = model.get_submodule(name)
        weight = cast(Tensor, layer.weight)
        if not isinstance(layer, nn.Linear):
            weight = weight.t()  # Conv1D keeps (in_features, out_features)
        if any(side % STEP for side in weight.shape):
            left += 1
            continue
        try:
            replacement = Fp8Linear(weight, cast("Tensor | None", layer.bias))
        except ValueError as e:
            raise InvalidInput(f"{name} cannot be held in fp8: {e}") from e
        owner, _, child = name.rpartition(".")
        setattr(model.get_submodule(owner), child, replacement.train(layer.training))
        done += 1
    if left:
        logger.info("fp8: %d of %d linear layers have a side that %d does not divide and stay in "
                    "bf16", left, done + left, STEP)  # fmt: skip
    return done
