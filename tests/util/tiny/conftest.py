"""Short trainings of the bundled models, one of them killed."""

import pytest
import torch

from util.files import sha256_of
from util.tiny import gpt as tiny_gpt
from util.weights import save_safetensors

PICTURES = 8


@pytest.fixture
def write_codes(monkeypatch):
    """Writes random codes into a folder, as those of a tokenizer's file; checkpoints at every step."""
    monkeypatch.setattr(tiny_gpt, "SAVE_EVERY", 1)

    def write(folder, tokenizer, digest=None):
        torch.manual_seed(5)
        codes = torch.randint(512, (PICTURES, 256), dtype=torch.int16)
        metadata = {"tokenizer_sha256": digest or sha256_of(tokenizer)}
        save_safetensors(folder / "codes.safetensors", {"codes": codes}, metadata)
        return folder

    return write


@pytest.fixture
def killed_at_step_2(monkeypatch):
    """train() of a module, killed in its third step and started again."""

    def call(module, train):
        step_of = module.learning_rate

        def killed(step, *rest):
            if step == 2:
                raise KeyboardInterrupt
            return step_of(step, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(module, "learning_rate", killed)
            with pytest.raises(KeyboardInterrupt):
                train()
        return train()

    return call
