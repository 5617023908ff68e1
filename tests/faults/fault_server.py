"""Runs acts in forks of a process that has everything imported, under the shim of `shim.c`.

One JSON object a line in: {"act", "place", "acks", "at", "how", "log", "kill_after"}. One line
out: {"status" (-9: killed), "error", "changes", "seconds"}. An act that is to be told as failed
ends with 2 (an error of the package or the system), any other way of failing is a bug and ends
with 3.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import acting
import torch

import lori_manager.adapters.peft_export
import lori_manager.checkpoints  # noqa: F401
from lori_manager.errors import LoriError

torch.set_num_threads(1)
shim = ctypes.CDLL(None)


def child(order: dict, said: int) -> None:
    acks = os.open(order["acks"], os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    log = -1
    if order.get("log"):
        log = os.open(order["log"], os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def ack(told: str) -> None:
        os.write(acks, f"{told}\n".encode())
        shim.shim_mark(told.encode())

    status, error = 0, ""
    how = order.get("how", "-").encode()
    shim.shim_arm(
        order["place"].encode(), ctypes.c_long(order.get("at", -1)), ctypes.c_char(how), log
    )
    try:
        acting.ACTS[order["act"]](Path(order["place"]), ack)
    except (LoriError, OSError) as e:
        status, error = 2, f"{type(e).__name__}: {e}"
    except BaseException:  # noqa: BLE001 - told as a bug
        status, error = 3, traceback.format_exc()
    os.write(said, json.dumps({"error": error, "changes": shim.shim_count()}).encode())
    os._exit(status)


def main() -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        hearing, said = os.pipe()
        start = time.perf_counter()
        process = os.fork()
        if process == 0:
            child(order, said)
        os.close(said)
        if order.get("kill_after") is not None:
            time.sleep(order["kill_after"])
            os.kill(process, signal.SIGKILL)
        with os.fdopen(hearing, "rb") as pipe:
            told = json.loads(pipe.read() or b"{}")
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        told |= {"status": status, "seconds": time.perf_counter() - start}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
