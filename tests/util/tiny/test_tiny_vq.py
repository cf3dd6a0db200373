"""Training of the bundled VQ tokenizer: stopped and started again it is the same."""

from tests.support.assertions import assert_same
from util.tiny import vq as tiny_vq

STEPS = 4


def test_a_stopped_training_continues_to_the_same_weights(tmp_path, monkeypatch, killed_at_step_2):
    small = {"BATCH": 2, "SAVE_EVERY": 1, "CONTINUOUS": 1, "KMEANS_PICTURES": 32, "REVIVE_EVERY": 2}
    for name, value in small.items():
        monkeypatch.setattr(tiny_vq, name, value)
    whole = tiny_vq.train(tmp_path / "one", STEPS)
    # step 2 revives the codes that no step before has used
    resumed = killed_at_step_2(tiny_vq, lambda: tiny_vq.train(tmp_path / "two", STEPS))
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))
