"""The handwritten digits that scikit-learn brings."""

from models.datasets.split import Dataset, hold_out, make_split


def load() -> Dataset:
    """Loads the 1,797 digits; a fifth of each class is for testing, as they come without a test part."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    pixels, labels = load_digits(return_X_y=True)
    rest, test = hold_out(make_split(pixels.reshape(-1, 1, 8, 8), labels, white=16), 0.2)
    train, validation = hold_out(rest, 0.25)
    return Dataset("digits", train, validation, test, tuple("0123456789"), (1, 8, 8))
