"""What replacing a file promises: at any time a whole one, the old or the new."""

import pytest

from keras_hf.common.files import replacing


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_old_file_is_whole_until_the_new_one_is_which_has_its_ending_in_the_same_folder(tmp_path):
    path = tmp_path / "run.weights.h5"
    # There is none yet.
    with replacing(path) as new:
        new.write_text("old")
    with replacing(str(path)) as new:
        assert new.parent == tmp_path and new.name.endswith("run.weights.h5")
        new.write_text("ne")
        assert path.read_text() == "old"
        new.write_text("new")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["run.weights.h5"]


def test_what_fails_half_way_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "run.npz"
    path.write_text("old")
    with pytest.raises(OSError, match="No space left"), replacing(path) as new:
        new.write_text("ne")
        raise OSError("No space left on device")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["run.npz"]


def test_what_fails_before_there_is_a_new_file_leaves_none(tmp_path):
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "run.npz"):
        raise KeyboardInterrupt
    assert names(tmp_path) == []
