"""What is not said to the user, and that all else is."""

import logging
import subprocess
import sys
import warnings

import pytest

import lori_manager.adapters  # noqa: F401 - quietens what it imports
from lori_manager.gradients import checkpointed
from lori_manager.models import load_base


def test_a_product_that_bitsandbytes_could_not_download_is_not_told_and_all_else_is(caplog):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "no kernels")
    logger.warning("the disk is %s", "full")
    logger.error("it failed")
    assert [record.getMessage() for record in caplog.records] == ["the disk is full", "it failed"]


def test_it_is_quiet_before_peft_is_imported():
    program = "import sys, lori_manager.adapters; assert 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
    program = "import lori_manager.adapters.lora"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert b"gemm_4bit_forward" not in done.stderr


def switched(model):
    return [getattr(module, "gradient_checkpointing", False) for module in model.modules()]


def test_checkpointing_goes_by_the_names_that_transformers_has(tiny_base):
    base = load_base(tiny_base, "fp32", "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        with checkpointed(base.model, True):
            assert any(switched(base.model))
    assert not any(switched(base.model))


@pytest.mark.parametrize("names", ["gradient", "activation"])
def test_checkpointing_goes_by_the_old_names_too(names):
    called = []

    class Model:
        def modules(self):
            return []

    setattr(Model, f"{names}_checkpointing_enable", lambda self, given: called.append(given))
    setattr(Model, f"{names}_checkpointing_disable", lambda self: called.append("off"))
    with checkpointed(Model(), True):
        assert called == [{"use_reentrant": False}]
    assert called[1:] == ["off"]
