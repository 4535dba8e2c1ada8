"""Which cases an update uses: the curvature chunk and the pieces (micro-batches) it is worked through in.

Martens (2010), section 4.3: the gradient on all cases of the batch, products on a chunk of them. The batch is read as a ring that starts at the
chunk, so that the chunk is the first `chunk_size` cases and a union of whole pieces: gradient, products, backtracking and line search then see
the same pieces, with the same random numbers and batch statistics in each.
"""

from typing import NamedTuple

import tensorflow as tf


class Pieces(NamedTuple):
    """How the cases of one replica are divided. All are int32 scalars.

    Attributes:
        num_cases: Cases in the batch.
        chunk_start: The first case of the curvature chunk.
        chunk_size: Cases in the chunk.
        piece_size: Cases in a piece, but for the last piece of the chunk and the last of the rest, which may be smaller.
    """

    num_cases: tf.Tensor
    chunk_start: tf.Tensor
    chunk_size: tf.Tensor
    piece_size: tf.Tensor

    @property
    def num_chunk_pieces(self):
        """Pieces in the chunk; they come first."""
        return _ceil_div(self.chunk_size, self.piece_size)

    @property
    def num_pieces(self):
        """Pieces in the batch."""
        return self.num_chunk_pieces + _ceil_div(self.num_cases - self.chunk_size, self.piece_size)

    def indices(self, number):
        """Returns the places, int32 `(cases,)`, that the cases of piece `number` have in the batch."""
        past_chunk = tf.maximum(number - self.num_chunk_pieces, 0)
        in_chunk = number < self.num_chunk_pieces
        start = tf.where(in_chunk, number * self.piece_size, self.chunk_size + past_chunk * self.piece_size)
        stop = tf.minimum(start + self.piece_size, tf.where(in_chunk, self.chunk_size, self.num_cases))
        return self._around(start, stop)

    def chunk_indices(self):
        """Returns the places, int32 `(chunk_size,)`, that the chunk's cases have in the batch."""
        return self._around(0, self.chunk_size)

    def _around(self, start, stop):
        return (self.chunk_start + tf.range(start, stop)) % tf.maximum(self.num_cases, 1)


def divide(num_cases, curvature_batch_size, piece_size, update_number, seed):
    """Chooses the chunk of an update and divides the batch into pieces.

    There are `ceil(num_cases / curvature_batch_size)` contiguous chunks, the last shifted back so that it is full. Each round of that many updates
    visits all of them, in an order drawn from `(seed, round)`: a plain counter would marry each of several batches to one chunk.

    Args:
        num_cases: int32 scalar, cases in the batch.
        curvature_batch_size: int32 scalar or integer, cases wanted in the chunk, or `None` for all.
        piece_size: Integer or int32 scalar, cases in a piece; `None` for one piece for the chunk and one for the rest.
        update_number: int32 scalar, updates made before this one.
        seed: Integer.

    Returns:
        A `Pieces`.
    """
    if curvature_batch_size is None:
        chunk_start, chunk_size = tf.constant(0), num_cases
    else:
        chunk_size = tf.minimum(curvature_batch_size, num_cases)
        num_chunks = tf.maximum(_ceil_div(num_cases, tf.maximum(chunk_size, 1)), 1)
        turn = tf.stack([tf.constant(seed), update_number // num_chunks])
        order = tf.random.experimental.stateless_shuffle(tf.range(num_chunks), seed=turn)
        chunk_start = tf.minimum(order[update_number % num_chunks] * chunk_size, num_cases - chunk_size)
    at_most = tf.maximum(num_cases, 1)
    piece_size = at_most if piece_size is None else tf.minimum(piece_size, at_most)
    return Pieces(num_cases, chunk_start, chunk_size, piece_size)


def _ceil_div(a, b):
    return (a + b - 1) // b
