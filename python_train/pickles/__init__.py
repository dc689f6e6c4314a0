"""The parts of `python_train.official`: what the pickles of the EDM2 reference program consist of, read as data."""
