"""The kinds of adapters: what each is called, comes from, takes and can do.

One row a kind, read by the settings, the command line, the tables and the contract tests.
How a kind trains and acts is in `adapters/`, in the file of its name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from lori_manager.config import Config
from lori_manager.errors import InvalidInput

LORI = "lori"
OWN_FORM = "folder of lori's own"
# Settings that some kinds have no use for; all others count for every kind.
LOW_RANK = frozenset({"rank", "alpha", "targets"})
_LORI_ALONE = frozenset(
    {"sparsity", "scope", "init", "projection", "nullspace_energy", "nullspace_scale",
     "calibration_steps", "calibration_rows", "dense_learning_rate"}
)  # fmt: skip
PARTIAL = LOW_RANK | _LORI_ALONE


@dataclass(frozen=True)
class Kind:
    """A way to adapt a base.

    Attributes:
        name: what `--kind` takes.
        title: as papers write it.
        source: the paper.
        rate: usual peak learning rate of AdamW.
        settings: which of `PARTIAL`, the settings not common to all kinds, count.
        options: own options, name -> default.
        low_rank: whether the result is an ordinary B A update, which merges, routes and is
            a plain PEFT LoRA elsewhere.
        export: in which form `lori export` writes it.
        served: who can serve that without lori.
        base_bits: of the base that it trains on, None where that is free.
        continues: whether a training may begin at an adapter.
        packed: whether the base's weights may be packed; no where they are read or trained.
        encoders: whether it trains on encoders too.
        not_on: model type of an encoder that it does not train on all the same -> why.
    """

    name: str
    title: str
    source: str
    rate: float
    settings: frozenset[str] = LOW_RANK
    options: Mapping[str, Any] = field(default_factory=dict)
    low_rank: bool = True
    export: str = "PEFT LoRA"
    served: str = "vLLM, PEFT"
    base_bits: int | None = None
    continues: bool = True
    packed: bool = True
    encoders: bool = True
    not_on: Mapping[str, str] = field(default_factory=dict)

    @property
    def own_form(self) -> bool:
        """Whether `lori export` writes a folder of lori's own, see `adapters.own_form`."""
        return self.export.startswith(OWN_FORM)

    @property
    def pipelines(self) -> bool:
        """Whether it trains on diffusion pipelines too, whose UNet is never packed."""
        return self.low_rank and self.base_bits is None


KINDS = {
    kind.name: kind
    for kind in (
        Kind(LORI, "LoRI", "arXiv:2504.07448", 1e-2, PARTIAL),
        Kind("lora", "LoRA", "arXiv:2106.09685", 5e-4),
        Kind("rslora", "rsLoRA", "arXiv:2312.03732", 5e-4),
        Kind(
            "pissa", "PiSSA", "arXiv:2404.02948", 2e-4,
            options={"svd": "auto", "niter": 8}, continues=False,
        ),
        Kind(
            "adalora", "AdaLoRA", "arXiv:2303.10512", 2e-3,
            options={"init_rank": 0, "tinit": 0.15, "tfinal": 0.35, "deltaT": 0, "beta1": 0.85,
                     "beta2": 0.85, "orthogonal": 0.5},
            continues=False,
        ),
        Kind("qlora", "QLoRA", "arXiv:2305.14314", 5e-4, base_bits=4),
        Kind(
            "dora", "DoRA", "arXiv:2402.09353", 5e-4,
            low_rank=False, export="PEFT DoRA", served="PEFT",
        ),
        Kind(
            "ia3", "(IA)3", "arXiv:2205.05638", 5e-3, frozenset(),
            {"outputs": "", "inputs": ""}, low_rank=False, export="PEFT IA3", served="PEFT",
        ),
        Kind(
            "svfit", "SVFit", "arXiv:2409.05926", 3e-2, frozenset({"targets"}),
            {"values": 256, "svd": "auto"}, packed=False,
        ),
        Kind(
            "full", "full fine-tuning", "arXiv:1801.06146", 5e-5, frozenset(),
            {"modules": "all"},
            low_rank=False, export=f"{OWN_FORM}, whole model", served="vLLM (whole), lori",
            packed=False,
        ),
        Kind(
            "bottleneck", "bottleneck adapters", "arXiv:1902.00751", 1e-3, frozenset(),
            {"placement": "houlsby", "reduction": 16, "activation": "relu"},
            low_rank=False, export=OWN_FORM, served="lori",
            not_on={"albert": "its layers are one and the same",
                    "swin": "its layers differ in width"},
        ),
        Kind(
            "prefix", "prefix tuning", "arXiv:2101.00190", 1e-2, frozenset(),
            {"num_virtual_tokens": 20, "projection": False, "hidden": 0},
            low_rank=False, export="PEFT prefix tuning", served="PEFT", encoders=False,
        ),
    )
}  # fmt: skip


def kind_of(name: str) -> Kind:
    """The kind of that name.

    Raises:
        InvalidInput: there is none; says which there are.
    """
    if name not in KINDS:
        raise InvalidInput(f"`kind` must be one of {', '.join(KINDS)}, got {name!r}")
    return KINDS[name]


def resolved(config: Config) -> Config:
    """The settings with all that its kind decides filled in.

    That is its usual learning rate where `learning_rate` is 0, the defaults of its own
    options, and the bits of its base.
    Raises:
        InvalidInput: no such kind, an option that it has not, or of another type, or a packed
            base where the kind needs the plain one, or an fp8 one where it needs 4 bits.
    """
    kind = kind_of(config.kind)
    fault = "--precision fp8" if config.precision == "fp8" else f"--base-bits {config.base_bits}"
    if not kind.packed and (config.base_bits != 16 or config.precision == "fp8"):
        raise InvalidInput(f"kind `{kind.name}` needs the base's plain weights: leave {fault} out")
    if kind.base_bits == 4 and config.precision == "fp8":
        raise InvalidInput(f"kind `{kind.name}` trains on a base of 4 bits: leave {fault} out")
    for key, value in config.kind_options.items():
        if key not in kind.options:
            known = ", ".join(sorted(kind.options)) or "none"
            raise InvalidInput(f"kind `{kind.name}` has no option {key!r}; it has: {known}")
        usual = kind.options[key]
        if type(value) is not type(usual) and not (type(usual) is float and type(value) is int):
            expected = type(usual).__name__
            raise InvalidInput(f"option `{key}` of kind `{kind.name}` is {value!r}, expected "
                               f"{expected} such as {usual!r}")  # fmt: skip
    options = {
        key: type(usual)(config.kind_options.get(key, usual)) for key, usual in kind.options.items()
    }
    return config.replace(
        learning_rate=config.learning_rate or kind.rate,
        kind_options=options,
        base_bits=kind.base_bits,
    )


def check_given(config: Config, given: Collection[str]) -> None:
    """Refuse settings that were named for this run and that its kind has no use for.

    Raises:
        InvalidInput: names them and those that count.
    """
    kind = kind_of(config.kind)
    idle = sorted(PARTIAL.intersection(given) - kind.settings)
    if idle:
        counts = ", ".join(sorted(kind.settings)) or "none of its kind"
        raise InvalidInput(
            f"`{idle[0]}` does not count for kind `{kind.name}`: leave it out (what does, beside "
            f"the settings of every training: {counts}; options: "
            f"{', '.join(sorted(kind.options)) or 'none'})"
        )


def check_bits(config: Config, given: Collection[str]) -> None:
    """Refuse bits of the base that were named for this training and are not its kind's.

    Raises:
        InvalidInput: names both.
    """
    bits = kind_of(config.kind).base_bits
    if "base_bits" in given and bits not in (None, config.base_bits):
        raise InvalidInput(
            f"kind `{config.kind}` trains on a base of {bits} bits: leave --base-bits "
            f"{config.base_bits} out"
        )


def parse_options(kind: str, given: Collection[str]) -> dict[str, Any]:
    """`KEY=VALUE` texts as options of a kind, each in the type of its default.

    Raises:
        InvalidInput: no such kind or option, no `=`, a value that is none of that type.
    """
    usual = kind_of(kind).options
    found: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise InvalidInput(f"`--option` must be KEY=VALUE, got {text!r}")
        if key not in usual:
            known = ", ".join(sorted(usual)) or "none"
            raise InvalidInput(f"kind `{kind}` has no option {key!r}; it has: {known}")
        if key in found:
            raise InvalidInput(f"option {key!r} is given twice; give it once")
        found[key] = _read(key, value, usual[key])
    return found


def _read(key: str, text: str, usual: Any) -> Any:
    if isinstance(usual, bool):
        if text.lower() not in ("true", "false"):
            raise InvalidInput(f"option `{key}` must be true or false, got {text!r}")
        return text.lower() == "true"
    try:
        return type(usual)(text)
    except ValueError as e:
        expected = "a whole number" if isinstance(usual, int) else "a number"
        raise InvalidInput(f"option `{key}` must be {expected}, got {text!r}") from e
