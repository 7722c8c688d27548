import torch

from linvit.evaluation.collect import mean_log_probability, scaled_size


def test_probabilities_are_averaged() -> None:
    views = [torch.randn(4, 3), 5 * torch.randn(4, 3), torch.randn(4, 3)]
    expected = torch.stack([view.double().softmax(1) for view in views]).mean(0)
    assert torch.allclose(mean_log_probability(views).exp().double(), expected, atol=1e-6)


def test_sizes_are_whole_patches() -> None:
    assert scaled_size((224, 224), 0.875, multiple=16) == (192, 192)
    assert scaled_size((224, 224), 1.0, multiple=16) == (224, 224)
    assert scaled_size((518, 280), 1.125, multiple=14) == (588, 308)
    assert scaled_size((32, 32), 0.1, multiple=16) == (16, 16)
