"""The one error type of the data package."""


class DataError(ValueError):
    """Something is wrong with a corpus or a prepared dataset; the message names it and says what to do."""
