"""The system calls that a sandboxed program may make, as a program for the kernel's filter (seccomp).

The list names what Python programs need. Any other call answers `ENOSYS`, as it would on a kernel that lacks it, so
that a call which Linux gains tomorrow is refused as well. [libseccomp](https://github.com/seccomp/libseccomp)
translates the list for the machine's architecture.

Some calls are left out although programs may want them, because namespaces do not confine them or nothing bounds what
they take: `socket` (families such as `AF_VSOCK` are outside the network namespace), `keyctl` and `add_key` (keyrings),
`memfd_create` and System V shared memory (no limit applies to their memory), `flock` and the locks of `fcntl` (another
process would wait for a lock on a library's file), `sync` and `inotify_add_watch` (they act on the host's files).
"""

from __future__ import annotations

import errno
import fcntl
import functools
import socket
import tempfile
import termios

ALLOWED = """
access alarm arch_prctl brk capget chdir chmod clock_getres clock_gettime clock_nanosleep close close_range creat dup
dup2 dup3 epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait eventfd2 execve exit exit_group
faccessat faccessat2 fallocate fchdir fchmod fchmodat fork fstat fstatfs ftruncate futex getcpu getcwd getdents64
getegid geteuid getgid getgroups getitimer getpeername getpgid getpgrp getpid getppid getpriority getrandom getresgid
getresuid getrlimit get_robust_list getrusage getsid getsockname getsockopt gettid gettimeofday getuid kill link
linkat lseek lstat madvise membarrier mincore mkdir mkdirat mmap mprotect mremap msync munmap nanosleep newfstatat open
openat pause pidfd_open pipe pipe2 poll ppoll pread64 preadv preadv2 prlimit64 pselect6 pwrite64 pwritev pwritev2 read
readlink readlinkat readv recvfrom rename renameat renameat2 restart_syscall rmdir rseq rt_sigaction rt_sigpending
rt_sigprocmask rt_sigreturn rt_sigsuspend rt_sigtimedwait sched_getaffinity sched_getparam sched_getscheduler
sched_get_priority_max sched_get_priority_min sched_yield select sendto setitimer setpgid setrlimit setsid
set_robust_list set_tid_address shutdown sigaltstack signalfd4 stat statfs statx symlink symlinkat sysinfo tgkill time
timer_create timer_delete timer_getoverrun timer_gettime timer_settime timerfd_create timerfd_gettime timerfd_settime
times tkill truncate umask uname unlink unlinkat utime utimensat utimes vfork wait4 waitid write writev
""".split()

ANSWERED = {
    # Scratch is in memory, so nothing has to reach a disk. A file of the host would be flushed.
    0: "fadvise64 fdatasync fsync",
    # `shutil` goes on without extended attributes after this error only.
    errno.EOPNOTSUPP: "fgetxattr flistxattr fremovexattr fsetxattr getxattr lgetxattr listxattr llistxattr "
    "lremovexattr lsetxattr removexattr setxattr",
    errno.EACCES: "socket",
    errno.ENOLCK: "flock",
}
"""Calls that do nothing and return an error other than `ENOSYS`, or success."""

NEW_NAMESPACES = 0x7E020000
"""All of `CLONE_NEW*` (sched.h) that `clone` knows."""
IOCTLS = (termios.TCGETS, termios.TIOCGWINSZ, termios.FIONREAD, termios.FIONBIO, termios.FIOCLEX, termios.FIONCLEX)
FCNTLS = (fcntl.F_DUPFD, fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL, fcntl.F_SETFL, fcntl.F_DUPFD_CLOEXEC)
PRCTLS = (1, 2, 3, 15, 16, 0x53564D41)
"""The death signal, whether memory is dumped, the thread's name, the name of a mapping (prctl.h)."""
TYPE_OF_SOCKET = 0xF


def number(call: str) -> int:
    """What the kernel calls it here."""
    import pyseccomp as seccomp

    return seccomp.resolve_syscall(seccomp.system_arch(), call)


@functools.cache
def bpf() -> bytes:
    """The filter, as the kernel takes it.

    Raises:
        ImportError: pyseccomp is not installed.
        RuntimeError: libseccomp is not.
    """
    import pyseccomp as seccomp

    rules = seccomp.SyscallFilter(seccomp.ERRNO(errno.ENOSYS))

    def add(action: int, call: str, *arguments: seccomp.Arg) -> None:
        if seccomp.resolve_syscall(seccomp.system_arch(), call) != -1:  # else this libseccomp is older than the call
            rules.add_rule(action, call, *arguments)

    for call in ALLOWED:
        add(seccomp.ALLOW, call)
    for number, calls in ANSWERED.items():
        for call in calls.split():
            add(seccomp.ERRNO(number), call)
    for call, position, values in (("ioctl", 1, IOCTLS), ("fcntl", 1, FCNTLS), ("prctl", 0, PRCTLS)):
        for value in values:
            add(seccomp.ALLOW, call, seccomp.Arg(position, seccomp.EQ, value))
    add(seccomp.ALLOW, "clone", seccomp.Arg(0, seccomp.MASKED_EQ, NEW_NAMESPACES, 0))
    # Datagrams could be sent to any named socket that is in sight. The two ends of a stream have only each other.
    stream = seccomp.Arg(1, seccomp.MASKED_EQ, TYPE_OF_SOCKET, socket.SOCK_STREAM)
    add(seccomp.ALLOW, "socketpair", seccomp.Arg(0, seccomp.EQ, socket.AF_UNIX), stream)
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()
