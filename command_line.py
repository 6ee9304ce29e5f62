"""How every command of the project ends where its command line is wrong."""

from __future__ import annotations

import argparse
from typing import NoReturn


class CommandParser(argparse.ArgumentParser):
    """argparse's, but a mistake ends with its message, not with the whole usage, which would push it out of sight."""

    def error(self, message: str) -> NoReturn:
        """End the program with status 2 and two lines on stderr."""
        self.exit(2, f"error: {message}\nSee {self.prog} --help.\n")
