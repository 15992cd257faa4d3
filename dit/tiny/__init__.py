"""The data, training and evaluation of the tiny model."""
