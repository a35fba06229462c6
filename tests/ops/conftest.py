import pytest
import torch


@pytest.fixture(scope="module")
def fresh_memory_is_nan():
    """torch.empty gives NaN, so what a kernel leaves unwritten, or reads before it wrote, shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
