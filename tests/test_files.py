import pytest

from keras_hf.common.files import replacing


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_old_file_is_whole_until_the_new_one_is(tmp_path):
    path = tmp_path / "run.npz"
    path.write_text("old")
    with replacing(str(path)) as new:
        new.write_text("ne")
        assert path.read_text() == "old"
        new.write_text("new")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["run.npz"]


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


def test_a_file_that_was_not_there_is_made(tmp_path):
    with replacing(tmp_path / "run.npz") as new:
        new.write_text("new")
    assert (tmp_path / "run.npz").read_text() == "new"


def test_the_new_file_has_the_ending_of_the_old_in_the_same_folder(tmp_path):
    with replacing(tmp_path / "run.weights.h5") as new:
        new.touch()
        assert new.parent == tmp_path and new.name.endswith("run.weights.h5")
