"""The command `pianodiff`, which `python -m pianodiff` is, too."""

import signal
import sys
import warnings


def run() -> int:
    """Run the command, and return its exit code.

    While it is imported, which takes a second, and after its end Ctrl-C ends the process at once, as it does a program
    of C: nothing is begun then, or all is done, and Python would show where it was.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # what an interruption leaves half made complains when it goes
    sys.unraisablehook = lambda complaint: None
    warnings.filterwarnings("ignore", "coroutine .* was never awaited")
    from .cli import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
