"""What every benchmark prints first: machine, library versions, command, seed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path


def heading(seed: int | str, *, device: str = "cpu", libraries: tuple[str, ...] = ()) -> str:
    """Four lines; `device` "cuda" also names the card."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    machine = f"{cpu}, {os.cpu_count()} cores"
    if "torch" in libraries:
        import torch

        if device == "cuda":
            machine = f"{torch.cuda.get_device_name()}; {machine}"
        machine += f", {torch.get_num_threads()} threads"
    versions = [f"python {platform.python_version()}"]
    for name in libraries:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} (from source)")
    command = shlex.join([Path(sys.executable).name, *sys.argv]).replace(str(Path.home()), "~")
    return "\n".join(
        [f"machine: {machine}", ", ".join(versions), f"command: {command}", f"seed: {seed}"]
    )
