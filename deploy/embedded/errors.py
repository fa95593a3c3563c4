"""What the stack can fail with."""


class StackError(Exception):
    """Something the person at the terminal has to hear about, in one message."""


class StoppingError(StackError):
    """A start was given up because the stack is stopping."""


class WrongUsageError(StackError):
    """What was asked for makes no sense here; nothing was done."""


class NotRunningError(StackError):
    """No stack listens on this state directory."""
