"""Data of the deep autoencoder benchmarks: synthetic curves, drawn here; MNIST and patches of faces, made from files.

Images are flat float32 rows: curves and digits of 28x28 pixels in [0, 1], `(num_images, 784)`; patches of faces of 25x25
real numbers, `(num_images, 625)`.
"""

import os
from pathlib import Path

import keras
import numpy as np
from scipy import io, ndimage

IMAGE_SIZE = 28
NUM_INK_POINTS = 60
INK = 0.65
BLUR_SIGMA = 0.75
NUM_FINE_POINTS = 256  # Along x, for the length of a curve: spots are off by 0.001 pixels at most.
BLOCK_SIZE = 1000  # Images drawn at a time: some 20 MB of working memory.

FACE_SIZE = 64
PATCH_SIZE = 25
PATCHES_PER_FACE = 414  # 165,600 of 400 faces.
TRAINING_PEOPLE, VALIDATION_PEOPLE = 25, 5  # The other 10 are for testing.
MAX_TURN = np.pi / 2
# Pixels of the face from one pixel of the patch to the next: with the largest, a patch fits into the face however it is turned.
STRIDES = 1.4, 1.8
FACES_URL = "https://ndownloader.figshare.com/files/5976027"  # Where scikit-learn has them from.


def synthetic_curves(num_images, seed):
    """Draws images of smooth curves through three random points, whose true dimension is six.

    They resemble the CURVES data of Hinton & Salakhutdinov (2006), whose exact recipe isn't published: results
    on one don't carry over to the other. The points are drawn from left to right, at least 2 pixels apart in x,
    and joined by a natural cubic spline y(x). 60 spots evenly spaced along it get ink, which a Gaussian blur
    spreads; what leaves the image is lost. The variance, summed over pixels, is near 16.9 as in CURVES.

    Args:
        num_images: Integer, the number of images.
        seed: Integer. The first images of a seed are the same whatever `num_images`.

    Returns:
        Float32 array `(num_images, 784)` in [0, 1].
    """
    uniform = np.random.default_rng(seed).random((num_images, 6))
    images = np.empty((num_images, IMAGE_SIZE**2), "float32")
    for start in range(0, num_images, BLOCK_SIZE):
        block = slice(start, start + BLOCK_SIZE)
        spots = _evenly_spaced(*_random_points(uniform[block]))
        ink = ndimage.gaussian_filter(_ink(*spots), (0, BLUR_SIGMA, BLUR_SIGMA), mode="constant")
        images[block] = np.minimum(ink, 1.0).reshape(-1, IMAGE_SIZE**2)
    return images


def mnist(path=None):
    """Reads the images of MNIST.

    Args:
        path: Path of an `mnist.npz` as Keras has it, with arrays `x_train` and `x_test` of bytes `(N, 28, 28)`.
            None takes the one in the folder that the environment variable `KERAS_HF_DATA` names, else the one in
            Keras' cache, which Keras downloads at first use.

    Returns:
        Two float32 arrays in [0, 1]: training images `(60000, 784)` and test images `(10000, 784)`.

    Raises:
        FileNotFoundError: If there is no file at `path`, or nothing in Keras' cache and no way to download it.
    """
    path = _given_or_in_folder(path, "mnist.npz", "MNIST")
    if path is not None:
        with np.load(path) as arrays:
            images = arrays["x_train"], arrays["x_test"]
    else:
        try:
            (x_train, _), (x_test, _) = keras.datasets.mnist.load_data()
        except Exception as error:  # Keras raises a plain Exception where a download fails.
            raise FileNotFoundError(
                "MNIST is not in Keras' cache and could not be downloaded. Fetch `mnist.npz` where there is a network "
                "(`keras.datasets.mnist.load_data()` leaves it in ~/.keras/datasets) and hand over its path, or put "
                f"it in the folder that KERAS_HF_DATA names. Keras said: {error}"
            ) from error
        images = x_train, x_test
    return tuple(part.reshape(len(part), -1).astype("float32") / 255 for part in images)


def face_patches(seed, patches_per_face=PATCHES_PER_FACE, path=None):
    """Cuts patches of 25x25 pixels from the 400 Olivetti faces, turned, scaled and moved at random.

    They resemble the FACES data of Hinton & Salakhutdinov (2006). As there, 414 patches of each face make 165,600, those
    of the first 25 people are for training, of the last 10 for testing and of the 5 between for validation, pixels are
    shifted to mean zero and scaled by one number to an average variance of 1. How the patches were cut isn't published
    in full. Here they are turned by up to 90 degrees either way, a pixel spans 1.4 to 1.8 of the face's, and all of
    this, as all places where the patch fits into the face, is equally likely; shift and scale are those of the training
    patches. Results on one don't carry over to the other.

    Args:
        seed: Integer. The first patches of a face are the same, but for shift and scale, whatever `patches_per_face`.
        patches_per_face: Integer.
        path: Path of the faces, see `olivetti_faces`.

    Returns:
        Three float32 arrays, of training, validation and test patches, `(num_faces * patches_per_face, 625)` with 250,
        50 and 100 faces, one face after the other.

    Raises:
        FileNotFoundError: If the faces are not to be had; see `olivetti_faces`.
    """
    faces = olivetti_faces(path)
    uniform = [np.random.default_rng([seed, face]).random((patches_per_face, 4)) for face in range(len(faces))]
    patches = np.stack([_cut(*pair) for pair in zip(faces, uniform, strict=True)]).reshape(40, -1, PATCH_SIZE**2)
    ends = TRAINING_PEOPLE, TRAINING_PEOPLE + VALIDATION_PEOPLE
    parts = [part.reshape(-1, PATCH_SIZE**2) for part in np.split(patches, ends)]
    mean = parts[0].mean(axis=0, dtype="float64").astype("float32")
    for part in parts:
        part -= mean
    scale = np.sqrt(np.mean(np.square(parts[0]), dtype="float64")).astype("float32")
    for part in parts:
        part /= scale
    return tuple(parts)


def olivetti_faces(path=None):
    """Reads the Olivetti faces: ten images of each of 40 people.

    Args:
        path: Path of an `olivettifaces.mat` with an array `faces` of bytes `(4096, 400)`, a face a column. None takes
            the one in the folder that the environment variable `KERAS_HF_DATA` names, else the one in Keras' cache,
            which is downloaded at first use.

    Returns:
        Float32 array `(400, 64, 64)` in [0, 1], one person after the other.

    Raises:
        FileNotFoundError: If there is no file at `path`, or nothing in Keras' cache and no way to download it.
    """
    path = _given_or_in_folder(path, "olivettifaces.mat", "The Olivetti faces")
    if path is None:
        try:
            path = keras.utils.get_file("olivettifaces.mat", FACES_URL)
        except Exception as error:
            raise FileNotFoundError(
                "The Olivetti faces are not in Keras' cache and could not be downloaded. Fetch `olivettifaces.mat` from "
                f"{FACES_URL} where there is a network and hand over its path, or put it in the folder that "
                f"KERAS_HF_DATA names. Keras said: {error}"
            ) from error
    columns = io.loadmat(path)["faces"].T.reshape(-1, FACE_SIZE, FACE_SIZE)
    return columns.transpose(0, 2, 1).astype("float32") / 255


def _given_or_in_folder(path, name, what):
    """Returns the path of a file of that name: the one given, or in the folder that KERAS_HF_DATA names, or None."""
    if path is None and "KERAS_HF_DATA" in os.environ:
        in_folder = Path(os.environ["KERAS_HF_DATA"]) / name
        return in_folder if in_folder.exists() else None
    if path is not None and not Path(path).is_file():
        raise FileNotFoundError(f"{what} must be an `{name}` file. Received: path={str(path)!r}, no such file.")
    return path


def _cut(face, uniform):
    """Cuts patches from a face.

    Args:
        face: Float32 array `(64, 64)`.
        uniform: Array `(n, 4)` in [0, 1): angle, stride, row and column of each patch.

    Returns:
        Float32 array `(n, 25, 25)`.
    """
    angle = MAX_TURN * (2 * uniform[:, 0] - 1)
    stride = STRIDES[0] + (STRIDES[1] - STRIDES[0]) * uniform[:, 1]
    along, across = stride * np.cos(angle), stride * np.sin(angle)
    middle, steps = (FACE_SIZE - 1) / 2, np.arange(PATCH_SIZE) - (PATCH_SIZE - 1) / 2
    # What is left on either side of the upright square around the patch.
    margin = middle - steps[-1] * (np.abs(along) + np.abs(across))
    row, column = (middle + margin * (2 * place - 1) for place in uniform[:, 2:].T)
    down, right = steps[:, None], steps
    along, across, row, column = (number[:, None, None] for number in (along, across, row, column))
    places = [row + along * down + across * right, column + along * right - across * down]
    return ndimage.map_coordinates(face, places, order=1, mode="nearest")


def natural_spline(knots, heights, x):
    """Evaluates natural cubic splines through three points each.

    The second derivative is zero at the outer points, so that its value m at the middle one is all there is to
    solve for: `m = 3 (d2 - d1) / (h1 + h2)`, d being the slopes and h the widths of the two sides.

    Args:
        knots: Array `(num_curves, 3)`, x of the points, increasing.
        heights: Array `(num_curves, 3)`, y of the points.
        x: Array `(num_curves, num_points)`, within the knots.

    Returns:
        Array `(num_curves, num_points)`, y at `x`.
    """
    widths = np.diff(knots)
    slopes = np.diff(heights) / widths
    bend = 3 * (slopes[:, 1] - slopes[:, 0]) / widths.sum(axis=1)
    middle = x - knots[:, 1:2]
    # Either side is the chord plus a cubic that vanishes at both of its ends, measured from the middle point.
    right = middle > 0
    width = np.where(right, widths[:, 1:2], widths[:, :1])
    slope = np.where(right, slopes[:, 1:2], slopes[:, :1])
    distance = np.abs(middle)
    cubic = bend[:, None] / 6 * distance * (distance - width) * (2 * width - distance) / width
    return heights[:, 1:2] + slope * middle + cubic


def _random_points(uniform):
    """Maps uniform numbers `(n, 6)` to x and y of three points, `(n, 3)` each, in [2, 26]."""
    first = 2 + 20 * uniform[:, 0]
    second = first + 2 + (22 - first) * uniform[:, 1]
    third = second + 2 + (24 - second) * uniform[:, 2]
    return np.stack([first, second, third], axis=1), 2 + 24 * uniform[:, 3:]


def _evenly_spaced(knots, heights):
    """Returns x and y, `(n, 60)` each, of spots evenly spaced along the splines, both ends included."""
    x = np.linspace(knots[:, 0], knots[:, 2], NUM_FINE_POINTS, axis=1)
    pieces = np.hypot(np.diff(x), np.diff(natural_spline(knots, heights, x)))
    length = np.cumsum(np.pad(pieces, ((0, 0), (1, 0))), axis=1)
    length /= length[:, -1:]
    # One interpolation for all curves: the lengths of curve i lie in [2i, 2i + 1].
    offset = 2 * np.arange(len(x))[:, None]
    wanted = np.linspace(0, 1, NUM_INK_POINTS) + offset
    x = np.interp(wanted.ravel(), (length + offset).ravel(), x.ravel()).reshape(wanted.shape)
    return x, natural_spline(knots, heights, x)


def _ink(x, y):
    """Returns images `(n, 28, 28)` on which each spot `(x, y)` shares its ink among the four pixels around it."""
    # A border of one pixel, and beyond it all the same, takes the ink that falls outside.
    padded = IMAGE_SIZE + 2
    images = np.zeros(len(x) * padded**2)
    column, row = np.floor(x), np.floor(y)
    image = np.arange(len(x))[:, None] * padded**2
    for side_x, side_y in ((0, 0), (0, 1), (1, 0), (1, 1)):
        share = (1 - np.abs(x - column - side_x)) * (1 - np.abs(y - row - side_y))
        pixel_x, pixel_y = (np.clip(p, -1, IMAGE_SIZE).astype(int) + 1 for p in (column + side_x, row + side_y))
        images += np.bincount((image + pixel_y * padded + pixel_x).ravel(), INK * share.ravel(), len(images))
    return images.reshape(-1, padded, padded)[:, 1:-1, 1:-1]
