"""PiSSA: LoRA that begins at the principal part of W (arXiv:2404.02948)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lori_manager.adapters.kind import Training, no_start
from lori_manager.adapters.lora import kept
from lori_manager.adapters.peft_layers import unpacked_weight
from lori_manager.config import Config
from lori_manager.engine.layers import attached, product_dtype
from lori_manager.engine.weights import AdapterWeights, Block, Stored
from lori_manager.errors import InvalidInput
from lori_manager.models import BaseModel, check_rank, resolve_targets

SVDS = ("auto", "full", "fast")
# Sides up to which a full decomposition is about as fast as the approximate one.
FULL_SIDE = 512
OVERSAMPLED = 10


class PissaLinear(nn.Module):
    """h = W x + s (B A - B0 A0) x with B = B0 + dB, A = A0 + dA, and s B0 A0 the principal part.

    The paper trains A and B over the residual W - s B0 A0: the same h and the same gradients.
    Here W stays as it is, in any dtype or packing, and what trains is the difference, so that
    a bf16 product rounds the update alone: B A - B0 A0 = dB A + B0 dA.

    Shapes: x (..., in_features), A (rank, in_features), B (out_features, rank).
    """

    A0: Tensor
    B0: Tensor

    def __init__(self, base: nn.Module, A0: Tensor, B0: Tensor, scaling: float) -> None:
        super().__init__()
        self.base = base
        self.scaling = scaling
        self.register_buffer("A0", A0, persistent=False)
        self.register_buffer("B0", B0, persistent=False)
        self.dA = nn.Parameter(torch.zeros_like(A0))
        self.dB = nn.Parameter(torch.zeros_like(B0))

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (2 rank, in_features) and B (out_features, 2 rank) of the update, float32."""
        return torch.cat([self.A0 + self.dA, self.dA]), torch.cat([self.dB, self.B0], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        y: Tensor = self.base(x)
        A, B = self.factors()
        dtype = product_dtype(self.base)
        z = F.linear(x.to(dtype), A.to(dtype))
        return y + F.linear(z, (B * self.scaling).to(dtype)).to(y.dtype)


def principal(
    W: Tensor, rank: int, scaling: float, svd: str, niter: int, seed: int
) -> tuple[Tensor, Tensor]:
    """A0 (rank, in) and B0 (out, rank) with s B0 A0 the best approximation of W of that rank.

    Args:
        W: (out, in) float32.
        svd: "full", or "fast" by `niter` subspace iterations from a random start; "auto" is
            full up to `FULL_SIDE`.
        seed: of the random start.
    """
    if svd == "full" or (svd == "auto" and min(W.shape) <= FULL_SIDE):
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    else:
        devices = [W.device] if W.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            U, S, V = torch.svd_lowrank(W, min(rank + OVERSAMPLED, *W.shape), niter=niter)
        Vh = V.t()
    root = (S[:rank] / scaling).sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root


@contextmanager
def training(
    base: BaseModel, config: Config, *, steps: int, start: Stored | None = None
) -> Iterator[Training]:
    """See `KindModule`. What is stored is an update of the base itself, of rank 2 r.

    Options: `svd`, one of `SVDS`, and `niter`, see `principal`.
    """
    no_start("pissa", start)
    svd, niter = config.kind_options["svd"], config.kind_options["niter"]
    if svd not in SVDS:
        raise InvalidInput(f"option `svd` must be one of {', '.join(SVDS)}, got {svd!r}")
    if niter < 0:
        raise InvalidInput(f"option `niter` must be 0 or more, got {niter}")
    names = resolve_targets(base.linear_shapes, config.targets)
    check_rank({name: base.linear_shapes[name] for name in names}, config.rank)
    layers = {}
    for name in names:
        module = base.model.get_submodule(name)
        W = unpacked_weight(module)
        factors = principal(W, config.rank, config.scaling, svd, niter, config.seed)
        layers[name] = PissaLinear(module, *factors, config.scaling)

    def weights(dtype: torch.dtype) -> AdapterWeights:
        with torch.no_grad():
            found = {name: layer.factors() for name, layer in layers.items()}
        A = kept({name: A for name, (A, _) in found.items()}, dtype)
        B = kept({name: B for name, (_, B) in found.items()}, dtype)
        return AdapterWeights((Block(B, config.scaling, tensors=A),))

    def state() -> dict[str, Tensor]:
        # Another number of threads may decompose W to other last bits.
        return {f"{n}.{k}": getattr(layer, k) for n, layer in layers.items() for k in ("A0", "B0")}

    def load_state(held: Mapping[str, Tensor]) -> None:
        for name, layer in layers.items():
            layer.A0.copy_(held[f"{name}.A0"])
            layer.B0.copy_(held[f"{name}.B0"])

    parameters = {
        f"{name}.{key}": p
        for name, layer in layers.items()
        for key, p in (("A", layer.dA), ("B", layer.dB))
    }
    with attached(base.model, layers):
        yield Training(
            parameters,
            weights,
            state=state,
            load_state=load_state,
            graphs=base.base_bits == 16,
        )
