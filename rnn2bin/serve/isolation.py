"""What a conversion's process takes from itself before it looks at a stranger's file. Linux; elsewhere limits alone.

Set by the child, not between fork and exec: the worker has threads. The order matters: leaving a network changes credentials, which
would clear the wish to die with the worker.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
from contextlib import suppress

NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000
DIE_WITH_PARENT, NO_NEW_PRIVILEGES, SECCOMP, FILTER = 1, 38, 22, 2
# (audit architecture, socket, io_uring_setup) of seccomp's view of this processor
CALLS = {"x86_64": (0xC000003E, 41, 425), "aarch64": (0xC00000B7, 198, 425)}


def limit(*, memory: int, cpu: int, file: int) -> None:
    """Bytes of private memory, seconds of processor time (SIGXCPU, ten more until SIGKILL), bytes of a file; no core dumps."""
    wanted = [
        (resource.RLIMIT_DATA, memory, memory),
        (resource.RLIMIT_CPU, cpu, cpu + 10),
        (resource.RLIMIT_FSIZE, file, file),
        (resource.RLIMIT_CORE, 0, 0),
    ]
    for kind, soft, hard in wanted:
        most = resource.getrlimit(kind)[1]
        bound = lambda value, most=most: value if most == resource.RLIM_INFINITY else min(value, most)
        with suppress(ValueError, OSError):
            resource.setrlimit(kind, (bound(soft), bound(hard)))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a full file is an OSError


def leave_network() -> str:
    """How this process lost the network: `namespace`, `seccomp` (no internet sockets), or `none` where the system permits neither."""
    if not sys.platform.startswith("linux"):
        return "none"
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if libc.unshare(NEW_NETWORK) == 0:
        return "namespace"
    user, group = os.getuid(), os.getgid()
    if libc.unshare(NEW_USER | NEW_NETWORK) == 0:
        for name, line in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with suppress(OSError), open(f"/proc/self/{name}", "w") as stream:
                stream.write(line)
        return "namespace"
    return "seccomp" if _no_internet_sockets(libc) else "none"


def _no_internet_sockets(libc: ctypes.CDLL) -> bool:
    """A filter under which socket(AF_INET or AF_INET6, …) and io_uring fail."""
    if platform.machine() not in CALLS:
        return False
    architecture, socket, ring = CALLS[platform.machine()]
    load, equal, answer, allow, refuse = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050000 | 13  # EACCES
    program = [
        (load, 0, 0, 4),
        (equal, 0, 7, architecture),  # another architecture's calls: refused
        (load, 0, 0, 0),
        (equal, 5, 0, ring),
        (equal, 0, 3, socket),
        (load, 0, 0, 16),  # the address family
        (equal, 2, 0, 2),
        (equal, 1, 0, 10),
        (answer, 0, 0, allow),
        (answer, 0, 0, refuse),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    return bool(libc.prctl(SECCOMP, FILTER, ctypes.byref(header), 0, 0) == 0)


def die_with(parent: int) -> None:
    """SIGKILL for this process when its worker is gone, however it went."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # gone before we asked
        os._exit(1)
