"""What Linux can take away from the process that asks for it, through ctypes.

Three guards, each by itself and none to be taken back: namespaces (a network without
devices, processes that see only themselves, a small file system in memory), Landlock
(which files may be read and written) and a seccomp filter (which system calls there
are). Runs before anything untrusted, in a Python without site-packages.

Sources: unshare(2), landlock(7), seccomp(2), capabilities(7).
"""

# ruff: noqa: PTH112, PTH123
# A child imports as little as it can, and pathlib is much.

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import struct
from collections.abc import Iterable

_NEW_NS, _NEW_UTS, _NEW_IPC = 0x00020000, 0x04000000, 0x08000000
_NEW_USER, _NEW_PID, _NEW_NET = 0x10000000, 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 0x2, 0x4, 0x8
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38
_LAST_CAPABILITY = 63
_O_PATH = 0o10000000

# The rights that Landlock knows, by the version of its interface that brought them.
_WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 14
_REMOVE_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_FILE = 1 << 4, 1 << 5, 1 << 7, 1 << 8
_IN_FOLDER = (
    _WRITE_FILE | _READ_FILE | _READ_DIR | _TRUNCATE
    | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_FILE
)  # fmt: skip
_RIGHTS = ((1, (1 << 13) - 1), (2, 1 << 13), (3, _TRUNCATE), (5, 1 << 15))
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446

# System call -> its number on x86_64 and on aarch64; None where there is none.
_DENIED: dict[str, tuple[int | None, int | None]] = {
    # another process, thread or program
    "fork": (57, None), "vfork": (58, None), "clone": (56, 220), "clone3": (435, 435),
    "execve": (59, 221), "execveat": (322, 281), "setsid": (112, 157), "setpgid": (109, 154),
    # a network; the ends of a socketpair stay, which event loops are made with
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    "accept": (43, 202), "accept4": (288, 242), "sendmsg": (46, 211), "sendmmsg": (307, 269),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424), "process_madvise": (440, 440),
    "process_mrelease": (448, 448), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "sched_setattr": (314, 274),
    # files' owners, modes, times and attributes, which Landlock leaves alone
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None),
    "utimensat": (280, 88), "truncate": (76, 45), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16), "setxattrat": (463, 463), "removexattrat": (466, 466),
    "file_setattr": (469, 469), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    # memory and queues that no limit of this process counts
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    # limits, mounts and the machine
    "setrlimit": (160, 164), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "unshare": (272, 97), "setns": (308, 268), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "fanotify_init": (300, 262), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "personality": (135, 92), "quotactl": (179, 60),
    "quotactl_fd": (443, 443), "swapon": (167, 224), "swapoff": (168, 225),
    "reboot": (169, 142), "sethostname": (170, 161), "setdomainname": (171, 162),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "acct": (163, 89),
    "syslog": (103, 116), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "clock_adjtime": (305, 266), "adjtimex": (159, 171), "vhangup": (153, 58),
    "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None),
}  # fmt: skip
_KILL, _TGKILL, _PRLIMIT, _SENDTO, _PRCTL = (62, 129), (234, 131), (302, 261), (44, 206), (157, 167)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_X32 = 0x40000000  # x86_64's second set of numbers for the same calls

_libc = ctypes.CDLL(None, use_errno=True)


class Unsupported(Exception):
    """The kernel does not have a guard without which nothing may run."""


def enter_namespaces(folder: str, size: int) -> bool:
    """Leave the machine's network, processes and mounts; False where that is not allowed.

    Forks: the caller goes on as the first process of its own namespace, and a process
    outside waits and ends as it does.

    Args:
        folder: becomes an empty file system in memory.
        size: of it in bytes.
    """
    user, group = os.getuid(), os.getgid()
    every = _NEW_USER | _NEW_NS | _NEW_PID | _NEW_NET | _NEW_IPC | _NEW_UTS
    if _libc.unshare(every) != 0:
        return False
    try:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        _mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
        options = f"size={size},nr_inodes=4096,mode=700".encode()
        flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
        _mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, options)
        os.chdir(folder)
    except OSError as e:
        raise Unsupported(f"namespaces were given but cannot be set up: {e}") from e
    inner = os.fork()
    if inner:
        os.closerange(0, 64)
        _, status = os.waitpid(inner, 0)
        code = os.waitstatus_to_exitcode(status)
        os._exit(code if code >= 0 else 128 - code)
    end_with_parent()
    return True


def end_with_parent() -> None:
    """Be killed when the parent ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def drop_privileges() -> None:
    """Give up every capability, also those of programs to come."""
    for capability in range(_LAST_CAPABILITY + 1):
        _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)  # fails where it is not held or known
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0))
    if _libc.capset(header, ctypes.create_string_buffer(24)) != 0:
        raise Unsupported(f"capabilities cannot be dropped: {_reason()}")


def restrict_files(folder: str, readable: Iterable[str], devices: Iterable[str]) -> None:
    """Let only these files be opened, for as long as the process lives.

    Args:
        folder: whose files may be read, written, made and removed.
        readable: files and folders to read only; what is not there is left out.
        devices: files to read and write.
    Raises:
        Unsupported: a kernel without Landlock (before 5.13, or switched off).
    """
    version = _syscall(_LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        raise Unsupported(f"the kernel has no Landlock ({_reason()}), which came with Linux 5.13")
    handled = 0
    for since, rights in _RIGHTS:
        handled |= rights if version >= since else 0
    network = 0b11 if version >= 4 else 0  # TCP's bind and connect, with no rule that allows them
    scoped = 0b11 if version >= 6 else 0  # abstract sockets and signals stay inside
    attributes = struct.pack("=QQQ", handled, network, scoped)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = _syscall(_LANDLOCK_CREATE, attributes, size, 0)
    if rules < 0:
        raise Unsupported(f"Landlock refuses: {_reason()}")
    both = _READ_FILE | _WRITE_FILE | _TRUNCATE
    _allow(rules, folder, _IN_FOLDER & handled)
    for path in readable:
        rights = _READ_FILE | _READ_DIR if os.path.isdir(path) else _READ_FILE
        _allow(rules, path, rights & handled)
    for path in devices:
        _allow(rules, path, both & handled)
    if _syscall(_LANDLOCK_RESTRICT, rules, 0) != 0:
        raise Unsupported(f"Landlock refuses: {_reason()}")
    os.close(rules)


def _allow(rules: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, _O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if _syscall(_LANDLOCK_ADD, rules, 1, struct.pack("=Qi", rights, fd), 0) != 0:
            raise Unsupported(f"Landlock refuses a rule for {path}: {_reason()}")
    finally:
        os.close(fd)


def filter_system_calls() -> None:
    """Refuse the calls of `_DENIED` with EPERM; kill what comes by another machine's numbers.

    Signals go to the process itself alone, limits can be read and not set, nothing is sent
    to an address, and `end_with_parent` cannot be taken back.
    Raises:
        Unsupported: another machine than x86_64 and aarch64, or no seccomp.
    """
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise Unsupported(f"no filter of system calls is written for {machine} processors")
    column, architecture = _ARCHITECTURES[machine]
    allow, deny, kill = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
    load, equal, at_least, end = 0x20, 0x15, 0x35, 0x06
    number, arch, arguments = 0, 4, 16
    code: list[tuple[int, int, int, int]] = [
        (load, 0, 0, arch),
        (equal, 1, 0, architecture),
        (end, 0, 0, kill),
        (load, 0, 0, number),
    ]
    if machine == "x86_64":
        code += [(at_least, 0, 1, _X32), (end, 0, 0, kill)]
    for numbers in _DENIED.values():
        if (call := numbers[column]) is not None:
            code += [(equal, 0, 1, call), (end, 0, 0, deny)]

    def unless(call: int, argument: int, value: int) -> list[tuple[int, int, int, int]]:
        """Deny the call unless both halves of an argument are the value's."""
        low, high = arguments + 8 * argument, arguments + 8 * argument + 4
        return [
            (equal, 0, 6, call),
            (load, 0, 0, low),
            (equal, 0, 2, value),
            (load, 0, 0, high),
            (equal, 1, 0, 0),
            (end, 0, 0, deny),
            (end, 0, 0, allow),
        ]

    for numbers, argument, value in (
        (_KILL, 0, os.getpid()),
        (_TGKILL, 0, os.getpid()),
        (_PRLIMIT, 2, 0),
        (_SENDTO, 4, 0),
    ):
        code += unless(numbers[column], argument, value)
    code += [
        (equal, 0, 3, _PRCTL[column]),
        (load, 0, 0, arguments),
        (equal, 0, 1, _PR_SET_PDEATHSIG),
        (end, 0, 0, deny),
        (end, 0, 0, allow),
    ]
    packed = b"".join(struct.pack("=HBBI", op, yes, no, k) for op, yes, no, k in code)
    held = ctypes.create_string_buffer(packed, len(packed))
    program = struct.pack("@HP", len(code), ctypes.addressof(held))
    if _libc.prctl(_PR_SET_SECCOMP, 2, program, 0, 0) != 0:
        raise Unsupported(f"the kernel takes no filter of system calls: {_reason()}")


def _mount(
    source: bytes, target: bytes, kind: bytes | None, flags: int, data: bytes | None
) -> None:
    if _libc.mount(source, target, kind, ctypes.c_ulong(flags), data) != 0:
        raise OSError(ctypes.get_errno(), f"mount on {os.fsdecode(target)}: {_reason()}")


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise Unsupported(f"prctl {option} is refused: {_reason()}")


def _syscall(number: int, *arguments: object) -> int:
    plain = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return int(_libc.syscall(ctypes.c_long(number), *plain))


def _reason() -> str:
    return os.strerror(ctypes.get_errno())
