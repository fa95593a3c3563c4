"""What the stack can fail with."""


class StackError(Exception):
    """Something the person at the terminal has to hear about, in one message."""


class StoppingError(StackError):
    """A start was given up because the stack is stopping."""
