"""Doors through which code comes in: they say what would run, and ask; what need not run anything
does not."""

import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import bridge
from bridge import trust
from bridge.native import folder
from tests.fuzz_files.mutating import Canary
from torch_side.models.chgnet import CHGNet
from torch_side.models.franken import Franken
from torch_side.models.mace import MACE
from torch_side.models.sevennet import SevenNet
from torch_side.potentials import checkpoints


def planted(tmp_path):
    """A checkpoint that leaves a file when it is unpickled, and that file."""
    path, canary = tmp_path / "planted.pt", tmp_path / "canary"
    torch.save({"model": torch.ones(3), "hidden": Canary(canary)}, path)
    return path, canary


def manifest(tmp_path):
    place = tmp_path / "program"
    place.mkdir()
    text = '{"format": 1, "versions": {}, "packages": ["a"], "functions": {}, "sha256": {}, '
    (place / "manifest.json").write_text(text + '"handler": "h.so", "processor": ""}')
    return place


CODE = {  # what loads it, and what it says of what would run
    "program": (lambda p: bridge.native.load(manifest(p.parent)), "machine code of 1 packages"),
    "package": (bridge.native.Package, "the machine code in it"),
    "mace": (MACE, "the Python code that is pickled in it"),
    "franken": (Franken, "pickled in it, and in the backbone that it names"),
    "chgnet": (CHGNet, r"pickled in it \(.*pathlib.PosixPath\)"),
    "sevennet": (SevenNet, r"pickled in it \(.*pathlib.PosixPath\)"),
}


@pytest.mark.parametrize("door", CODE)
def test_code_x_asked(door, tmp_path):
    path, canary = planted(tmp_path)
    load, runs = CODE[door]
    text = f"expected trust=True for .*, got trust=False, while loading it runs .*{runs}.* rights; "
    with pytest.raises(ValueError, match=text + "pass trust=True if .*its owner is"):
        load(path)
    assert not canary.exists()


@pytest.mark.parametrize("model", [MACE, Franken, CHGNet, SevenNet])
def test_code_x_trusted(model, tmp_path):
    """The twin: the planted code runs, so that it would have been seen above."""
    path, canary = planted(tmp_path)
    with pytest.raises(Exception):  # noqa: B017 - it is no model
        model(path, trust=True)
    assert canary.exists()


def test_trust_is_a_bool():
    with pytest.raises(TypeError, match="expected trust as True or False, got 1; pass one of them"):
        trust.ask("file", "code", 1)


def test_plain_values_x_read(tmp_path):
    saved = {"w": torch.ones(2), "a": np.arange(3.0), "b": np.array([True]), "n": [1, "x", None]}
    torch.save(saved, tmp_path / "plain.pt")
    found = checkpoints.read(tmp_path / "plain.pt", trust=False)
    assert torch.equal(found["w"], saved["w"]) and found["n"] == saved["n"]
    np.testing.assert_array_equal(found["a"], saved["a"])


def test_a_checkpoint_of_sevenn_x_its_name():
    """A file is read by us, a name by sevenn: the same model."""
    from sevenn.util import pretrained_name_to_path

    ours, theirs = SevenNet(pretrained_name_to_path("7net-0")), SevenNet("7net-0")
    weights = theirs.state_dict()
    assert all(torch.equal(x, weights[name]) for name, x in ours.state_dict().items())


@pytest.mark.parametrize("model", [CHGNet, SevenNet])
def test_what_is_no_checkpoint_names_the_file(model, tmp_path):
    (tmp_path / "none.pt").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=f"expected a checkpoint of torch in {tmp_path}/none.pt"):
        model(str(tmp_path / "none.pt"))
    torch.save({"other": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=rf"expected a checkpoint of \w+ in {tmp_path}/other.pt"):
        model(str(tmp_path / "other.pt"))


def test_a_folder_that_others_can_write_to_holds_no_code(tmp_path):
    place = folder.made(tmp_path / "cache")
    assert place.stat().st_mode & 0o777 == 0o700
    (place / "library.so").write_bytes(b"")
    (place / ("a" * 32)).mkdir()
    place.chmod(0o770)
    text = re.escape(f"nobody else can write to, got {place} with mode 770; look into it, then run")
    for use in (
        lambda: folder.made(place),
        lambda: folder.find(place, "a" * 32),
        lambda: folder.placed(place, "library.so", Path.touch),
    ):
        with pytest.raises(ValueError, match=text):
            use()
    place.chmod(0o755)
    folder.made(place)


def test_a_folder_of_another_user_holds_no_code(tmp_path, monkeypatch):
    if os.geteuid() == 0:
        os.chown(tmp_path, 12345, 12345)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(ValueError, match="a folder of this user's for code that will run, got .*"):
        folder.made(tmp_path)


def test_the_canary_sings(tmp_path):
    pickle.loads(pickle.dumps(Canary(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()
