import pytest
import torch

from fourdfy.types import StepContext


def test_a_training_context_gives_its_generator():
    generator = torch.Generator()
    assert StepContext(3, generator).random is generator


def test_an_evaluation_draws_nothing():
    with pytest.raises(RuntimeError, match="an evaluation has no generator"):
        _ = StepContext(3).random
