"""Runs a command to which the kernel does not tell its auxiliary vector by prctl: `python3 auxv.py COMMAND...`.

valgrind hides the vDSO from what it runs, in the vector on the stack and in /proc/self/auxv; but it lets prctl(PR_GET_AUXV) through,
which newer programs prefer, and they would then read memory that is not there. Answered with EINVAL, they fall back to the file.
"""

import ctypes
import os
import platform
import struct
import sys

PR_SET_SECCOMP, SECCOMP_MODE_FILTER, PR_SET_NO_NEW_PRIVS, PR_GET_AUXV = 22, 2, 38, 0x41555856
NUMBERS = {"x86_64": 157, "aarch64": 167}
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, EINVAL = 0x7FFF0000, 0x00050000 | 22


def main():
    number = NUMBERS[platform.machine()]
    program = [(LOAD, 0, 0, 0), (JUMP_IF_EQUAL, 0, 3, number), (LOAD, 0, 0, 16), (JUMP_IF_EQUAL, 0, 1, PR_GET_AUXV),
               (RETURN, 0, 0, EINVAL), (RETURN, 0, 0, ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))
    filter_ = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filter_, 0, 0):
        sys.exit(f"a system call cannot be filtered: {os.strerror(ctypes.get_errno())}")
    os.execvp(sys.argv[1], sys.argv[1:])


main()
