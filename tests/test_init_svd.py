"""`init` svd: A of the base's leading right singular vectors, with everything LoRI does."""

import math
import shutil

import pytest
import torch
from small_workspaces import copied, make_workspace

from lori_manager.adapters.spectra import cache_folder
from lori_manager.config import Config
from lori_manager.engine.layers import linear_weight
from lori_manager.errors import InvalidInput
from lori_manager.models import linear_shapes, load_base
from lori_manager.projecting import start_of
from lori_manager.teaching import TrainOptions

pytestmark = pytest.mark.usefixtures("one_thread")
NAME = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def untaught(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("init") / "ws"
    return make_workspace(folder, tiny_base, init="svd", checkpoint_seconds=0.0)


@pytest.fixture
def ws(untaught, tmp_path):
    return copied(untaught, tmp_path / "ws")


def block_of(ws, adapter):
    (block,) = ws.weights(adapter).blocks
    return block


def test_A_is_the_leading_right_singular_vectors_as_long_as_random_rows(ws):
    trained = ws.train(["colour"])[0]
    block = block_of(ws, trained.adapter)
    A = block.A[NAME].float()
    _, _, Vh = torch.linalg.svd(linear_weight(ws.base_model(Config()).model.get_submodule(NAME)))
    cosines = (A @ Vh[:4].T).abs() * math.sqrt(3)
    assert torch.allclose(cosines, torch.eye(4), atol=0.02)
    random = ws.train(["colour"], ws.settings.config.replace(init="random"))[0]
    rows = block_of(ws, random.adapter).A[NAME].norm(dim=1)
    assert rows.mean() == pytest.approx(float(A.norm(dim=1).mean()), rel=0.1)
    assert block.mask is not None
    assert trained.mask.projection == trained.adapter.projection == block.projection_digest
    assert trained.mask.ref != random.mask.ref


def test_a_sequence_and_a_continuation_keep_that_A(ws):
    first, second = ws.train(["colour", "shape"], sequence="both")
    third = ws.train(["size"], options=TrainOptions(start="both@2", line="more"))[0]
    blocks = [block_of(ws, one.adapter) for one in (first, second, third)]
    assert len({b.projection_digest for b in blocks}) == 1


def test_equal_lines_and_seeds_share_it_and_another_rank_does_not(ws):
    task = ws.store.task("colour")

    def digest(line, **changes):
        config = ws.settings.config.replace(**changes)
        return start_of(ws, task, config, line).block.projection_digest

    assert digest("a") == digest("b") == digest("a", seed=5) != digest("a", rank=3)
    assert digest("a") != digest("a", store_dtype="fp32")


class Stopped(Exception):
    """The interruption."""


def test_stopped_it_goes_on_to_the_same_digest_also_without_the_cache(untaught, tmp_path):
    whole = copied(untaught, tmp_path / "whole").train(["colour"])[0].adapter
    ws = copied(untaught, tmp_path / "stopped")
    config = ws.settings.config

    def tell(told):
        if told.phase.startswith("training") and told.step == 2:
            raise Stopped

    ws.on_progress = tell
    with pytest.raises(Stopped):
        ws.train(["colour"], config)
    shutil.rmtree(cache_folder())
    ws.on_progress = lambda told: None
    assert ws.train(["colour"], config)[0].adapter.digest == whole.digest
    assert not cache_folder().exists()  # the A of the stopped training was gone on with


SVFIT = {"kind": "svfit", "init": "random"}


@pytest.mark.parametrize(
    ("course", "changes"), [("train", {}), ("calibrate", {}), ("train", SVFIT)]
)
def test_how_far_the_singular_values_are_is_told(ws, monkeypatch, tmp_path, course, changes):
    monkeypatch.setenv("LORI_CACHE", str(tmp_path / "cache"))
    told = []
    ws.on_progress = told.append
    config = ws.settings.config.replace(steps=1, calibration_steps=1, **changes)
    ws.calibrate("colour", config) if course == "calibrate" else ws.train(["colour"], config)
    count = len(ws.skeleton().linear_shapes)
    phases = [p for p in told if p.phase == "singular values of weights"]
    assert [(p.step, p.steps) for p in phases] == [(n, count) for n in range(1, count + 1)]


@pytest.mark.parametrize("projection", ["orthogonal", "nullspace"])
def test_another_way_of_making_A_does_not_go_with_it(ws, projection):
    with pytest.raises(InvalidInput, match="--init svd"):
        ws.train(["colour"], ws.settings.config.replace(projection=projection))


def test_a_rank_above_what_a_module_has_is_refused(ws):
    with pytest.raises(InvalidInput, match="`rank` 40"):
        ws.train(["colour"], ws.settings.config.replace(rank=40))


def test_gpt2s_transposed_weights_give_vectors_of_the_inputs(tmp_path):
    import architectures

    from lori_manager.adapters.lori import svd_block
    from lori_manager.models import BaseModel

    model = architectures.gpt2().eval()
    base = BaseModel(model, tmp_path, "fp32")
    block = svd_block(base, Config(rank=2, store_dtype="fp32"))
    for name, (rows, columns) in linear_shapes(model).items():
        assert block.A[name].shape == (2, columns)
        W = linear_weight(model.get_submodule(name)).detach()
        kept = (W @ block.A[name].T * math.sqrt(3)).norm(dim=0)
        assert torch.allclose(kept, torch.linalg.svdvals(W)[:2], rtol=1e-4)
        assert W.shape == (rows, columns)


def test_it_trains_in_bf16(tiny_base):
    from lori_manager.adapters.lori import in_training, svd_block, trainable_layers, trained_B
    from lori_manager.tasks.encoding import Encoded
    from lori_manager.training import fit

    base = load_base(tiny_base, "bf16", "cpu")
    config = Config(rank=2, batch=2)
    layers = trainable_layers(base.model, svd_block(base, config), None)
    with in_training(base, layers) as parameters:
        found = fit(base, parameters, [Encoded([5, 6, 7, 8], 2)] * 2, config, steps=6, peak=1e-2)
    assert found.losses[-1] < found.losses[0]
    assert all(bool(b.any()) for b in trained_B(layers).values())
