"""Isolates itself, then starts a command that sees nothing but named files, and no network.

    python -I enter.py LEVEL REQUEST.json

tools/audit/cell.py starts this file, which imports the standard library alone. LEVEL is one of

    namespaces  a root folder of its own in which only named paths are mounted, read-only, and a
                network whose loopback is its only device; as root or in a user namespace
    landlock    the kernel refuses other files and TCP; needs neither root nor a package
    none        nothing is refused

REQUEST.json: "command", "folder" (where the command starts, and may write), "readable", "devices"
and "root", an empty folder for the first level. Exit status: the command's; 125 if the level cannot
be had.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import platform
import signal
import socket
import struct
import sys
from pathlib import Path

UNAVAILABLE = 125
LIBC = ctypes.CDLL(None, use_errno=True)

# Of <sched.h>: spaces of mounts, of users, of processes, of networks, of messages.
CLONE_NEWNS = 0x20000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_NEWIPC = 0x08000000
# Of <sys/mount.h> and <linux/mount.h>.
MS_RDONLY = 1
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MNT_DETACH = 2
LOCKED_FLAGS = 15  # read-only, no setuid, no devices, no programs
MOUNT_ATTR_RDONLY = 1
# Of <fcntl.h>.
AT_RECURSIVE = 0x8000
AT_FDCWD = -100
# Of <sys/prctl.h> and <linux/capability.h>.
PR_SET_PDEATHSIG = 1
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
CAPABILITY_VERSION = 0x20080522
CAPABILITIES = 64  # more than there are
# Of <linux/sockios.h> and <net/if.h>.
SIOCGIFFLAGS = 0x8913
SIOCSIFFLAGS = 0x8914
IFF_UP = 1
INTERFACE = "16sH14x"  # struct ifreq: a name, flags, and room

# Numbers of system calls; those from 400 on are the same on every machine.
ON_ARM = platform.machine() == "aarch64"
PIVOT_ROOT = 41 if ON_ARM else 155
CAPSET = 91 if ON_ARM else 126
MOUNT_SETATTR = 442
LANDLOCK_CREATE = 444
LANDLOCK_ADD = 445
LANDLOCK_RESTRICT = 446

# Rights to files, of <linux/landlock.h>; later versions of Landlock know more of them.
FS_EXECUTE = 1
FS_WRITE_FILE = 2
FS_READ_FILE = 4
FS_READ_DIR = 8
FS_TRUNCATE = 1 << 14
FS_IOCTL_DEVICE = 1 << 15
FS_OF_VERSION = {4: (1 << 15) - 1}  # all of them, by version
FS_OF_LATER = (1 << 16) - 1
# What may be allowed of a file; the others are rights to what is in a folder.
FS_OF_FILES = FS_EXECUTE | FS_WRITE_FILE | FS_READ_FILE | FS_TRUNCATE | FS_IOCTL_DEVICE
NET_BIND_AND_CONNECT = 3
SCOPES = 3  # abstract sockets and signals stay among themselves
NET_SINCE = 4  # the version that knows TCP
SCOPE_SINCE = 6
RULE_PATH = 1
QUERY_VERSION = 1


def demand(result: int, what: str) -> int:
    """A system call's result; OSError if it failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def call(number: int, what: str, *arguments) -> int:
    """A system call that libc has no function for."""
    wide = [ctypes.c_long(x) if isinstance(x, int) else x for x in arguments]
    return demand(LIBC.syscall(ctypes.c_long(number), *wide), what)


def mount(source: str, target: Path, kind: str, flags: int) -> None:
    """mount(2)."""
    names = [text.encode() for text in (source, str(target), kind)]
    demand(LIBC.mount(*names, ctypes.c_ulong(flags), None), f"mounting {target}")


# ---- Namespaces --------------------------------------------------------------------------------


def enter_namespaces(request: dict) -> None:
    """Returns in the process that is to become the command; the others wait for it and exit."""
    spaces = CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC
    user = os.getuid()
    group = os.getgid()
    if LIBC.unshare(spaces | CLONE_NEWUSER) == 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    else:
        demand(LIBC.unshare(spaces), "unshare")  # root may, where there are no user namespaces
    wait_for_child()  # the first one in a new space of processes, whose end ends all others
    raise_loopback()
    build_root(request)
    wait_for_child()
    drop_capabilities()


def wait_for_child() -> None:
    """Forks; returns in the child alone. The parent ends as the child does."""
    child = os.fork()
    if child == 0:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        return
    while True:
        ended, status = os.wait()
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def raise_loopback() -> None:
    """Turns the only device of a new network on, by which processes of one machine talk.

    A new network has it off, and torchrun's ranks would not find each other.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        asked = struct.pack(INTERFACE, b"lo", 0)
        (flags,) = struct.unpack_from("H", fcntl.ioctl(one, SIOCGIFFLAGS, asked), 16)
        fcntl.ioctl(one, SIOCSIFFLAGS, struct.pack(INTERFACE, b"lo", flags | IFF_UP))


def build_root(request: dict) -> None:
    """Makes a root folder of the named paths, read-only but for the command's folder.

    It lies in memory, so that nothing of it is left. The old root is left by pivot_root(), behind
    which no path leads back to it.
    """
    root = Path(request["root"])
    mount("none", Path("/"), "", MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", 0)
    for name in ("tmp", "proc", "dev/shm"):
        (root / name).mkdir(parents=True)
    try:
        mount("proc", root / "proc", "proc", 0)
    except OSError:  # a container hides parts of /proc: then no fresh one may be had
        mount("/proc", root / "proc", "", MS_BIND | MS_REC)
    for path in request["readable"]:
        show(root, path)
        if not os.path.islink(path):
            set_read_only(root / path.lstrip("/"))
    for path in [*request["devices"], request["folder"]]:
        show(root, path)
    os.chdir(root)
    call(PIVOT_ROOT, "pivot_root", b".", b".")
    demand(LIBC.umount2(b".", MNT_DETACH), "leaving the old root")
    os.chdir(request["folder"])


def show(root: Path, path: str) -> None:
    """Mounts a path at the same place under a new root; a symbolic link is made anew."""
    target = root / path.lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    if os.path.islink(path):
        if not os.path.lexists(target):
            target.symlink_to(os.readlink(path))
        return
    if os.path.isdir(path):
        target.mkdir(exist_ok=True)
    elif not target.exists():
        target.touch()
    mount(path, target, "", MS_BIND | MS_REC)


def set_read_only(target: Path) -> None:
    """Makes a mount, and all mounts in it, read-only.

    Kernels before 5.12 have no call for the latter: there, mounts within a mount stay as they are.
    """
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
    where = ctypes.c_char_p(str(target).encode())
    size = ctypes.sizeof(attributes)
    what = f"{target} read-only"
    try:
        call(MOUNT_SETATTR, what, AT_FDCWD, where, AT_RECURSIVE, ctypes.byref(attributes), size)
    except OSError:
        locked = os.statvfs(target).f_flag & LOCKED_FLAGS  # what a user namespace may not take away
        mount("none", target, "", MS_BIND | MS_REMOUNT | MS_RDONLY | locked)


def drop_capabilities() -> None:
    """Takes away every privilege, those that a root user would get back with a new program too."""
    for capability in range(CAPABILITIES):
        LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    demand(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    call(CAPSET, "capset", ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))


# ---- Landlock ----------------------------------------------------------------------------------


def enter_landlock(request: dict) -> None:
    """Restricts this process, and all that it starts, to the named files and to no TCP."""
    version = call(LANDLOCK_CREATE, "Landlock", None, 0, QUERY_VERSION)
    if version < NET_SINCE:
        raise OSError(0, f"this kernel's Landlock (version {version}) does not know TCP")
    rights = FS_OF_VERSION.get(version, FS_OF_LATER)
    scopes = SCOPES if version >= SCOPE_SINCE else 0
    handled = (ctypes.c_uint64 * 3)(rights, NET_BIND_AND_CONNECT, scopes)
    size = 24 if scopes else 16
    rules = call(LANDLOCK_CREATE, "Landlock", ctypes.byref(handled), size, 0)
    reading = FS_EXECUTE | FS_READ_FILE | FS_READ_DIR
    using = FS_READ_FILE | FS_WRITE_FILE | FS_IOCTL_DEVICE
    for path in [*request["readable"], "/proc"]:
        allow(rules, path, reading & rights)
    for path in request["devices"]:
        allow(rules, path, using & rights)
    allow(rules, request["folder"], rights)
    drop_capabilities()
    call(LANDLOCK_RESTRICT, "Landlock", rules, 0)
    os.close(rules)


def allow(rules: int, path: str, rights: int) -> None:
    """Adds a rule: these rights to a file, or to all that is in a folder.

    What is not there needs no rule.
    """
    if not os.path.isdir(path):
        rights &= FS_OF_FILES
    with contextlib.suppress(FileNotFoundError):
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, place))
        call(LANDLOCK_ADD, f"allowing {path}", rules, RULE_PATH, ctypes.byref(rule), 0)
        os.close(place)


# ---- Command -----------------------------------------------------------------------------------


def main() -> None:
    """Enters the level and becomes the command.

    Whatever the kernel refuses on the way is told in one line, and nothing is started.
    """
    level, path = sys.argv[1:]
    request = json.loads(Path(path).read_text(encoding="utf-8"))
    LIBC.mount.argtypes = [ctypes.c_char_p] * 3 + [ctypes.c_ulong, ctypes.c_void_p]
    try:
        if level == "namespaces":
            enter_namespaces(request)
        elif level == "landlock":
            enter_landlock(request)
        os.chdir(request["folder"])
        os.execvp(request["command"][0], request["command"])
    except OSError as error:
        print(f"{level}: {error}", file=sys.stderr, flush=True)
        os._exit(UNAVAILABLE)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        print("error: no command by itself; start python -m tools.audit", file=sys.stderr)
        sys.exit(2)
    main()
