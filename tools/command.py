"""What the tools' commands share: a user's mistake, which ends in one line."""

import argparse


class UserError(Exception):
    """A mistake the user can mend: a command prints it as one line."""


def need(condition, message: str) -> None:
    """Raises UserError unless the condition holds."""
    if not condition:
        raise UserError(message)


class Parser(argparse.ArgumentParser):
    """Raises UserError for wrong arguments."""

    hint = ""  # behind the message

    def error(self, message: str):
        raise UserError(message + self.hint)
