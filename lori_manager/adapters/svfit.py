"""SVFit: the largest singular values of each weight train, its vectors stay (arXiv:2409.05926).

W = U diag(s) V'. What trains is delta = s - s0, from 0, so that weight decay pulls towards the
base and not away from it. The result is B A with B = U sqrt|delta| and
A = sign(delta) sqrt|delta| V', an ordinary low-rank update.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lori_manager.adapters.kind import Training
from lori_manager.adapters.spectra import spectra
from lori_manager.config import Config
from lori_manager.engine.layers import attached, product_dtype
from lori_manager.engine.svd import FULL, RANDOMISED, Spectrum
from lori_manager.engine.update import LowRankUpdate
from lori_manager.engine.weights import AdapterWeights, Block, KindWeights, Stored
from lori_manager.errors import InvalidInput
from lori_manager.models import BaseModel, resolve_targets

METHODS = ("auto", FULL, RANDOMISED)
_FOREIGN = 0.02  # of an update's norm that no singular values hold; bf16 factors leave .004


class SpectralLinear(nn.Module):
    """h = W x + U diag(delta) V' x, where only delta is a parameter.

    Shapes: x (..., in_features), U (out_features, rank), V (in_features, rank), delta (rank,).
    """

    U: Tensor
    V: Tensor

    def __init__(self, base: nn.Module, spectrum: Spectrum, start: Tensor | None = None) -> None:
        super().__init__()
        self.base = base
        like, dtype = next(base.parameters()), product_dtype(base)
        self.register_buffer("U", spectrum.U.to(like.device, dtype), persistent=False)
        self.register_buffer("V", spectrum.V.to(like.device, dtype), persistent=False)
        first = torch.zeros_like(spectrum.s) if start is None else start
        self.delta = nn.Parameter(first.to(like.device, torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        y: Tensor = self.base(x)
        z = F.linear(x.to(self.V.dtype), self.V.t()) * self.delta.to(self.V.dtype)
        return y + F.linear(z, self.U).to(y.dtype)


@contextmanager
def training(
    base: BaseModel, config: Config, *, steps: int, start: Stored | None = None
) -> Iterator[Training]:
    """See `KindModule`. Goes on from SVFit adapters and their exact merges alone.

    Options: `values`, how many singular values of a module train, all where it has fewer;
    `svd`, "auto" (by size), "full" or "randomised".
    """
    values, method = config.kind_options["values"], config.kind_options["svd"]
    if values < 1 or method not in METHODS:
        raise InvalidInput(
            f"kind `svfit` wants `values` of at least 1 and `svd` of {', '.join(METHODS)}, got "
            f"{values} and {method!r}"
        )
    names = resolve_targets(base.linear_shapes, config.targets)
    found = spectra(base, {n: min(values, *base.linear_shapes[n]) for n in names}, method)
    begun = {} if start is None else _begun(start, found)
    layers = {
        name: SpectralLinear(base.model.get_submodule(name), spectrum, begun.get(name))
        for name, spectrum in found.items()
    }

    def weights(dtype: torch.dtype) -> AdapterWeights:
        parts = {n: _factors(found[n], layer.delta.detach().cpu()) for n, layer in layers.items()}
        B = {name: b.to(dtype) for name, (b, _) in parts.items()}
        A = {name: a.to(dtype) for name, (_, a) in parts.items()}
        return AdapterWeights((Block(B, 1.0, tensors=A),))

    with attached(base.model, layers):
        parameters = {f"{name}.delta": layer.delta for name, layer in layers.items()}
        yield Training(parameters, weights, notes=(_told(found),), facts=_facts(found))


def _factors(spectrum: Spectrum, delta: Tensor) -> tuple[Tensor, Tensor]:
    """B (out_features, rank) and A (rank, in_features) with B A = U diag(delta) V'."""
    root = delta.abs().sqrt()
    return spectrum.U * root, (spectrum.V * (root * delta.sign())).T.contiguous()


def _begun(start: Stored, found: Mapping[str, Spectrum]) -> dict[str, Tensor]:
    """Module name -> the delta that an adapter holds.

    Raises:
        InvalidInput: it holds more than that, or in other modules.
    """
    what = "SVFit goes on from SVFit adapters of the same base, `values` and targets"
    if isinstance(start, KindWeights):
        raise InvalidInput(f"{what}, got one of kind `{start.kind}`: leave --from out")
    updates = start.updates()
    if unknown := sorted(set(updates) - set(found)):
        raise InvalidInput(f"{what}, got one that also updates {unknown[0]!r}: leave --from out")
    return {name: _delta(name, update, found[name], what) for name, update in updates.items()}


def _delta(name: str, update: LowRankUpdate, spectrum: Spectrum, what: str) -> Tensor:
    """The diagonal of U' (B A) V, where that is all there is of B A."""
    A, B = update.A.double().cpu(), update.B.double().cpu() * update.scaling
    left, right = spectrum.U.double().T @ B, A @ spectrum.V.double()
    delta = (left * right.T).sum(1)
    whole = float(((B.T @ B) * (A @ A.T)).sum())
    rest = max(0.0, whole - float(delta.square().sum()))
    if rest > _FOREIGN**2 * whole:
        share = math.sqrt(rest / whole)
        raise InvalidInput(
            f"{what}; {share:.0%} of this one's update of {name!r} is no change of its leading "
            "singular values: leave --from out"
        )
    return delta.float()


def _facts(found: Mapping[str, Spectrum]) -> dict[str, float]:
    shares = [spectrum.energy for spectrum in found.values()]
    return {"energy_mean": round(sum(shares) / len(shares), 4), "energy_min": round(min(shares), 4)}


def _told(found: Mapping[str, Spectrum]) -> str:
    facts, rank = _facts(found), max(len(spectrum.s) for spectrum in found.values())
    return (
        f"the {rank} largest singular values hold {facts['energy_mean']:.1%} of the energy of a "
        f"module's weight on average, {facts['energy_min']:.1%} at least"
    )
