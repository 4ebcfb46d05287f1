"""The one kind of error that the study explains itself."""


class StudyError(ValueError):
    """A fault that its message explains: what was wrong, where it came from, what to do."""
