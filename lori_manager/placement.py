"""Where adapters go: scores of a model's linear layers by type, and the types that are taken.

PLoP (arXiv:2506.20629) gives adapters to the types of layers with the lowest normalised
feature norms (`feature_norms`): those whose weights are least aligned with a task's inputs.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from lori_manager.errors import InvalidInput

Shapes = Mapping[str, tuple[int, int]]  # full module name -> (out_features, in_features)


@dataclass(frozen=True)
class TypeScore:
    """One type of layers, such as every `q_proj`.

    Attributes:
        name: what `targets` call it.
        score: mean of its modules' scores. spread: their standard deviation, all of them
            being there.
        layers: mean score by number of the block; None are outside of numbered blocks.
        modules: full names.
        outputs, inputs: sums over the modules of out_features and in_features.
    """

    name: str
    score: float
    spread: float
    layers: Mapping[int | None, float]
    modules: tuple[str, ...]
    outputs: int
    inputs: int

    def parameters(self, rank: int) -> int:
        """Entries of B at a rank, which LoRI trains, or its mask chooses from."""
        return rank * self.outputs

    def lora_parameters(self, rank: int) -> int:
        """Entries of A and B at a rank, which LoRA trains."""
        return rank * (self.outputs + self.inputs)


@dataclass(frozen=True)
class Placement:
    """What a task's prompts gave.

    Attributes:
        scores: full module name -> normalised feature norm.
        shapes: full module name -> (out_features, in_features), of the same modules.
        prompts, tokens: how many were read; images have no tokens. seed: of their draw.
        precision: of the base.
        reads: "prompts", or of an encoder "texts" or "images".
    """

    task: str
    task_revision: int
    scores: Mapping[str, float]
    shapes: Shapes = field(repr=False)
    prompts: int
    tokens: int
    seed: int
    precision: str
    reads: str = "prompts"

    @property
    def read(self) -> str:
        """`64 prompts, 1,203 tokens`."""
        return f"{self.prompts} {self.reads}" + (f", {self.tokens:,} tokens" if self.tokens else "")

    @cached_property
    def types(self) -> tuple[TypeScore, ...]:
        """Every type of layers, the lowest score first."""
        found = []
        for name, modules in module_types(self.scores).items():
            layers: dict[int | None, list[float]] = {}
            for module in modules:
                layers.setdefault(block_number(module), []).append(self.scores[module])
            scores = [self.scores[module] for module in modules]
            means = {number: statistics.fmean(own) for number, own in layers.items()}
            sizes = [sum(column) for column in zip(*(self.shapes[m] for m in modules), strict=True)]
            found.append(
                TypeScore(
                    name, statistics.fmean(scores), statistics.pstdev(scores), means,
                    tuple(modules), *sizes,
                )
            )  # fmt: skip
        return tuple(sorted(found, key=lambda one: (one.score, one.name)))

    def chosen(self, top: int, what: str = "`top`") -> tuple[TypeScore, ...]:
        """The `top` types with the lowest scores, the lowest first.

        Args:
            what: what the user calls that number.
        Raises:
            InvalidInput: there are not so many.
        """
        if not 1 <= top <= len(self.types):
            names = ", ".join(one.name for one in self.types)
            raise InvalidInput(
                f"{what} must be from 1 to {len(self.types)}, the types of linear layers there "
                f"are ({names}), got {top}"
            )
        return self.types[:top]

    def targets(self, top: int) -> tuple[str, ...]:
        """What `targets` must hold for those types and nothing else."""
        names: list[str] = []
        for one in self.chosen(top):
            exact = set(named(one.name, self.scores)) == set(one.modules)
            names += [one.name] if exact else one.modules
        return tuple(names)

    def reason(self, top: int) -> str:
        """Why those types, in one sentence."""
        taken, left = self.chosen(top), self.types[top:]
        names = _and([one.name for one in taken])
        verb = "answers" if len(taken) == 1 else "answer"
        told = (
            f"{names} {verb} this task's {self.reads} least, for weights of their size (score "
            f"{_range(taken)}"
        )
        rest = f"; the others {_range(left)}" if left else "; there are no others"
        return f"{told}{rest}), which is where PLoP puts adapters."


def module_types(names: Iterable[str]) -> dict[str, list[str]]:
    """Type -> the modules of that type, in order.

    Modules are of one type where their names are the same behind the number of their block
    or expert: `layers.3.mlp.down_proj` is a `mlp.down_proj`. A type is called by the fewest
    last parts of that which no other type ends with: `down_proj`, but `attn.c_proj` and
    `mlp.c_proj` in GPT-2.
    """
    roles: dict[str, list[str]] = {}
    for name in names:
        roles.setdefault(_role(name), []).append(name)
    found = {}
    for role, modules in roles.items():
        parts = role.split(".")
        others = [other for other in roles if other != role]
        shorter = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        found[next((s for s in shorter if not named(s, others)), role)] = modules
    return found


def named(target: str, names: Iterable[str]) -> list[str]:
    """The names that are `target` or end with it, in whole parts."""
    return [name for name in names if name == target or name.endswith("." + target)]


def block_number(name: str) -> int | None:
    """3 of `model.layers.3.mlp.down_proj`; None without a number."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _role(name: str) -> str:
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdecimal()), default=-1)
    return ".".join(parts[last + 1 :]) or name


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _range(types: Sequence[TypeScore]) -> str:
    low, high = (f"{types[i].score:.2f}" for i in (0, -1))
    return low if low == high else f"{low} to {high}"
