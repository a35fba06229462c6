"""Pickles are refused by their names, and never opened: loading one can run any code."""

import os
import pickle

import pytest
from helpers.attacks import refused
from helpers.checkpoints import write_checkpoint

from gqa.weights.reader import INDEX

NAMES = ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "last.ckpt", "pytorch_model-00001-of-00002.bin"]


class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def plant(path, mark):
    path.write_bytes(pickle.dumps(Bomb(str(mark))))


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_with_a_pickle_alone(tmp_path, name):
    folder = write_checkpoint(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    plant(folder / name, tmp_path / "owned")
    error = refused(folder, tmp_path / "out", "can run any code hidden in it")
    assert error.got == name
    assert not (tmp_path / "owned").exists()


def test_a_pickle_under_the_name_of_safetensors(tmp_path):
    folder = write_checkpoint(tmp_path / "m")
    plant(folder / "model.safetensors", tmp_path / "owned")
    refused(folder, tmp_path / "out", "not a sound safetensors file")
    folder = write_checkpoint(tmp_path / "n", shards=2)
    plant(folder / INDEX, tmp_path / "owned")
    refused(folder, tmp_path / "out", "not an index")
    assert not (tmp_path / "owned").exists()


def test_a_link_to_a_pickle_outside(tmp_path):
    folder = write_checkpoint(tmp_path / "m")
    plant(tmp_path / "bomb.bin", tmp_path / "owned")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "bomb.bin")
    refused(folder, tmp_path / "out", "a link out of the model folder")
    assert not (tmp_path / "owned").exists()
