"""The base model: where it lies, its fingerprint, loading it, its linear layers."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lori_manager import base_files, foreign, pipelines
from lori_manager.architectures import (
    CAUSAL,
    IMAGE_ENCODER,
    Architecture,
    architecture_of,
    check_architecture,
    context_of,
)
from lori_manager.engine.unpacking import unpack_as_one_row
from lori_manager.errors import InvalidInput, LoriError, NotFound, WrongBase, first_line
from lori_manager.quieting import quiet_bitsandbytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lori_manager.config import Config

logger = logging.getLogger(__name__)

_SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json")
_READING = (*_SETTINGS, "tokenizer.json", "special_tokens_map.json", "added_tokens.json",
            "vocab.json", "vocab.txt", "merges.txt", "*.model",
            "preprocessor_config.json")  # fmt: skip
_NO_MATTER = {"transformers_version", "_name_or_path", "name_or_path", "chat_template",
              "torch_dtype", "dtype"}  # fmt: skip
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "vocab.txt",
              "merges.txt"]  # fmt: skip


def locate(
    source: str, revision: str | None = None, *, code: bool = False
) -> tuple[Path, str | None]:
    """The local folder of a base and, for a hub id, the commit that it is.

    Args:
        source: a folder with config.json and safetensors weights, a diffusers pipeline's
            folder, or a hub id of either.
        revision: branch, tag or commit on the hub; refused for a folder.
        code: fetch Python files, too.
    Raises:
        NotFound: neither a usable folder nor something the hub gave.
        InvalidInput: a revision for a folder, a pipeline that is not of the known kind.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise InvalidInput(f"`--revision` is for hub ids; {source!r} is a folder")
        folder = folder.resolve()
        if pipelines.is_pipeline(folder):
            pipelines.check_pipeline(folder)
        elif not (folder / "config.json").is_file():
            raise NotFound(
                f"{folder} holds no config.json: expected a transformers model folder, or a "
                f"diffusers pipeline with {pipelines.INDEX}"
            )
        weight_files(folder)
        return folder, None
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise NotFound(f"base {source!r}: there is no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(source, revision=revision, allow_patterns=[pipelines.INDEX]))
        files, left_out = [*_HUB_FILES, *(["*.py"] if code else [])], None
        if pipelines.is_pipeline(path):
            files, left_out = pipelines.HUB_FILES, pipelines.HUB_VARIANTS
        path = Path(
            snapshot_download(
                source, revision=revision, allow_patterns=files, ignore_patterns=left_out
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
        raise NotFound(
            f"base {source!r} is neither a folder nor available on the hub ({first_line(e)}); "
            "give a path, or check the name and the network"
        ) from e
    if pipelines.is_pipeline(path):
        pipelines.check_pipeline(path)
    weight_files(path)
    return path, path.name


def check_base(
    folder: Path, trust: bool, source: str, revision: str | None, *, known: str | None = None
) -> str | None:
    """Refuse a base whose files ask for too much; the digest of code that may be run.

    Args:
        folder: the base's. trust, source, revision: see `base_files.check_code`.
        known: digest of the code that the base was taken with.
    """
    if pipelines.is_pipeline(folder):
        if trust:
            raise InvalidInput("a diffusion pipeline brings no code: leave --trust-remote-code out")
        return None
    base_files.check_folder(folder)
    if known is not None:
        base_files.may_run_code(folder, known)
        return known
    return base_files.check_code(folder, trust, source, revision)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder that transformers loads.

    That is model.safetensors, else what its index names. Of a pipeline, those of all its parts.
    Raises:
        NotFound: none there. Pickled weights are never loaded.
    """
    if pipelines.is_pipeline(folder):
        return pipelines.weight_files(folder)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        try:
            files = pipelines.named_files(index)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise NotFound(
                f"{index} is not an index of safetensors files beside it: fetch it again"
            ) from e
    else:
        files = sorted(folder.glob("*.safetensors"))
    missing = [f.name for f in files if not f.is_file()]
    if missing or not files:
        what = f"lacks {missing[0]}" if missing else "holds no *.safetensors"
        raise NotFound(f"{folder} {what}: convert the weights with `save_pretrained` first")
    return files


def fingerprint(folder: Path, cache: Path | None = None) -> str:
    """SHA-256 over the base's weights by tensor: name, dtype, shape, bytes.

    The same weights in other shards, in another order or beside other metadata
    give the same fingerprint. A pipeline's tensors are told apart by their part.

    Args:
        folder: the model folder.
        cache: a JSON file that remembers results by path, size and time of
            change, so that unchanged files are not read again.
    """
    files = weight_files(folder)
    stamp = [[str(f), (s := f.stat()).st_size, s.st_mtime_ns, s.st_ino] for f in files]
    if cache is not None and cache.is_file():
        try:
            known = json.loads(cache.read_text("utf-8"))
            if known["files"] == stamp:
                return str(known["fingerprint"])
        except (ValueError, KeyError, TypeError):
            logger.debug("%s is unreadable; reading the weights again", cache)
    tensors: dict[str, bytes] = {}
    for file in files:
        part = f"{file.parent.name}/" if pipelines.is_pipeline(folder) else ""
        found = {part + name: part.encode() + h for name, h in _tensor_hashes(file).items()}
        if twice := sorted(tensors.keys() & found):
            raise WrongBase(
                f"{folder} has tensor {twice[0]!r} in {file.name} and in another file, so which "
                "counts depends on who reads it: fetch the weights again"
            )
        tensors |= found
    h = hashlib.sha256()
    for name in sorted(tensors):
        h.update(tensors[name])
    result = h.hexdigest()
    if cache is not None:
        from lori_manager.store.files import write_atomic

        write_atomic(cache, json.dumps({"files": stamp, "fingerprint": result}).encode())
    return result


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes lie: `[begin, end)` of `file`, of that safetensors dtype and shape."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """How many bytes those are."""
        return self.end - self.begin


def stored_tensors(file: Path) -> tuple[list[StoredTensor], dict[str, str]]:
    """The tensors of a safetensors file in their order there, and its metadata.

    Raises:
        WrongBase: not a safetensors file, or cut short.
    """
    try:
        header, metadata = foreign.read_header(file)
    except (foreign.Malformed, OSError) as e:
        raise WrongBase(f"{file} is not a whole safetensors file: {e}; fetch it again") from e
    tensors = [
        StoredTensor(file, name, t.dtype, t.shape, t.begin, t.end) for name, t in header.items()
    ]
    return sorted(tensors, key=lambda t: (t.begin, t.end, t.name)), metadata


def _tensor_hashes(file: Path) -> dict[str, bytes]:
    """Tensor name -> SHA-256 over its name, dtype, shape and bytes, read as a stream."""
    out = {}
    tensors, _ = stored_tensors(file)
    with file.open("rb") as f:
        for tensor in tensors:
            h = hashlib.sha256(f"{tensor.name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
            f.seek(tensor.begin)
            left = tensor.nbytes
            while left:
                chunk = f.read(min(left, 1 << 22))
                if not chunk:
                    raise WrongBase(f"{file} is cut short at tensor {tensor.name!r}")
                h.update(chunk)
                left -= len(chunk)
            out[tensor.name] = h.digest()
    return out


def load_tokenizer(folder: Path, code: str | None = None) -> Any:
    """The base's tokenizer.

    Args:
        code: digest of the base's own code, which is run only then; see `base_files`.
    Raises:
        NotFound: none that can be used. WrongBase: the code is another.
    """
    from transformers import AutoTokenizer

    run_code = base_files.may_run_code(folder, code)
    with _built(f"{folder} holds no usable tokenizer"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=run_code)


@contextmanager
def _built(what: str) -> Iterator[None]:
    """Whatever a library makes of a stranger's files becomes one line.

    Its readers fail in types of many libraries, those in Rust in one that is no `Exception`.
    """
    try:
        yield
    except LoriError:
        raise
    except BaseException as e:
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        if isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError":
            raise
        raise NotFound(f"{what}: {first_line(e)}") from e


@dataclass
class BaseModel:
    """A loaded, frozen model: a causal language model, or an encoder with a head behind it.

    Attributes:
        model: the transformers model, in eval mode, nothing requiring gradients.
        folder: where it was loaded from.
        precision: "fp32" or "bf16", of the weights; "fp8": bf16, linear layers but the head
            in e4m3.
        base_bits: 4 where all linear layers but the head hold nf4, else 16.
        architecture: what kind of model it is.
        drawn: names of parameters of the head that the folder does not hold.
        code: digest of the base's own code where that may run.
    """

    model: Any
    folder: Path
    precision: str
    base_bits: int = 16
    architecture: Architecture = CAUSAL
    drawn: frozenset[str] = frozenset()
    code: str | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @cached_property
    def tokenizer(self) -> Any:
        """Loaded on first use."""
        return load_tokenizer(self.folder, self.code)

    @cached_property
    def context(self) -> int | None:
        """The longest input in tokens, None where the model has no limit."""
        config = self.model.config
        keys = ("model_type", "max_position_embeddings", "pad_token_id")
        return context_of({key: getattr(config, key, None) for key in keys})

    @cached_property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Full name -> (out_features, in_features) of every linear layer but the head."""
        return linear_shapes(self.model)

    @property
    def decoder(self) -> Any:
        """The model without its vocabulary head, or the model itself where it has no such part."""
        return getattr(self.model, "base_model", self.model)

    def probe(self) -> Tensor:
        """The logits of the model as it is now, hooks included, on two tokens or on one image."""
        import torch

        if self.architecture == IMAGE_ENCODER:
            size = image_format(self.folder).size
            pixels = torch.zeros(1, 3, size, size, device=self.device, dtype=self.model.dtype)
            seen: Tensor = self.model(pixel_values=pixels).logits
            return seen
        ids = torch.zeros(1, 2, dtype=torch.long, device=self.device)
        cache = {} if self.architecture.encoder else {"use_cache": False}
        logits: Tensor = self.model(input_ids=ids, **cache).logits
        return logits

    def head(self) -> tuple[Tensor, Tensor | None] | None:
        """(weight (vocabulary, d), bias) of the vocabulary head behind the decoder.

        None where the model does more than that to its logits (caps or scales them).
        """
        if not self._split_head:
            return None
        module = self.model.get_output_embeddings()
        return module.weight, module.bias

    @cached_property
    def _split_head(self) -> bool:
        """Whether head(decoder(x)) is all there is to the model's logits.

        Some architectures scale or cap their logits after the head; a probe
        decides instead of a list of names.
        """
        import torch
        from torch.nn import functional

        ids = torch.arange(4, device=self.device)[None] % self.model.config.vocab_size
        with torch.no_grad():
            expected = self.model(input_ids=ids, use_cache=False).logits
            try:
                hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
                head = self.model.get_output_embeddings()
                got = functional.linear(hidden, head.weight, head.bias)
            except (AttributeError, TypeError, RuntimeError):
                got = None
        same = got is not None and got.shape == expected.shape and torch.equal(got, expected)
        if not same:
            logger.info("%s post-processes its logits: using its plain forward", self.folder.name)
        return same


@dataclass(frozen=True)
class ImageFormat:
    """What an image encoder takes: `size` pixels a side, (x - mean) / std of values in [0, 1]."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def image_format(folder: Path) -> ImageFormat:
    """What the preprocessor_config.json of an image encoder asks for.

    An image's middle square is scaled to `crop_size`, or without one to `size`.
    Raises:
        NotFound: no such file, or one that does not say.
    """
    path = folder / "preprocessor_config.json"
    try:
        told = foreign.read_json(path)
        size = told.get("crop_size") if told.get("do_center_crop") else None
        size = size or told["size"]
        if isinstance(size, dict):
            size = size.get("height") or size["shortest_edge"]
        mean, std = told["image_mean"], told["image_std"]
        if not told.get("do_normalize", True):
            mean, std = [0.0] * 3, [1.0] * 3
        found = ImageFormat(int(size), tuple(map(float, mean)), tuple(map(float, std)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise NotFound(
            f"{path} does not say the size and normalisation of images ({first_line(e)}): save the "
            "model's image processor there with `save_pretrained`"
        ) from e
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config.json.

    Raises:
        NotFound: missing or not a JSON object.
    """
    return base_files.read_settings(folder / base_files.CONFIG)


def model_type(folder: Path) -> str:
    """What kind of model a folder holds, as its config.json says; of pipelines there is one.

    Raises:
        InvalidInput: an encoder that is set up as a decoder.
    """
    if pipelines.is_pipeline(folder):
        return pipelines.MODEL_TYPE
    config = read_config(folder)
    check_architecture(config)
    return str(config.get("model_type", ""))


def encoding_digest(folder: Path, max_length: int) -> str:
    """SHA-256 of what, beside weights and frozen rows, decides the tokens a model reads and says.

    That is the tokenizer, config.json with the context's length, generation_config.json with
    the tokens that end a text, and how many tokens a row may have. A chat template is no
    part of it, since rows are frozen as it wrote them; nor is who saved the files when.

    Args:
        folder: the base's. Of a pipeline, see `pipelines.reading_digest`.
        max_length: tokens a row.
    """
    if pipelines.is_pipeline(folder):
        return pipelines.reading_digest(folder)
    h = hashlib.sha256(str(max_length).encode())
    for path in sorted(p for pattern in _READING for p in folder.glob(pattern)):
        content = path.read_bytes()
        if path.name in _SETTINGS:
            try:
                values = json.loads(content)
                kept = {k: v for k, v in values.items() if k not in _NO_MATTER}
                content = json.dumps(kept, sort_keys=True).encode()
            except (ValueError, AttributeError):
                logger.debug("%s is no JSON object; taken as it is", path)
        h.update(path.name.encode() + b"\0" + hashlib.sha256(content).digest())
    return h.hexdigest()


def best_device() -> str:
    """ "cuda", "mps" or "cpu", by what there is."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def resolve_precision(precision: str) -> str:
    """ "auto" means bf16 on a GPU that has it, else fp32."""
    if precision != "auto":
        return precision
    import torch

    bf16 = best_device() == "cuda" and torch.cuda.is_bf16_supported()
    return "bf16" if bf16 else "fp32"


def machine_stamp() -> list[str]:
    """What `resolve_precision("auto")` follows from, read without importing torch.

    The machine, the installed torch, the GPUs' driver, and which GPUs may be seen.
    """
    found = importlib.util.find_spec("torch")
    torch = Path(found.origin) if found is not None and found.origin else None
    driver = Path("/proc/driver/nvidia/version")
    return [
        platform.node(),
        f"{torch} {torch.with_name('version.py').stat().st_mtime_ns}" if torch else "",
        driver.read_text("utf-8") if driver.is_file() else "",
        *sorted(str(device) for device in Path("/dev").glob("nvidia[0-9]*")),
        *(f"{k}={os.environ.get(k)}" for k in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")),
    ]


def score_precision(config: Config) -> str:
    """What tells scores of the same weights apart: "fp32", "bf16", on a 4-bit base "bf16-nf4"."""
    precision = resolve_precision(config.precision)
    return precision if config.base_bits == 16 else f"{precision}-nf4"


@dataclass(frozen=True)
class Skeleton:
    """A base's modules without its weights.

    Attributes:
        model: on the meta device; an encoder with a head of two labels.
        linear_shapes: full name -> (out_features, in_features), the head left out.
        transposed: names of those whose weight is (in_features, out_features).
    """

    model: nn.Module
    linear_shapes: dict[str, tuple[int, int]]
    transposed: frozenset[str]


def load_skeleton(folder: Path, code: str | None = None) -> Skeleton:
    """Build the model's modules on the meta device, in well under a second; a pipeline's UNet.

    Args:
        code: digest of the base's own code, which is run only then; see `base_files`.
    Raises:
        NotFound, InvalidInput: no model can be built. WrongBase: the code is another.
    """
    if pipelines.is_pipeline(folder):
        pipelines.check_library("a diffusion pipeline")
        with _built(f"{folder} holds no UNet that diffusers can build"):
            unet = pipelines.bare_unet(folder)
        return Skeleton(unet, linear_shapes(unet), frozenset())
    from transformers import AutoConfig

    base_files.check_folder(folder)
    run_code = base_files.may_run_code(folder, code)
    architecture = check_architecture(read_config(folder))
    with _built(f"{folder} is not {architecture.article} {architecture.title} lori can load"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=run_code)
        model = bare_model(config, run_code=run_code)
    shapes = linear_shapes(model)
    transposed = {n for n in shapes if type(model.get_submodule(n)).__name__ == "Conv1D"}
    return Skeleton(model, shapes, frozenset(transposed))


def bare_model(config: Any, *, run_code: bool = False) -> Any:
    """The modules of a transformers configuration, on the meta device.

    Args:
        run_code: the base's own code may be run, see `base_files.may_run_code`.
    """
    import torch
    import transformers

    auto: Any = getattr(transformers, architecture_of(config.model_type).auto)
    with torch.device("meta"):
        return auto.from_config(config, trust_remote_code=run_code)


def head_names(model: nn.Module) -> list[str]:
    """Names of the modules between an encoder's last layer and the labels, in the model.

    Those that have parameters: a pooler, and what stands beside the encoder. None of a
    language model.
    """
    if not type(model).__name__.endswith(("ForSequenceClassification", "ForImageClassification")):
        return []
    encoder = str(model.base_model_prefix)
    beside = [name for name, _ in model.named_children() if name != encoder]
    inside = [f"{encoder}.pooler"] if getattr(model.base_model, "pooler", None) is not None else []
    modules = dict(model.named_modules())
    return [name for name in (*inside, *beside) if any(True for _ in modules[name].parameters())]


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Full name -> (out_features, in_features) of every linear layer but the head."""
    from lori_manager.engine.layers import linear_shape

    find_head: Any = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    behind = tuple(f"{name}." for name in head_names(model))
    shapes = {name: linear_shape(module) for name, module in model.named_modules()
              if module is not head and not f"{name}.".startswith(behind)}  # fmt: skip
    return {name: shape for name, shape in shapes.items() if shape is not None}


def load_base(
    folder: str | Path,
    precision: str = "auto",
    device: str | None = None,
    base_bits: int = 16,
    code: str | None = None,
) -> BaseModel:
    """Load the base frozen, on the best device there is.

    Args:
        folder: a local model folder.
        precision: "auto" (bf16 on an accelerator that has it, else fp32), "fp32", "bf16",
            "fp8" (bf16, then every linear layer but the head is quantised to e4m3).
        device: "cpu", "cuda", "mps"; None chooses by itself.
        base_bits: 4 packs every linear layer but the head as nf4, see `_nf4`.
        code: digest of the base's own code, which is run only then; see `base_files`.
    Raises:
        NotFound: no causal language model and no encoder there.
        WrongBase: the code is another.
        InvalidInput: 4 bits without bitsandbytes, fp8 on a device that has no such products,
            a configuration that may not be followed.
    """
    import torch
    import transformers

    from lori_manager.engine import fp8

    folder, device = Path(folder), device or best_device()
    precision = resolve_precision(precision)
    bf16 = torch.bfloat16
    dtype = {"fp32": torch.float32, "bf16": bf16, "fp8": bf16}[precision]
    if precision == "fp8":
        fp8.check_device(device)
    base_files.check_folder(folder)
    run_code = base_files.may_run_code(folder, code)
    architecture = check_architecture(read_config(folder))
    auto: Any = getattr(transformers, architecture.auto)
    packed = _nf4(dtype, device, folder, code) if base_bits == 4 else {}
    with _built(f"{folder} is not {architecture.article} {architecture.title} lori can load"):
        model, told = auto.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=run_code,
            output_loading_info=True, **packed,
        )  # fmt: skip
    drawn = _drawn(model, told["missing_keys"], folder) if architecture.encoder else frozenset()
    model.requires_grad_(False)
    model.eval()
    for module in model.modules():
        # A CPU that multiplies bf16 would repack the weights in place at the first forward
        # without gradients, and through repacked ones no gradient passes.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model = model.to(device)
    if precision == "fp8":
        fp8.quantize_base(model, linear_shapes(model))
    return BaseModel(model, folder, precision, base_bits, architecture, drawn, code)


def _drawn(model: Any, missing: Iterable[str], folder: Path) -> frozenset[str]:
    """The head's parameters that a folder does not hold; all others it must."""
    behind = tuple(f"{name}." for name in head_names(model))
    lost = sorted(name for name in missing if not name.startswith(behind))
    if lost:
        raise NotFound(f"{folder} lacks {lost[0]} of the encoder: fetch the model again")
    return frozenset(missing)


def _nf4(compute: torch.dtype, device: str, folder: Path, code: str | None) -> dict[str, Any]:
    """How `from_pretrained` packs linear layers, all but the head, on their way in.

    Blocks of 64 weights in 4-bit NormalFloat, the blocks' scales in 8 bits again (double
    quantisation): 4.13 bits a weight. Each product unpacks its matrix to `compute`.

    Args:
        compute: dtype of the products and of all that is not packed.
        device: where every tensor goes before it is packed.
        folder: of the base; an encoder's head, which may be several layers, is not packed.
        code: digest of the base's own code.
    Raises:
        InvalidInput: no bitsandbytes, or one that transformers does not take.
    Source: QLoRA, arXiv:2305.14314, section 3.
    """
    from transformers import BitsAndBytesConfig
    from transformers.utils.import_utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise InvalidInput(
            "`base_bits` 4 needs bitsandbytes: run `pip install 'lori-manager[cuda]'`, or give 16"
        )
    quiet_bitsandbytes()
    unpack_as_one_row()
    config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=head_names(load_skeleton(folder, code).model) or None,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def resolve_targets(shapes: Mapping[str, tuple[int, int]], targets: Sequence[str]) -> list[str]:
    """Full names of the modules that `targets` mean, sorted.

    Args:
        shapes: every linear module's full name -> shape.
        targets: "all-linear", or names that each equal a module's full name or
            its last dotted parts, whole: "q_proj", "mlp.down_proj".
    Raises:
        InvalidInput: any target that matches nothing, with the names there are.
    """
    chosen: set[str] = set()
    for target in targets:
        if target == "all-linear":
            chosen.update(shapes)
            continue
        found = {n for n in shapes if n == target or n.endswith("." + target)}
        if not found:
            kinds = ", ".join(sorted({n.rsplit(".", 1)[-1] for n in shapes}))
            raise InvalidInput(f"target {target!r} matches no linear layer; there are: {kinds}")
        chosen |= found
    return sorted(chosen)


def check_rank(shapes: Mapping[str, tuple[int, int]], rank: int) -> None:
    """Refuse a rank that a module cannot have.

    Raises:
        InvalidInput: rank above min(out_features, in_features) of a module, named.
    """
    for name, shape in shapes.items():
        if rank > min(shape):
            raise InvalidInput(
                f"`rank` {rank} is above what {name} ({shape[0]} x {shape[1]}) can have; "
                f"use at most {min(min(s) for s in shapes.values())}"
            )
