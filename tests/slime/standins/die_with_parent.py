"""Become a command that the kernel kills when its parent dies: die_with_parent.py PARENT_PID COMMAND.

Linux keeps the death signal across execv. It is tied to the parent's thread that started this process, so start it
from the main thread. A parent that is gone already shows as another parent's id.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, *command = sys.argv[1:]
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != int(parent):
        sys.exit("the parent is gone")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
