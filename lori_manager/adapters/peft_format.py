"""What PEFT's adapter directory looks like, for the side that writes and the side that reads.

The format is JSON and safetensors, so neither side needs peft itself. Read in
peft 0.21: `utils/save_and_load.py`, `tuners/tuners_utils.py`.
"""

from __future__ import annotations

from collections.abc import Collection

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
CARD_FILE = "README.md"

# safetensors' names of the dtypes that factors come in.
FLOATS = ("F32", "BF16", "F16")

KEY_PREFIX = "base_model.model."
# In the metadata of the weights: PEFT warns of configuration keys that it does not know.
FINGERPRINT_KEY = "lori_base_fingerprint"

# Output heads, by the last part of their names. They are often tied to the embeddings, so
# that merging an update into them would change the embeddings too.
HEADS = frozenset({"lm_head", "embed_out"})


def last_part(module: str) -> str:
    """`q_proj` of `model.layers.0.self_attn.q_proj`."""
    return module.rpartition(".")[2]


def named_by(targets: Collection[str], module: str) -> bool:
    """Whether PEFT's list `targets` means `module`: its full name or its last parts."""
    return module in targets or any(module.endswith(f".{target}") for target in targets)
