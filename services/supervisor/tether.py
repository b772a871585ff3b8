"""Becomes another command, in a process that cannot outlive its parent: `tether.py PARENT_PID COMMAND…`.

A supervisor that is killed with SIGKILL has no chance to stop its children, so the kernel has to: Linux sends a
process its "parent death signal" when the thread that started it ends, and keeps that setting across exec. Run as a
script of its own rather than as `preexec_fn`, which is unsafe in a process with threads (documentation of
`subprocess`). On other systems the command runs untethered.

Standard library only: it is run with ``python -IS``, without this project on the path.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h


def main() -> None:
    parent_pid, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
        if os.getppid() != parent_pid:
            sys.exit("the parent is gone already")  # it died before the line above could take hold
    os.execv(command[0], command)  # noqa: S606  (no shell is wanted)


if __name__ == "__main__":
    main()
