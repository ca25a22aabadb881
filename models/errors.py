"""The one error type of the model zoo."""


class ModelError(ValueError):
    """A model, data set or checkpoint cannot be used; the message says what is wrong and what to do about it."""
