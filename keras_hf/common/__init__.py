"""What every floor stands on: parts, checks of input, flat vectors, Keras' private names, files."""
