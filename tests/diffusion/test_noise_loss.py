import dataclasses

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is missing: install the extra `diffusion`")

from tiny_pipeline import make_pipeline

from lori_manager.adapters.kind import Training
from lori_manager.config import Config
from lori_manager.diffusion.noise import normals
from lori_manager.diffusion.noise_loss import held_out_losses, noise_steps, squared_errors
from lori_manager.diffusion.pipeline import load_pipeline
from lori_manager.errors import InvalidInput
from lori_manager.training import no_weights


@pytest.fixture(scope="module")
def base(pipeline):
    return load_pipeline(pipeline, "fp32", "cpu")


@pytest.fixture(scope="module")
def pictures(taught):
    return taught.pictures(taught.store.task("water"), "train")


def drawn(base, n):
    latents, noise = normals("x", (n, 4, 8, 8)), normals("e", (n, 4, 8, 8))
    at = torch.arange(n) * 300 + 20
    return latents, base.texts(["a", "b", "a b"][:n]), noise, at


def alphas():
    """The schedule written out: betas whose roots are evenly spaced."""
    return np.cumprod(1 - np.linspace(1e-4**0.5, 0.02**0.5, 1000) ** 2)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_that_of_the_papers_formula(base, tmp_path, prediction):
    if prediction == "v_prediction":
        base = load_pipeline(make_pipeline(tmp_path / "v", prediction_type=prediction), "fp32")
    latents, texts, noise, at = drawn(base, 3)
    a = torch.from_numpy(alphas()[at.numpy()]).view(-1, 1, 1, 1)
    noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
    v = a.sqrt() * noise - (1 - a).sqrt() * latents
    with torch.no_grad():
        predicted = base.model(noisy.float(), at, encoder_hidden_states=texts).sample
        got = squared_errors(base, latents, texts, noise, at)
    wanted = ((predicted - (noise if prediction == "epsilon" else v)) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(got, wanted.float(), rtol=1e-4, atol=1e-5)


def test_a_unet_that_predicts_something_else_is_refused(tmp_path):
    base = load_pipeline(make_pipeline(tmp_path / "s", prediction_type="sample"), "fp32")
    with pytest.raises(InvalidInput, match="predicts 'sample'"):
        _ = base.scheduler


def test_an_outcome_depends_on_its_row_alone(base, pictures):
    whole = held_out_losses(base, pictures, 8, 64)
    assert whole.shape == (len(pictures),)
    assert whole.dtype == np.float32
    assert np.isfinite(whole).all()
    apart = held_out_losses(base, pictures[::-1], 8, 8)[::-1]
    np.testing.assert_allclose(whole, apart, rtol=1e-5)
    other = [dataclasses.replace(p, key=bytes(16)) for p in pictures]
    assert not np.allclose(held_out_losses(base, other, 8, 64), whole, rtol=1e-3)


def gradient(base, pictures, first, parts, penalty=None):
    layer = base.model.mid_block.attentions[0].transformer_blocks[0].attn2.to_q
    parameter = torch.nn.Parameter(layer.weight.detach().clone())
    original = layer.weight
    layer.weight = parameter
    given = None if penalty is None else lambda: penalty * parameter.sum()
    training = Training({"q": parameter}, no_weights, penalty=given)
    try:
        with noise_steps(base, Config(seed=1), "phase")(training, [[pictures]], first) as steps:
            losses = [float(steps.of(parts)) for _ in range(2)]
    finally:
        layer.weight = original
    return losses, parameter.grad


def test_parts_of_a_step_add_up_to_the_whole(base, pictures):
    four = pictures[:4]
    losses, whole = gradient(base, four, 0, [four])
    again, parts = gradient(base, four, 0, [four[:3], four[3:]])
    assert losses[0] != losses[1]  # each step has noise of its own
    assert losses == pytest.approx(again, rel=1e-5)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-7)


def test_a_step_that_is_gone_on_from_draws_what_it_would_have_drawn(base, pictures):
    four = pictures[:4]
    losses, _ = gradient(base, four, 0, [four])
    assert gradient(base, four, 1, [four])[0][0] == losses[1]


def test_a_kinds_penalty_counts_in_the_gradient(base, pictures):
    four = pictures[:4]
    _, plain = gradient(base, four, 0, [four])
    _, more = gradient(base, four, 0, [four], penalty=2.0)
    torch.testing.assert_close(more - plain, torch.full_like(plain, 2.0), rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_is_refused(base):
    with pytest.raises(InvalidInput, match="--micro-batch"):
        noise_steps(base, Config(checkpointing="on"), "phase")


def test_latents_are_the_means_of_diffusers_own_encoder(base, pictures):
    from lori_manager.tasks.images import load_image

    pixels = torch.from_numpy(load_image(pictures[0].read(), 16).copy()).permute(2, 0, 1)[None]
    with torch.no_grad():
        mean = base.vae.encode(pixels / 127.5 - 1).latent_dist.mean
    wanted = mean[0] * base.vae.config.scaling_factor
    torch.testing.assert_close(base.latents(pictures[:1])[0], wanted, rtol=1e-4, atol=1e-5)
