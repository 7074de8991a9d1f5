"""How a batch is asked to stop: safe from a signal handler, and seen by whoever waits for input."""

import os


class Stop:
    """A flag that also wakes up: its descriptor can be read once `ask` was called."""

    def __init__(self) -> None:
        self.asked = False
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)

    def ask(self) -> None:
        """Ask for the stop. Nothing else happens here, so a signal handler may do it."""
        if not self.asked:
            self.asked = True
            os.write(self._write, b"!")

    def fileno(self) -> int:
        """The descriptor, for a selector."""
        return self._read

    def close(self) -> None:
        """Give the descriptors back."""
        os.close(self._read)
        os.close(self._write)
