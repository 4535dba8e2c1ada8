"""Keras callbacks: damping rules, weight decay by evidence, records, progress and backups, and their order in a `fit`."""
