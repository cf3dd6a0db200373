"""Training of the bundled VQ tokenizer: stopped and started again it is the same."""

import pytest
import torch

from util.tiny import vq as tiny_vq

STEPS = 4


def test_a_stopped_training_continues_to_the_same_weights(tmp_path, monkeypatch):
    small = {"BATCH": 2, "SAVE_EVERY": 1, "CONTINUOUS": 1, "KMEANS_PICTURES": 32, "REVIVE_EVERY": 2}
    for name, value in small.items():
        monkeypatch.setattr(tiny_vq, name, value)
    whole = tiny_vq.train(tmp_path / "one", STEPS)
    step_of = tiny_vq.learning_rate

    def killed(step, *rest):
        if step == 2:  # which revives the codes that no step before has used
            raise KeyboardInterrupt
        return step_of(step, *rest)

    monkeypatch.setattr(tiny_vq, "learning_rate", killed)
    with pytest.raises(KeyboardInterrupt):
        tiny_vq.train(tmp_path / "two", STEPS)
    monkeypatch.setattr(tiny_vq, "learning_rate", step_of)
    resumed = tiny_vq.train(tmp_path / "two", STEPS)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
