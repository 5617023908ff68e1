"""What libraries say at import that is no fault of anybody's and that nobody can act on."""

from __future__ import annotations

import logging

_BITSANDBYTES = "bitsandbytes.backends.cpu.ops"


def _wanted(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward" not in str(record.msg)


def quiet_bitsandbytes() -> None:
    """Drop one warning: that a faster product for 4 bits on a CPU could not be downloaded.

    peft imports bitsandbytes, so it would come with trainings that have no use for it. To be
    called before either is imported; a second call changes nothing.
    """
    logging.getLogger(_BITSANDBYTES).addFilter(_wanted)
