"""What a kernel says when it is called wrongly."""


class KernelArgumentError(ValueError):
    """An argument of an operation is wrong. The message names it and says what was expected.

    argument: its name in the operation's signature.
    """

    def __init__(self, operation: str, argument: str, problem: str) -> None:
        super().__init__(f"{operation}: {argument} {problem}")
        self.argument = argument
