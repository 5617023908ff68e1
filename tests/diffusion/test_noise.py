import numpy as np
import torch
from scipy import stats

from lori_manager.diffusion.noise import normals, spread_timesteps, timesteps


def test_normals_are_standard_normal():
    drawn = normals("a label", (4, 5000)).flatten().numpy()
    assert drawn.dtype == np.float32
    assert stats.kstest(drawn, "norm").pvalue > 0.01
    assert abs(np.corrcoef(drawn[::2], drawn[1::2])[0, 1]) < 0.03


def test_a_label_gives_its_numbers_for_ever():
    assert normals("step 0", (3,)).tolist() == [
        0.9758546352386475, -0.517808198928833, -0.17702032625675201,
    ]  # fmt: skip
    assert timesteps("step 0", 4, 1000).tolist() == [922, 714, 989, 401]
    assert not torch.equal(normals("step 0", (3,)), normals("step 1", (3,)))


def test_timesteps_are_spread_evenly():
    drawn = timesteps("q1", 4000, 1000).numpy()
    assert drawn.min() >= 0
    assert drawn.max() <= 999
    assert stats.kstest((drawn + 0.5) / 1000, "uniform").pvalue > 0.01


def test_frozen_timesteps_lie_one_in_each_part():
    drawn = spread_timesteps("row", 8, 1000)
    assert [int(t) // 125 for t in drawn] == list(range(8))
    assert not torch.equal(drawn, spread_timesteps("other row", 8, 1000))
