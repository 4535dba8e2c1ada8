"""The algorithm, without Keras: one update, values in, values out."""
