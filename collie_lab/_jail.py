"""Runs one untrusted program, shut in. Started by `collie_lab.sandbox` as a script, with the standard library alone.

Reads `{program, token, memory, seconds}` as JSON from standard input. Limits are set first; then a seccomp filter lets
nothing through but what a computation needs (`_ALLOWED`): the program can read files and write to what is open already,
its own output. It cannot create, change or remove a file, open a socket, start a process or thread, or send a signal.
When it has run to its end, the last line of standard output is the token and the outcome.
"""

import builtins
import ctypes
import io
import json
import os
import platform
import resource
import struct
import sys

# Numbers of system calls on (x86_64, aarch64); None: there is none.
_ALLOWED: dict[str, tuple[int, int | None]] = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "stat": (4, None), "fstat": (5, 80), "lstat": (6, None),
    "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "pread64": (17, 67),
    "readv": (19, 65), "writev": (20, 66), "access": (21, None), "sched_yield": (24, 124), "mremap": (25, 216),
    "madvise": (28, 233), "dup": (32, 23), "nanosleep": (35, 101), "getpid": (39, 172), "exit": (60, 93),
    "uname": (63, 160), "getcwd": (79, 17), "readlink": (89, None), "gettimeofday": (96, 169), "getrlimit": (97, 163),
    "getrusage": (98, 165), "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175),
    "getegid": (108, 177), "getppid": (110, 173), "sigaltstack": (131, 132), "gettid": (186, 178), "futex": (202, 98),
    "sched_getaffinity": (204, 123), "getdents64": (217, 61), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "exit_group": (231, 94), "newfstatat": (262, 79), "readlinkat": (267, 78),
    "faccessat": (269, 48), "getrandom": (318, 278), "statx": (332, 291), "rseq": (334, 293), "faccessat2": (439, 439),
}
#: With the number of their argument of flags: allowed where these ask for reading alone.
_OPENING: dict[str, tuple[tuple[int, int | None], int]] = {"open": ((2, None), 1), "openat": ((257, 56), 2)}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # the column above, and AUDIT_ARCH of the kernel

# Classic BPF (linux/bpf_common.h) on struct seccomp_data: nr at 0, arch at 4, the low half of argument n at 16 + 8n.
_LOAD, _EQUAL, _ANY_OF, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | 1, 0x80000000  # SECCOMP_RET_*; a refused call fails with EPERM
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2


def _instruction(code: int, value: int, true: int = 0, false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, true, false, value)


def _filter(column: int, architecture: int) -> bytes:
    code = [_instruction(_LOAD, 4), _instruction(_EQUAL, architecture, true=1), _instruction(_RETURN, _KILL),
            _instruction(_LOAD, 0)]
    for numbers in _ALLOWED.values():
        if (number := numbers[column]) is not None:
            code += [_instruction(_EQUAL, number, false=1), _instruction(_RETURN, _ALLOW)]
    for numbers, argument in _OPENING.values():
        if (number := numbers[column]) is not None:
            code += [_instruction(_EQUAL, number, false=4), _instruction(_LOAD, 16 + 8 * argument),
                     _instruction(_ANY_OF, _WRITING, true=1), _instruction(_RETURN, _ALLOW),
                     _instruction(_RETURN, _REFUSE)]
    return b"".join([*code, _instruction(_RETURN, _REFUSE)])


def _shut(memory: int, seconds: float) -> None:
    """No more rights for this process, ever.

    Raises:
        OSError: the kernel has no seccomp filters, or they are not for this kind of processor.
    """
    if platform.machine() not in _MACHINES:
        raise OSError(f"there is no filter for {platform.machine()}")
    # Of processor time only in case that nobody looks at the clock any more: who waits ends the program sooner.
    for limit, value in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, int(seconds) + 5),
                         (resource.RLIMIT_FSIZE, 2**20), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NPROC, 0)):
        resource.setrlimit(limit, (value, value))
    code = _filter(*_MACHINES[platform.machine()])
    buffer = ctypes.create_string_buffer(code, len(code))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel takes no seccomp filter")


class _Nothing(io.TextIOBase):
    """Where the program's output goes."""

    def write(self, text: str) -> int:
        return len(text)


def main() -> None:
    """Run the program and tell how it ended."""
    order = json.load(sys.stdin)
    write, token = sys.stdout.write, order["token"]
    flush, leave, show = sys.stdout.flush, os._exit, builtins.repr
    try:
        _shut(order["memory"], order["seconds"])
    except OSError as error:
        outcome = f"no sandbox: {error.strerror or error}"
    else:
        sys.stdout = sys.stderr = _Nothing()
        try:
            exec(compile(order["program"], "<program>", "exec"), {"__name__": "__main__"})
            outcome = "passed"
        except BaseException as error:
            outcome = f"failed: {type(error).__name__}: {show(str(error))[1:-1]:.200}"
    write(f"\n{token} {outcome}\n")
    flush()
    leave(0)


if __name__ == "__main__":
    main()
