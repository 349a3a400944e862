"""The errors that a user sees: one clear line that names the file, the tensor and the way out."""


class FewbitsError(Exception):
    """Bad input or a request that cannot be met. The command line prints it as one line and exits with code 2.

    Args:
        message: what is wrong, naming the file and, where there is one, the tensor.
        hint: the way out, as an imperative sentence.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message} {hint}".strip() if hint else message)
        self.message = message
        self.hint = hint
