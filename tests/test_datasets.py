import keras
import numpy as np
import pytest
from scipy.interpolate import CubicSpline
from scipy.io import savemat

from examples import datasets


def test_curves_are_flat_float32_images_in_the_unit_interval():
    images = datasets.synthetic_curves(50, seed=0)
    assert (images.shape, images.dtype) == ((50, 784), np.float32)
    assert images.min() >= 0 and images.max() <= 1


def test_curves_vary_as_much_as_the_published_data():
    images = datasets.synthetic_curves(5000, seed=0)
    # 16.9 in CURVES; draws of 5,000 differ by about 0.1.
    assert abs(images.var(axis=0, dtype="float64").sum() - 16.9) < 0.5


def test_curves_depend_on_the_seed_and_not_on_how_many_are_drawn(monkeypatch):
    images = datasets.synthetic_curves(30, seed=5)
    assert np.any(images != datasets.synthetic_curves(30, seed=6))
    monkeypatch.setattr(datasets, "BLOCK_SIZE", 7)
    np.testing.assert_array_equal(images, datasets.synthetic_curves(40, seed=5)[:30])


def test_random_points_keep_their_distance_and_stay_in_their_range():
    corners = np.array([[0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]], float)
    knots, heights = datasets._random_points(corners)
    np.testing.assert_array_equal(knots, [[2, 4, 6], [22, 24, 26], [22, 24, 26]])
    np.testing.assert_array_equal(heights, [[2, 2, 2], [26, 26, 26], [2, 2, 2]])


def test_spline_is_the_natural_cubic_spline():
    rng = np.random.default_rng(0)
    knots = np.cumsum(rng.uniform(2, 10, (20, 3)), axis=1)
    heights = rng.uniform(2, 26, (20, 3))
    x = np.linspace(knots[:, 0], knots[:, 2], 33, axis=1)
    expected = [CubicSpline(*points, bc_type="natural")(at) for *points, at in zip(knots, heights, x, strict=True)]
    np.testing.assert_allclose(datasets.natural_spline(knots, heights, x), expected, atol=1e-10)


def test_spots_lie_evenly_along_the_curve():
    knots, heights = np.array([[2.0, 10.0, 24.0]]), np.array([[3.0, 25.0, 8.0]])
    x, y = datasets._evenly_spaced(knots, heights)
    assert (x[0, 0], y[0, 0], x[0, -1], y[0, -1]) == pytest.approx((2, 3, 24, 8))
    # Length between neighbours by an independent fine polyline.
    spline = CubicSpline(knots[0], heights[0], bc_type="natural")
    fine = [np.linspace(a, b, 500) for a, b in zip(x[0], x[0, 1:], strict=False)]
    lengths = [np.hypot(np.diff(part), np.diff(spline(part))).sum() for part in fine]
    np.testing.assert_allclose(lengths, np.mean(lengths), rtol=2e-3)


def test_a_spot_shares_its_ink_among_four_pixels():
    x, y = np.array([[3.25, 27.5]]), np.array([[5.5, -0.25]])
    image = datasets._ink(x, y)[0] / datasets.INK
    expected = np.zeros((28, 28))
    expected[5:7, 3:5] = [[0.375, 0.125], [0.375, 0.125]]
    expected[0, 27] = 0.375  # The rest of the second spot falls outside.
    np.testing.assert_allclose(image, expected, atol=1e-12)


@pytest.fixture
def small_mnist(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"x_{part}": rng.integers(0, 256, (n, 28, 28), dtype="uint8") for part, n in (("train", 6), ("test", 2))}
    np.savez(tmp_path / "mnist.npz", **arrays)
    return tmp_path / "mnist.npz", arrays


def test_mnist_is_read_from_a_path_or_from_the_data_folder(small_mnist, monkeypatch):
    path, arrays = small_mnist
    monkeypatch.setenv("KERAS_HF_DATA", str(path.parent))
    for x_train, x_test in (datasets.mnist(path), datasets.mnist()):
        assert x_train.dtype == np.float32
        np.testing.assert_allclose(x_train * 255, arrays["x_train"].reshape(6, 784), rtol=1e-6)
        np.testing.assert_allclose(x_test * 255, arrays["x_test"].reshape(2, 784), rtol=1e-6)


def test_mnist_elsewhere_comes_from_keras_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HF_DATA", str(tmp_path))
    images = np.full((3, 28, 28), 255, "uint8")
    monkeypatch.setattr(keras.datasets.mnist, "load_data", lambda: ((images, None), (images[:1], None)))
    x_train, x_test = datasets.mnist()
    assert (x_train.shape, x_test.shape, x_train.min()) == ((3, 784), (1, 784), 1)


@pytest.mark.parametrize(
    ("load", "file", "module", "download"),
    [
        (datasets.mnist, "mnist.npz", keras.datasets.mnist, "load_data"),
        (datasets.olivetti_faces, "olivettifaces.mat", keras.utils, "get_file"),
    ],
    ids=["mnist", "faces"],
)
def test_missing_data_say_what_to_do(load, file, module, download, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=rf"must be an `{file}` file. Received: path=.*nowhere"):
        load(tmp_path / "nowhere")

    def no_network(*arguments, **options):
        raise Exception("URL fetch failure")

    monkeypatch.delenv("KERAS_HF_DATA", raising=False)
    monkeypatch.setattr(module, download, no_network)
    with pytest.raises(FileNotFoundError, match="hand over its path, or put .* URL fetch failure"):
        load()


def test_real_mnist_has_its_known_size_and_brightness(data_dir):
    x_train, x_test = datasets.mnist(data_dir / "mnist.npz")
    assert (x_train.shape, x_test.shape) == ((60_000, 784), (10_000, 784))
    assert x_train.mean(dtype="float64") == pytest.approx(0.1307, abs=1e-4)


@pytest.fixture
def small_faces(tmp_path):
    """A file of 400 random faces, and these, `(400, 64, 64)`."""
    rng = np.random.default_rng(0)
    faces = rng.integers(0, 256, (400, 64, 64), dtype="uint8")
    path = tmp_path / "olivettifaces.mat"
    savemat(path, {"faces": faces.transpose(0, 2, 1).reshape(400, -1).T})
    return path, faces


def test_faces_are_read_from_a_path_or_from_the_data_folder(small_faces, monkeypatch):
    path, faces = small_faces
    monkeypatch.setenv("KERAS_HF_DATA", str(path.parent))
    for found in (datasets.olivetti_faces(path), datasets.olivetti_faces()):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found * 255, faces, rtol=1e-6)


def test_patches_are_cut_where_the_numbers_say():
    rows, columns = np.mgrid[:64, :64].astype("float32")
    # Angle, stride, place: not turned with the smallest stride in the middle; by a right angle; into the first corner.
    uniform = np.array([[0.5, 0, 0.5, 0.5], [0, 0, 0.5, 0.5], [0.75, 1, 0, 0]])
    of_rows, of_columns = datasets._cut(rows, uniform), datasets._cut(columns, uniform)
    steps = 1.4 * (np.arange(25) - 12)
    np.testing.assert_allclose(of_rows[0], np.broadcast_to(31.5 + steps[:, None], (25, 25)), rtol=1e-5)
    np.testing.assert_allclose(of_columns[0], np.broadcast_to(31.5 + steps, (25, 25)), rtol=1e-5)
    np.testing.assert_allclose(of_rows[1], np.broadcast_to(31.5 - steps, (25, 25)), rtol=1e-5)
    np.testing.assert_allclose(of_columns[1], np.broadcast_to(31.5 + steps[:, None], (25, 25)), rtol=1e-5)
    # Turned by 45 degrees, the patch touches the borders with its corners, 1.8 pixels from one to the next.
    assert of_rows[2].min() == pytest.approx(0, abs=1e-4)
    assert of_columns[2].min() == pytest.approx(0, abs=1e-4)
    distance = np.hypot(np.diff(of_rows[2], axis=1), np.diff(of_columns[2], axis=1))
    np.testing.assert_allclose(distance, 1.8, rtol=1e-4)


def test_any_patch_fits_into_its_face():
    uniform = np.random.default_rng(0).random((2000, 4))
    uniform[:4, 1:] = 1 - 1e-9  # The largest, in the last corner.
    for axis in np.mgrid[:64, :64].astype("float64"):
        # A border would repeat: places beyond it would not vary any more.
        patches = datasets._cut(axis, uniform)
        assert -1e-9 <= patches.min() and patches.max() <= 63 + 1e-9
        bend = np.abs(np.diff(patches, n=2, axis=1))
        assert bend.max() < 1e-9


def test_patches_are_split_by_people_fixed_by_the_seed_and_standardized_by_those_for_training(small_faces):
    path, faces = small_faces
    parts = datasets.face_patches(0, 2, path)
    assert [part.shape for part in parts] == [(500, 625), (100, 625), (200, 625)]
    assert all(part.dtype == np.float32 for part in parts)
    np.testing.assert_allclose(parts[0].mean(0, dtype="float64"), 0, atol=1e-6)
    assert parts[0].var(0, dtype="float64").mean() == pytest.approx(1, rel=1e-5)
    again, other = datasets.face_patches(0, 2, path), datasets.face_patches(1, 2, path)
    assert all((one == two).all() for one, two in zip(parts, again, strict=True))
    assert np.any(parts[0] != other[0])
    # The third part begins with the face after those of 30 people, and its first patch is the one of that face's seed.
    uniform = np.random.default_rng([0, 300]).random((1, 4))
    patch = datasets._cut(faces[300].astype("float32") / 255, uniform).ravel()
    raw_mean, raw_scale = raw_statistics(faces, 2)
    np.testing.assert_allclose(parts[2][0], (patch - raw_mean) / raw_scale, atol=1e-4)


def raw_statistics(faces, patches_per_face):
    """Mean, `(625,)`, and scale of the training patches before they are shifted and scaled."""
    patches = [
        datasets._cut(face.astype("float32") / 255, np.random.default_rng([0, number]).random((patches_per_face, 4)))
        for number, face in enumerate(faces[:250])
    ]
    patches = np.concatenate(patches).reshape(-1, 625).astype("float64")
    return patches.mean(0), np.sqrt(patches.var(0).mean())


def test_real_faces_are_people_in_order_and_upright(data_dir):
    faces = datasets.olivetti_faces(data_dir / "olivettifaces.mat")
    assert faces.shape == (400, 64, 64)
    # Two images of one person are more alike than those of two people.
    flat = faces.reshape(400, -1)
    same = np.linalg.norm(np.diff(flat, axis=0)[np.arange(399) % 10 != 9], axis=1).mean()
    others = np.linalg.norm(flat[10:] - flat[:-10], axis=1).mean()
    assert same < 0.8 * others
    # Left and right halves are much alike, upper and lower are not.
    mean = faces.mean(0)
    assert np.abs(mean - mean[:, ::-1]).mean() < 0.5 * np.abs(mean - mean[::-1]).mean()
