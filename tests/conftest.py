"""The modules lie beside this folder. One thread: in tests so small a second one only waits for a busy core."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)


def read(name):
    with np.load(Path(__file__).parent / "golden" / name, allow_pickle=False) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


@pytest.fixture(scope="session")
def golden():
    """Inputs, outputs and parameters (under official names) of the official model, as tensors. Not to be changed."""
    return read("public_model.npz")


@pytest.fixture(scope="session")
def golden_losses():
    """Its losses and gradients on the same batch."""
    return read("public_losses.npz")
