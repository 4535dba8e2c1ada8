"""Normal distributions of weights whose inverse covariance is a curvature and a diagonal, in three forms. NumPy alone.

With G the curvature `(n, n)` and a diagonal a, the covariance is `(G + diag a)^-1`. `Primal` holds G, `Dual` its root B with `G = B'B`, where there
are fewer rows than weights, and `Kronecker` one product `A x S` a layer. All have

    spectrum          the eigenvalues of G, an array `(n,)`
    trace             their sum
    factorized(a)     the distribution for a diagonal
    summed(parts, c)  the sum of several, each times a number

and distributions have

    forms(rows)       `J C J'` of J `(m, k, n)`: `(m, k, k)`
    roots(normals)    vectors of covariance C, `(s, n)`, from independent normal numbers, `(s, num_normals)`
    diagonal          what was added, `(n,)`
    log_determinant   that of `G + diag a`
    num_effective     the trace of `G C`: how many weights the data determine, not the diagonal
    trace_with(part)  the same of a part of G
    covariance()      C, `(n, n)`

Rasmussen & Williams (2006), sections 2.1 and A.3, for the dual form.
"""

import numpy as np

from keras_hf.common.vectors import epsilon


class Primal:
    """The curvature as a matrix.

    Args:
        curvature: Array `(n, n)`.
    """

    def __init__(self, curvature):
        self.curvature = curvature

    @classmethod
    def summed(cls, parts, factors):
        return cls(sum(factor * part.curvature for part, factor in zip(parts, factors, strict=True)))

    @property
    def trace(self):
        return np.trace(self.curvature)

    @property
    def spectrum(self):
        return np.maximum(np.linalg.eigvalsh(self.curvature), 0)

    def factorized(self, diagonal):
        """Raises `np.linalg.LinAlgError` if the matrix is singular."""
        return PrimalDistribution(self.curvature, diagonal)


class PrimalDistribution:
    """See above; `root` is F with `C = FF'`."""

    def __init__(self, curvature, diagonal):
        matrix = curvature + np.diag(diagonal)
        # Of entries of one size: which weights the data determine does not depend on units.
        scale = 1 / np.sqrt(np.diag(matrix))
        factor = np.linalg.cholesky(scale[:, None] * matrix * scale)
        if np.diag(factor).min() ** 2 < 100 * len(matrix) * epsilon("float64"):
            raise np.linalg.LinAlgError("singular")
        self.root = scale[:, None] * np.linalg.inv(factor).T
        self.diagonal, self.num_normals = diagonal, len(matrix)
        self.log_determinant = 2 * np.sum(np.log(np.diag(factor))) - 2 * np.sum(np.log(scale))
        self.num_effective = len(matrix) - np.sum(diagonal * np.sum(self.root**2, 1))

    def trace_with(self, part):
        return np.sum(self.root * (part.curvature @ self.root))

    def forms(self, rows):
        return _squared(_times(rows, self.root))

    def roots(self, normals):
        return normals @ self.root.T

    def covariance(self):
        return self.root @ self.root.T

    def arrays(self):
        """What makes the same distribution again, by `restored`."""
        return {"form": "primal", "root": self.root}


class Dual:
    """The curvature by its root.

    Args:
        rows: Array `(rows, n)`, B.
    """

    def __init__(self, rows):
        self.rows = rows

    @classmethod
    def summed(cls, parts, factors):
        return cls(np.concatenate([np.sqrt(factor) * part.rows for part, factor in zip(parts, factors, strict=True)]))

    @property
    def trace(self):
        return np.sum(self.rows**2)

    @property
    def spectrum(self):
        values = np.maximum(np.linalg.eigvalsh(self.rows @ self.rows.T), 0)
        return np.concatenate([values, np.zeros(self.rows.shape[1] - len(values))])

    def factorized(self, diagonal):
        """Raises `np.linalg.LinAlgError` unless the diagonal is positive."""
        if not np.all(diagonal > 0):
            raise np.linalg.LinAlgError("singular")
        return DualDistribution(self.rows, diagonal)


class DualDistribution:
    """`C = D - D B'(I + B D B')^-1 B D` with `D = diag(1 / a)`."""

    def __init__(self, rows, diagonal):
        self._rows, self.diagonal, self._inverse = rows, diagonal, 1 / diagonal
        self.num_normals = sum(rows.shape)
        inner = np.eye(len(rows)) + (rows * self._inverse) @ rows.T
        factor = np.linalg.cholesky(inner)
        self._inner_root = np.linalg.inv(factor)
        self.log_determinant = np.sum(np.log(diagonal)) + 2 * np.sum(np.log(np.diag(factor)))
        self.num_effective = len(rows) - np.sum(self._inner_root**2)

    def trace_with(self, part):
        return np.sum(self.forms(part.rows[:, None]))

    def forms(self, rows):
        scaled = rows * self._inverse
        return scaled @ np.swapaxes(rows, 1, 2) - _squared(_times(scaled, self._rows.T @ self._inner_root.T))

    def roots(self, normals):
        # From the prior, and then what the data say of it (Matheron's rule).
        n = len(self.diagonal)
        prior = normals[:, :n] * np.sqrt(self._inverse)
        errors = prior @ self._rows.T + normals[:, n:]
        return prior - errors @ self._inner_root.T @ self._inner_root @ (self._rows * self._inverse)

    def covariance(self):
        moved = self._inner_root @ (self._rows * self._inverse)
        return np.diag(self._inverse) - moved.T @ moved

    def arrays(self):
        """What makes the same distribution again, by `restored`."""
        return {"form": "dual", "rows": self._rows, "diagonal": self.diagonal}


class Kronecker:
    """The curvature as one product `A x S` for each layer; weights come layer by layer, those of a layer as rows of a matrix `(i, j)`.

    Args:
        factors: List of pairs of A `(i, i)`, or `(i,)` where it is diagonal, and S `(j, j)`.
    """

    def __init__(self, factors):
        self.factors = factors

    @classmethod
    def summed(cls, parts, numbers):
        """The parts must have one A for each layer."""
        layers = zip(*(part.factors for part in parts), strict=True)
        return cls([(pairs[0][0], sum(c * s for c, (_, s) in zip(numbers, pairs, strict=True))) for pairs in layers])

    @property
    def trace(self):
        return sum(np.sum(a if a.ndim == 1 else np.diag(a)) * np.trace(s) for a, s in self.factors)

    @property
    def spectrum(self):
        return np.concatenate([np.outer(_spectrum(a), _spectrum(s)).ravel() for a, s in self.factors])

    def factorized(self, diagonal):
        """Takes the mean of the diagonal over each layer. Raises `np.linalg.LinAlgError` unless it is positive."""
        sizes = [len(a) * len(s) for a, s in self.factors]
        added = [part.mean() for part in np.split(diagonal, np.cumsum(sizes)[:-1])]
        if not min(added) > 0:
            raise np.linalg.LinAlgError("singular")
        eigen = [(_eigen(a), _eigen(s)) for a, s in self.factors]
        vectors = [(a_vectors, s_vectors) for (_, a_vectors), (_, s_vectors) in eigen]
        values = [np.outer(a_values, s_values) for (a_values, _), (s_values, _) in eigen]
        return KroneckerDistribution(vectors, values, added)


class KroneckerDistribution:
    """Eigenvectors of both factors of every layer, the eigenvalues of their product `(i, j)`, and what is added to them."""

    def __init__(self, vectors, values, added):
        self._vectors, self._values, self._added = vectors, values, added
        sums = [of_layer + number for of_layer, number in zip(values, added, strict=True)]
        self._stds = [1 / np.sqrt(sum_of_both) for sum_of_both in sums]
        self.diagonal = np.repeat(added, [of_layer.size for of_layer in values])
        self.num_normals = len(self.diagonal)
        self.log_determinant = sum(np.sum(np.log(sum_of_both)) for sum_of_both in sums)
        self.num_effective = sum(np.sum(v / t) for v, t in zip(values, sums, strict=True))

    def trace_with(self, part):
        total = 0.0
        for (_, vectors), (a, s), std in zip(self._vectors, part.factors, self._stds, strict=True):
            # A has the eigenvectors of the sum.
            total += np.sum(std**2 * np.outer(_eigen(a)[0], np.sum(vectors * (s @ vectors), 0)))
        return total

    def _parts(self, rows):
        """Rows `(..., n)` as a list of `(..., i, j)`, one a layer."""
        sizes = [values.size for values in self._values]
        parts = np.split(rows, np.cumsum(sizes)[:-1], axis=-1)
        return [part.reshape(*rows.shape[:-1], *v.shape) for part, v in zip(parts, self._values, strict=True)]

    def forms(self, rows):
        found = 0.0
        for part, (a, s), std in zip(self._parts(rows), self._vectors, self._stds, strict=True):
            found = found + _squared((_turned(part, a, s) * std).reshape(*rows.shape[:-1], -1))
        return found

    def roots(self, normals):
        parts = zip(self._parts(normals), self._vectors, self._stds, strict=True)
        return np.concatenate(
            [_turned(part * std, a, s, back=True).reshape(len(normals), -1) for part, (a, s), std in parts], 1
        )

    def covariance(self):
        unit = np.eye(len(self.diagonal))
        root = self.roots(unit)
        return root.T @ root

    def arrays(self):
        """What makes the same distribution again, by `restored`."""
        found = {"form": "kronecker", "added": self._added}
        for number, ((a, s), values) in enumerate(zip(self._vectors, self._values, strict=True)):
            found |= {f"a_{number}": np.zeros(0) if a is None else a, f"s_{number}": s, f"values_{number}": values}
        return found


def restored(arrays):
    """Returns the distribution whose `arrays()` these are."""
    form = str(arrays["form"])
    if form == "dual":
        return DualDistribution(arrays["rows"], arrays["diagonal"])
    if form == "primal":
        found = object.__new__(PrimalDistribution)
        found.root, found.num_normals = arrays["root"], len(arrays["root"])
        return found
    count = len(arrays["added"])
    vectors = [(arrays[f"a_{i}"] if arrays[f"a_{i}"].size else None, arrays[f"s_{i}"]) for i in range(count)]
    return KroneckerDistribution(vectors, [arrays[f"values_{i}"] for i in range(count)], arrays["added"])


def _times(rows, matrix):
    """`(m, k, n)` times `(n, p)`, as one product: NumPy would make m of it."""
    return (rows.reshape(-1, rows.shape[2]) @ matrix).reshape(*rows.shape[:2], -1)


def _squared(rows):
    """`MM'` of every matrix of `(m, k, n)`."""
    return rows @ np.swapaxes(rows, 1, 2)


def _spectrum(factor):
    return np.maximum(factor if factor.ndim == 1 else np.linalg.eigvalsh(factor), 0)


def _eigen(factor):
    """Eigenvalues and eigenvectors, `None` of a diagonal."""
    if factor.ndim == 1:
        return factor, None
    values, vectors = np.linalg.eigh(factor)
    return np.maximum(values, 0), vectors


def _turned(matrices, a, s, back=False):
    """`a' M s` of M `(..., i, j)`, or `a M s'`."""
    left = matrices if a is None else (a if back else a.T) @ matrices
    return left @ (s.T if back else s)
