"""Programs that want out, or a verdict of their own, get neither."""

# ruff: noqa: E501  (programs, one a line)

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from code_problems import GOOD, TESTS, require_sandbox

from attnres.eval import sandbox, sandbox_seccomp
from attnres.eval.sandbox import Limits, Outcome, check, check_many


@pytest.fixture(scope="module", autouse=True)
def _sandbox() -> None:
    require_sandbox()


# ---- programs that do what they like -------------------------------------------------------------------------------

RETURNS_NOTHING = "\ndef f(x):\n    return 0\n"
HOSTILE = {
    "endless loop": ("while True: pass", "timeout"),
    "endless loop in the call": ("def f(x):\n    while True: pass", "timeout"),
    "sleeps": ("import time\ntime.sleep(1000)", "timeout"),
    "endless loop that catches everything": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, lambda *a: None)\n    except Exception: pass\n"
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "timeout",
    ),
    "fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "timeout"),
    "fork bomb by shell": ("import subprocess\nsubprocess.run(':(){ :|:& };:', shell=True)", "failed"),
    "thread bomb": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(1000,)).start()",
        "failed",
    ),
    "allocates 10 GB": ("x = bytearray(10 * 2**30)", "memory"),
    "allocates 10 GB bit by bit": ("x = []\nwhile True: x.append(bytearray(2**24))", "memory"),
    "allocates 10 GB in the call": ("def f(x):\n    return 'x' * 10 * 2**30", "memory"),
    "answers with more than may be": ("def f(x):\n    return 'x' * 2**26", "failed"),
    "answers that grow": ("def f(x):\n    def g():\n        while True: yield 'x' * 2**20\n    return g()", "failed"),
    "writes outside": ("open(OUTSIDE + '/written', 'w')", "failed"),
    "writes into the interpreter": ("import json\nopen(json.__file__, 'a')", "failed"),
    "links outside": ("import os\nos.symlink(OUTSIDE, 'link')\nopen('link/written', 'w')", "failed"),
    "fills the disk": (
        "i = 0\nwhile True:\n    i += 1\n    with open(f'file{i}', 'wb') as file: file.write(bytes(2**20))",
        "failed",
    ),
    "writes a huge file": ("with open('file', 'wb') as file:\n    while True: file.write(bytes(2**20))", "failed"),
    "opens files without end": ("x = []\nwhile True: x.append(open('/dev/null'))", "failed"),
    "reads the home directory": ("import os\nraise OSError(str(os.listdir(HOME)))", "failed"),
    "reads a file of the user's": ("raise OSError(open(OUTSIDE + '/secret').read())", "failed"),
    "reads the environment": (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\nlibc.getenv.restype = ctypes.c_char_p\n"
        "raise OSError(f'{dict(os.environ)} {libc.getenv(b\"ATTNRES_SECRET\")}')",
        "failed",
    ),
    "reads /proc": ("raise OSError(open('/proc/1/environ').read() + open('/proc/self/cmdline').read())", "failed"),
    "opens a socket": ("import socket\nsocket.create_connection(('127.0.0.1', PORT)).send(b'x')", "failed"),
    "asks a name server": ("import socket\nsocket.getaddrinfo('example.org', 80)", "failed"),
    "sends a datagram": (
        "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
        "failed",
    ),
    "opens an abstract socket": ("import socket\nsocket.socket(socket.AF_UNIX).connect(ABSTRACT)", "failed"),
    "signals its parent": ("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)" + RETURNS_NOTHING, "failed"),
    "signals everyone": ("import os, signal\nos.kill(-1, signal.SIGKILL)" + RETURNS_NOTHING, None),
    "signals a process outside": ("import os, signal\nos.kill(VICTIM, signal.SIGKILL)", "failed"),
    "double fork": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(1000)\n    os._exit(0)"
        + RETURNS_NOTHING,
        "failed",
    ),
    "leaves a daemon behind and exits": (
        "import os, subprocess, sys\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)', MARK], start_new_session=True)\n"
        "os._exit(0)",
        "exited",
    ),
    "fork that returns twice": ("import os\nos.fork()" + RETURNS_NOTHING, "failed"),
    "fork that returns twice, right once": (
        "import os\ndef f(x):\n    if os.fork() == 0: return 10\n    os.wait()\n    return 143",
        None,
    ),
    "closes stdout": ("import sys\nsys.stdout.close()\nsys.stderr.close()" + RETURNS_NOTHING, "failed"),
    "closes all files": ("import os\nos.closerange(0, 1000)" + RETURNS_NOTHING, "exited"),
    "sys.exit(0) before the tests": ("import sys\nsys.exit(0)", "exited"),
    "os._exit(0) before the tests": ("import os\nos._exit(0)", "exited"),
    "sys.exit(0) in the call": ("import sys\ndef f(x): sys.exit(0)", "exited"),
    "os._exit(0) in the call": ("import os\ndef f(x): os._exit(0)", "exited"),
    "KeyboardInterrupt": ("def f(x): raise KeyboardInterrupt", "exited"),
    "exit at exit": ("import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit(0)", "exited"),
    "crashes": ("import ctypes\nctypes.string_at(0)", "exited"),
    "overflows the stack": ("import sys\nsys.setrecursionlimit(10**9)\nf = lambda x: f(x)", None),
    "is no end of parentheses": ("(" * 10**6, None),
    "exception that cannot be shown": (
        "class E(BaseException):\n    def __str__(self): raise self\ndef f(x): raise E",
        None,
    ),
    "redefines the tests' names": (
        "METADATA = {}\ncandidate = range = lambda *a: []\ndef check(candidate): pass" + RETURNS_NOTHING,
        "failed",
    ),
    "redefines the checker's names": (
        "import __main__\nfor name in list(vars(__main__)):\n    if name not in ('serve', 'Channel', 'encode', 'decode')"
        " and name[0] != '_': setattr(__main__, name, lambda *a, **k: ('passed', ''))" + RETURNS_NOTHING,
        None,
    ),
    "patches AssertionError": (
        "import builtins\nclass Fine(Exception):\n    def __new__(cls, *a): return None\n"
        "AssertionError = builtins.AssertionError = Fine" + RETURNS_NOTHING,
        "failed",
    ),
    "patches the builtins": (
        "import builtins\nfor name in ('abs', 'len', 'all', 'any', 'range', 'list', 'exec', 'compile', 'getattr'):\n"
        "    setattr(builtins, name, lambda *a, **k: ())" + RETURNS_NOTHING,
        None,
    ),
    "raises what tests may catch": ("def f(x): raise StopIteration", "failed"),
    "equals everything": (
        "class All:\n    __eq__ = __ne__ = lambda *a: True\n    __hash__ = None\ndef f(x): return All()",
        "failed",
    ),
    "equals every number": ("class All(int):\n    __eq__ = lambda *a: True\ndef f(x): return All()", "failed"),
    "claims to be another class": (
        "class All:\n    __class__ = int\n    __eq__ = lambda *a: True\ndef f(x): return All()",
        None,
    ),
    "prints gigabytes": ("while True: print('x' * 2**20)", "failed"),
    "prints gigabytes past print": (
        "import os\nwhile True:\n    for fd in (1, 2):\n        try: os.write(fd, b'x' * 2**20)\n        except OSError: pass",
        "timeout",
    ),
    "prints that it passed": (
        "import os\nfor fd in range(64):\n    try: os.write(fd, b'ready\\n[\"passed\", \"\"]\\n')\n    except OSError: pass\n"
        "os._exit(0)",
        "failed",
    ),
    "answers before it is asked": (
        "import os\nfor fd in range(3, 64):\n    for i in range(9):\n"
        "        try: os.write(fd, b'[%d, \"value\", true]\\n' % i)\n        except OSError: pass\nos._exit(0)",
        "failed",
    ),
    "answers nonsense": (
        "import os, sys\nfor fd in range(3, 64):\n    try: os.write(fd, b'[[[[1e999\\n' * 9)\n    except OSError: pass"
        + RETURNS_NOTHING,
        "failed",
    ),
    "replaces stdout": ("import sys, io\nsys.stdout = sys.__stdout__ = io.StringIO()" + RETURNS_NOTHING, "failed"),
    "walks the frames": (
        "import inspect, sys\ndef f(x):\n    for frame in inspect.stack():\n        names = frame.frame.f_globals\n"
        "        names.update(check=lambda c: None, verdict=('passed', ''), passed=True)\n"
        "        if DRAWKCAB[::-1] in f'{frame.frame.f_locals}{frame.frame.f_globals}': raise OSError('ESCAPED')\n    return 0",
        "failed",
    ),
    "searches the heap": (
        "import gc\ndef f(x):\n    for thing in gc.get_objects():\n"
        "        if getattr(thing, '__name__', '') == 'check': thing.__code__ = (lambda c: None).__code__\n"
        "        if type(thing) in (dict, list, tuple) and DRAWKCAB[::-1] in repr(thing): raise OSError('ESCAPED')\n    return 0",
        None,
    ),
    "reads its memory": ("def f(x):\n    return eval(open('/proc/self/mem').read())", "failed"),
    "traces": (
        "import sys, threading\ndef trace(frame, *a):\n    frame.f_trace_lines = False\n    return trace\n"
        "sys.settrace(trace)\nsys.setprofile(lambda *a: None)\nthreading.settrace(trace)" + RETURNS_NOTHING,
        "failed",
    ),
    "audits": (
        "import sys\ndef hook(event, arguments):\n    if event == 'compile': raise SystemExit(0)\nsys.addaudithook(hook)"
        + RETURNS_NOTHING,
        "failed",
    ),
    "thread that outlives": (
        "import threading, time\ndef work():\n    while True:\n        globals()['check'] = lambda c: None\n"
        "threading.Thread(target=work).start()" + RETURNS_NOTHING,
        "failed",
    ),
    "alarms": ("import signal\nsignal.alarm(1)\nsignal.signal(signal.SIGALRM, lambda *a: 1 / 0)\nwhile True: pass", None),
    "calls the kernel": (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\ndone = [name for name, *a in [('unshare', 0x10000000), "
        "('unshare', 0x20000), ('mount', b'tmpfs', b'/scratch', b'tmpfs', 0, None), ('umount2', b'/lib', 2), "
        "('setuid', 0), ('chroot', b'/scratch'), ('ptrace', 16, 1, 0, 0), ('sethostname', b'x', 1), "
        "('mknod', b'/scratch/sda', 0o60600, 0x800)] if getattr(libc, name)(*a) == 0]\n"
        "raise OSError(f'ESCAPED by {done}' if done else 'nothing')",
        "failed",
    ),
    "lifts its limits": (
        "import resource as r\nfor limit in range(16):\n    try: r.setrlimit(limit, (r.RLIM_INFINITY, r.RLIM_INFINITY))\n"
        "    except (OSError, ValueError): continue\n    if limit in (0, 1, 4, 6, 7, 9, 12): raise OSError('ESCAPED')\nx = bytearray(2**31)",
        "memory",
    ),
}  # fmt: skip


# ---- programs that reach outside -----------------------------------------------------------------------------------

PROBE = """
import ctypes, errno, fcntl, os, resource, signal, socket, stat, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
escaped = []
def attempt(name, call, *arguments):
    try:
        if call(*arguments) != -1: escaped.append(name)
    except (OSError, ValueError): pass
def system(call, *arguments):
    ctypes.set_errno(0)
    return libc.syscall(ctypes.c_long(NUMBERS[call]), *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
def survives(call):
    child = os.fork()
    if child == 0:
        call()
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0: escaped.append('survived')
def until_error(make, most):
    made = 0
    try:
        while made <= most:
            make(made)
            made += 1
    except (OSError, RuntimeError): pass
    if made > most: escaped.append(f'{made} times')
"""
REFUSED_CALLS = {
    "keyrings": "add_key keyctl request_key",
    "named sockets": "accept accept4 bind connect getsockopt_ listen recvmmsg recvmsg sendmmsg sendmsg setsockopt",
    "programs for the kernel": "bpf perf_event_open seccomp userfaultfd landlock_create_ruleset",
    "input and output behind a filter's back": "io_cancel io_destroy io_getevents io_setup io_submit io_uring_enter "
    "io_uring_register io_uring_setup",
    "other processes": "kcmp pidfd_getfd pidfd_send_signal process_madvise process_vm_readv process_vm_writev ptrace "
    "rt_sigqueueinfo rt_tgsigqueueinfo setpriority sched_setscheduler sched_setattr ioprio_set migrate_pages move_pages",
    "namespaces": "clone3 setns unshare",
    "mounts": "chroot fsconfig fsmount fsopen fspick mount mount_setattr move_mount open_tree pivot_root umount2",
    "memory without a limit": "memfd_create memfd_secret mlock2 mlockall shmat shmctl shmget remap_file_pages",
    "queues": "mq_getsetattr mq_open mq_unlink msgctl msgget msgrcv msgsnd semctl semget semop",
    "watches": "fanotify_init fanotify_mark inotify_add_watch inotify_init inotify_init1 inotify_rm_watch",
    "pages of pipes": "copy_file_range splice tee vmsplice sendfile",
    "the host's disks": "quotactl swapoff swapon sync syncfs sync_file_range readahead",
    "the clock": "adjtimex clock_adjtime clock_settime settimeofday",
    "the machine": "acct delete_module finit_module init_module ioperm iopl kexec_load reboot sethostname "
    "setdomainname syslog vhangup uselib personality",
    "identity": "capset setfsgid setfsuid setgid setgroups setregid setresgid setresuid setreuid setuid chown fchown "
    "fchownat lchown",
    "files by handle": "name_to_handle_at open_by_handle_at lookup_dcookie",
    "special files": "mknod mknodat execveat",
}
REACHES: dict[str, str] = {
    "makes sockets of all families": """
for family in range(64):
    for kind in range(1, 11):
        for flags in (0, socket.SOCK_CLOEXEC, socket.SOCK_NONBLOCK):
            for protocol in (0, 1, 6, 17, 255):
                attempt(f'family {family}', lambda: socket.socket(family, kind | flags, protocol))
""",
    "makes pairs of sockets that have names": """
for family in range(64):
    for kind in range(1, 11):
        if (family, kind) != (socket.AF_UNIX, socket.SOCK_STREAM):
            attempt(f'{family} {kind}', lambda: socket.socketpair(family, kind))
""",
    "hides a family in the upper half of an argument": """
ends = (ctypes.c_int * 2)()
for family in (2, 16, 17, 40, 2**32 + 2, 2**32 + 40, 2**40 + 16):
    attempt(family, system, 'socket', family, 1, 0)
    attempt(family, system, 'socketpair', family, 1, 0, ends)
""",
    "makes a system call of another architecture": """
if os.uname().machine == 'x86_64': survives(lambda: libc.syscall(ctypes.c_long(0x40000000 + 39)))
""",
    "makes a system call of 32 bits": """
import mmap
if os.uname().machine == 'x86_64':
    page = mmap.mmap(-1, 4096, prot=7)
    page.write(b'\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3')  # getpid by int 0x80
    survives(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page))))
""",
    "clones into namespaces": """
for bit in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
    child = libc.syscall(ctypes.c_long(NUMBERS['clone']), ctypes.c_long(bit | 17), None, None, None, None)
    if child == 0: os._exit(0)
    if child > 0: escaped.append(bit)
""",
    "holds files of the caller's": """
for fd in range(4096):
    try: mode = os.fstat(fd).st_mode
    except OSError: continue
    if not stat.S_ISFIFO(mode) and not (stat.S_ISCHR(mode) and os.fstat(fd).st_rdev == os.stat('/dev/null').st_rdev):
        escaped.append(f'{fd} is {stat.filemode(mode)}')
""",
    "takes the disk through the files it was given": """
for fd in range(64):
    for mode in range(4): attempt((fd, mode), libc.fallocate, fd, mode, ctypes.c_long(0), ctypes.c_long(2**32))
    attempt(fd, os.posix_fallocate, fd, 0, 2**32)
""",
    "takes more than its files may have": """
for mode in (0, 1, 16, 17, 64):
    attempt(mode, libc.fallocate, os.open('big', os.O_CREAT | os.O_RDWR), mode, ctypes.c_long(0), ctypes.c_long(2**33))
""",
    "locks files of the host": """
import json
for path in (json.__file__, os.__file__, sys.executable, '/dev/null', '/usr/lib'):
    file = os.open(path, os.O_RDONLY)
    for how in (fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_SH | fcntl.LOCK_NB): attempt(path, fcntl.flock, file, how)
    attempt(path, fcntl.lockf, file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    for command in (fcntl.F_SETLK, fcntl.F_SETLKW, fcntl.F_OFD_SETLK, fcntl.F_SETLEASE, fcntl.F_NOTIFY):
        attempt((path, command), fcntl.fcntl, file, command, struct.pack('hhqqi', 0, 0, 0, 0, 0))
        attempt((path, command), fcntl.fcntl, file, command, 0)
""",
    "sets what belongs to a file and is not its content": """
commands = [n for n in (*range(0, 64), *range(1024, 1048)) if n not in (0, 1, 2, 3, 4, 1030)]
for fd in (0, os.open('/dev/null', os.O_RDONLY), os.open('mine', os.O_CREAT | os.O_RDWR)):
    for command in commands: attempt(command, fcntl.fcntl, fd, command, 0)
""",
    "controls devices": """
for fd in (0, os.open('/dev/null', os.O_RDONLY), os.open('/dev/urandom', os.O_RDONLY), os.open(sys.executable, os.O_RDONLY)):
    for request in (*range(0x5400, 0x5480), 0x80086601, 0x40086602, 0xC0045877, 0xC0045878, 0x5207, 0x5201, 0x40049409):
        if request not in (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451): attempt(hex(request), libc.ioctl, fd, ctypes.c_ulong(request), b'x' * 64)
""",
    "writes extended attributes": """
import json
open('mine', 'w').close()
for path in ('mine', '.', json.__file__, '/dev/null'):
    for name in ('user.x', 'trusted.x', 'security.x', 'system.posix_acl_access'):
        attempt(path, os.setxattr, path, name, b'x' * 1000)
        attempt(path, os.getxattr, path, name)
    attempt(path, os.listxattr, path)
""",
    "makes files without end": "until_error(lambda i: open(f'f{i}', 'w').close(), 1024)",
    "makes directories without end": "until_error(lambda i: os.mkdir(f'd{i}'), 1024)",
    "makes directories in directories without end": "until_error(lambda i: (os.mkdir('d'), os.chdir('d')), 1024)",
    "makes links without end": "open('x', 'w').close()\nuntil_error(lambda i: os.link('x', f'l{i}'), 1024)",
    "makes symbolic links without end": "until_error(lambda i: os.symlink('x' * 4000, f's{i}'), 1024)",
    "makes pipes with names without end": "until_error(lambda i: os.mkfifo(f'p{i}'), 1024)",
    "makes processes without end": "until_error(lambda i: os.fork() or time.sleep(1000), 16)",
    "makes threads without end": "until_error(lambda i: threading.Thread(target=time.sleep, args=(1000,), daemon=True).start(), 16)",
    "makes timers without end": """
timer = ctypes.c_void_p()
def make(i):
    if libc.timer_create(0, None, ctypes.byref(timer)): raise OSError
until_error(make, 64)
""",
    "makes pairs of sockets without end": "kept = []\nuntil_error(lambda i: kept.append(socket.socketpair()), 64)",
    "makes pipes larger": """
read_end, write_end = os.pipe()
for size in (2**17, 2**20, 2**30): attempt(size, fcntl.fcntl, write_end, 1031, size)
""",
    "makes a process nothing may stop": """
for option in (4, 8, 24, 26, 28, 31, 35, 36, 38, 40, 47, 57, 0x59616D61): attempt(option, libc.prctl, option, 1, 0, 0, 0)
for priority in (-20, -1, 5): attempt(priority, os.setpriority, os.PRIO_PROCESS, 0, priority)
attempt('fifo', os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(1))
attempt('lock', libc.mlockall, 3)
""",
    "has capabilities": """
header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
if libc.capget(header, data) or any(data): escaped.append(list(data))
if 0 in os.getresuid() + os.getresgid() + tuple(os.getgroups()): escaped.append('root')
attempt('raise', libc.capset, header, (ctypes.c_uint32 * 6)(*[2**32 - 1] * 6))
""",
    "sees what the host runs": """
escaped += [path for path in ('/proc', '/sys', '/run', '/var', '/home', '/boot', '/srv', '/etc/passwd', '/dev/shm', '/dev/kmsg', '/dev/tty', '/dev/ptmx', '/old', '/oldroot') if os.path.exists(path)]
escaped += [name for name in os.listdir('/dev') if name not in ('null', 'zero', 'random', 'urandom')]
""",
    "finds a place to write": """
for at, directories, files in os.walk('/'):
    if at.count('/') > 3 or at in ('/scratch', '/dev'): directories.clear(); continue
    paths = [at, *(os.path.realpath(os.path.join(at, name)) for name in files)]
    escaped += [path for path in paths if os.access(path, os.W_OK) and not path.startswith('/dev/')]
""",
    "finds files whose owner it could become": """
for path in ('/', '/scratch', '/usr/lib', sys.prefix, sys.base_prefix):
    flags = os.statvfs(path).f_flag
    if not flags & os.ST_NOSUID or not flags & os.ST_NODEV: escaped.append(path)
    if path != '/scratch' and not flags & os.ST_RDONLY: escaped.append(path)
""",
    "makes files that run as somebody else": """
open('mine', 'w').close()
os.chmod('mine', 0o6777)
attempt('owner', os.chown, 'mine', 0, 0)
attempt('device', os.mknod, 'device', stat.S_IFBLK | 0o666, os.makedev(8, 0))
attempt('character', os.mknod, 'device', stat.S_IFCHR | 0o666, os.makedev(1, 1))
""",
    "changes files of the host": """
import json
for path in (json.__file__, sys.executable, '/usr/lib', '/', sys.prefix):
    for change in (lambda: os.chmod(path, 0o777), lambda: os.utime(path), lambda: os.truncate(path, 0), lambda: os.unlink(path),
                   lambda: os.rename(path, '/scratch/x'), lambda: os.link(path, '/scratch/y'), lambda: os.mkdir(path + '/z')):
        attempt(path, change)
""",
    "speaks to the process above it": """
for number in range(1, 65):
    try: os.kill(1, number)
    except PermissionError: pass
for target in (0, 1, os.getppid()):
    attempt(target, libc.ptrace, 16, target, 0, 0)
    attempt(target, os.sched_setscheduler, target, os.SCHED_BATCH, os.sched_param(0))
time.sleep(0.1)
""",
    "sends what it holds to the tests": """
import array
for fd in range(64):
    try: end = socket.socket(fileno=os.dup(fd))
    except OSError: continue
    attempt(fd, end.sendmsg, [b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [0]))])
""",
    "leaves the session it was put into": """
attempt('terminal', os.open, '/dev/tty', os.O_RDWR)
for fd in range(3): attempt('control', fcntl.ioctl, fd, 0x540E, 0)
""",
} | {
    f"calls what is refused: {name}": f"""
for call in {calls.split()!r}:
    if call in NUMBERS and (system(call, 0, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() not in (errno.ENOSYS, errno.EACCES)):
        escaped.append((call, ctypes.get_errno()))
"""
    for name, calls in REFUSED_CALLS.items()
}
CALLS = sorted({*" ".join(REFUSED_CALLS.values()).split(), "clone", "socket", "socketpair"})

# ---- programs that speak to the tests' side themselves --------------------------------------------------------------

SPEAKS = """
import gc, json, os, time
channel = next(thing for thing in gc.get_objects() if type(thing).__name__ == 'Channel')
def say(line):
    channel.outgoing.write(line)
    channel.outgoing.flush()
"""
CODE = "import sys; sys._getframe(1).f_globals['judge'] = lambda *a, **k: ('passed', '')"
REPLIES: dict[str, str] = {
    **{
        f"raises {kind}": f"json.dumps([1, 'raised', [{kind!r}, {CODE!r}]]).encode()"
        for kind in (
            *("exec", "eval", "compile", "print", "open", "input", "exit", "quit", "breakpoint", "__import__"),
            *("getattr", "type", "object", "help", "memoryview", "bytearray", "globals", "BaseException", "SystemExit"),
            *("KeyboardInterrupt", "GeneratorExit", "ExceptionGroup", "UnicodeDecodeError", "os.system", "Bad", ""),
            *("builtins.ValueError", "ValueError.__init__", "__class__", "Exception\0", "Stop", "ProtocolError"),
        )
    },
    "raises no name": 'b\'[1, "raised", [1, "x"]]\'',
    "raises a list": 'b\'[1, "raised", [["exec"], "x"]]\'',
    "raises without a message": 'b\'[1, "raised", ["ValueError"]]\'',
    "raises with what is no data": 'b\'[1, "raised", ["ValueError", ["exec", 0]]]\'',
    **{
        f"answers with the name {name}": f"json.dumps([1, 'value', ['dict', [['f', 1], [{name!r}, ['object', 0]]]]]).encode()"
        for name in (
            "__builtins__",
            "abs",
            "range",
            "check",
            "AssertionError",
            "__name__",
            "__build_class__",
            "len",
            "g",
            "F",
            "",
        )
    },
    "answers with a name that is no text": 'b\'[1, "value", ["dict", [[1, 1]]]]\'',
    "answers with no names": "b'[1, \"value\", 1]'",
    "answers with a list of names": 'b\'[1, "value", ["list", []]]\'',
    "gives a module": 'b\'[1, "value", ["dict", [["f", ["module", "antigravity"]]]]]\'',
    "gives a global": 'b\'[1, "value", ["dict", [["f", ["global", "os.system"]]]]]\'',
    "gives a pickle": 'b\'[1, "value", ["dict", [["f", ["pickle", "Y29zCnN5c3RlbQo="]]]]]\'',
    "gives an object by a negative number": 'b\'[1, "value", ["dict", [["f", ["object", -1]]]]]\'',
    "gives an object by true": 'b\'[1, "value", ["dict", [["f", ["object", true]]]]]\'',
    "gives an object by a name": 'b\'[1, "value", ["dict", [["f", ["object", "0"]]]]]\'',
    "gives a dictionary of JSON": 'b\'[1, "value", {"f": 1}]\'',
    "gives a set of lists": 'b\'[1, "value", ["dict", [["f", ["set", [["list", []]]]]]]]\'',
    "gives a fraction of text": 'b\'[1, "value", ["dict", [["f", ["Fraction", "1e999999999"]]]]]\'',
    "gives a fraction of zero": 'b\'[1, "value", ["dict", [["f", ["Fraction", [1, 0]]]]]]\'',
    "gives a huge exponent": 'b\'[1, "value", ["dict", [["f", ["Decimal", "1e999999999"]]]]]\'',
    "gives a range of no step": 'b\'[1, "value", ["dict", [["f", ["range", [0, 1, 0]]]]]]\'',
    "gives a range of floats": 'b\'[1, "value", ["dict", [["f", ["range", [0, 1.5, 1]]]]]]\'',
    "gives bytes that are none": 'b\'[1, "value", ["dict", [["f", ["bytes", "zz"]]]]]\'',
    "gives 12 million digits": "b'[1, \"value\", [\"dict\", [[\"f\", ' + b'7' * 12_000_000 + b']]]]'",
    "gives 12 million hexadecimal digits": 'b\'[1, "value", ["dict", [["f", ["int", "\' + b\'7\' * 12_000_000 + b\'"]]]]]\'',
    "gives a thousand lists in each other": "b'[1, \"value\", ' + b'[\"list\", [' * 1000 + b']]' * 1000 + b']'",
    "gives a million lists in each other": "b'[' * 10**6 + b']' * 10**6",
    "answers another call": "b'[2, \"value\", 1]'",
    "answers call true": "b'[true, \"value\", 1]'",
    "answers call 1.0": "b'[1.0, \"value\", 1]'",
    "answers no call": "b'[\"value\", 1]'",
    "answers too much": "b'[1, \"value\", 1, 1]'",
    "answers with another kind": 'b\'[1, "passed", ""]\'',
    "answers as an object": 'b\'{"id": 1, "value": 1}\'',
    "answers nothing": "b''",
    "answers null": "b'null'",
    "answers in UTF-16": "'[1, \"value\", 1]'.encode('utf-16')",
    "answers in bytes that are no text": "bytes(range(128, 256))",
    "answers 64 MiB in a line": "b' ' * 2**26",
    "answers with a verdict": 'b\'["passed", ""]\'',
    "answers with two lines in one": 'b\'[1, "value", 1]\\r[1, "value", 1]\'',
}

# ---- programs that take the tests' time or memory -------------------------------------------------------------------

DRAINS: dict[str, str] = {
    "a number of many digits": "f = lambda x: 7 ** (4_000_000 * x)",
    "a decimal of a large exponent": "from decimal import *\nf = lambda x: Decimal('1e999999')",
    "a fraction of large parts": "from fractions import *\nf = lambda x: Fraction(3 ** 10**6, 2 ** 10**6)",
    "numbers that collide": "f = lambda x: {i * (2**61 - 1) for i in range(1, 300_000)}",
    "many empty lists": "f = lambda x: [[] for i in range(10**6)]",
    "a dictionary of many": "f = lambda x: dict.fromkeys(range(10**6))",
    "a long text": "f = lambda x: '\\0' * 2 * 10**6",
    "lists in each other": "def f(x):\n    y = []\n    for i in range(10**5): y = [y]\n    return y",
    "a list in itself": "def f(x):\n    y = []\n    y.append(y)\n    return y",
    "a range without end": "f = lambda x: range(10**30)",
    "an iterator without end": "import itertools\nf = lambda x: itertools.repeat(1)",
    "the answer one byte at a time": SPEAKS + "while True:\n    say(b'[')\n    time.sleep(0.05)",
    "no end of answers": SPEAKS + 'while True: say(b\'[1, "value", ["dict", [["f", ["object", 0]]]]]\\n\' * 1000)',
    "silence": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "silence with the pipes closed elsewhere": SPEAKS + "if os.fork(): os._exit(0)\ntime.sleep(1000)",
}
USES_THE_ANSWER = """
for x in range(1, 5):
    answer = f(x)
    assert list(answer) == [1] if hasattr(answer, '__iter__') else answer % 7 ** x == 1, answer
"""

FAMILIES = {
    "wild": HOSTILE,
    "reach": {name: (PROBE + source, None) for name, source in REACHES.items()},
    "speak": {name: (f"{SPEAKS}\nsay({reply} + b'\\n')\nos._exit(0)", None) for name, reply in REPLIES.items()},
    "drain": {name: (source, None) for name, source in DRAINS.items()},
}


def numbers() -> dict[str, int]:
    """Of the system calls that this machine has."""
    return {name: number for name in CALLS if (number := sandbox_seccomp.number(name)) >= 0}


def test_the_readme_counts_them() -> None:
    count = sum(map(len, FAMILIES.values()))
    assert count >= 120
    assert f"{count} hostile" in Path(__file__).with_name("README.md").read_text()


def test_programs_that_do_what_they_like(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text("SECRET of a file")
    monkeypatch.setenv("ATTNRES_SECRET", "SECRET of the environment")
    abstract = f"\0attnres-{os.getpid()}"
    limits = Limits(seconds=1.2 + os.getpid() * 1e-9)  # its digits mark the processes of this run
    mark = repr(limits.seconds)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as local,
        subprocess.Popen(["sleep", "1000"]) as victim,
    ):
        local.bind(abstract)
        local.listen()
        known = dict(OUTSIDE=str(tmp_path), HOME=str(Path.home()), VICTIM=victim.pid, ABSTRACT=abstract, MARK=mark)
        known["DRAWKCAB"] = TESTS.splitlines()[3].strip()[::-1]  # what a candidate must not find
        known["PORT"] = server.getsockname()[1]
        preamble = "".join(f"{name} = {value!r}\n" for name, value in known.items())
        programs = [(preamble + candidate, TESTS) for candidate, _ in HOSTILE.values()]
        try:
            outcomes = dict(zip(HOSTILE, check_many(programs, limits, workers=4)))
            assert victim.poll() is None
        finally:
            victim.kill()
        for listener in (server, local):
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept()

    assert [name for name, outcome in outcomes.items() if outcome.passed] == []
    unexpected = {
        name: outcomes[name]
        for name, (_, status) in HOSTILE.items()
        if status and outcomes[name].status not in (status, "timeout")  # on a slow machine
    }
    assert not unexpected
    details = " ".join(outcome.detail for outcome in outcomes.values())
    assert "SECRET" not in details
    assert "ESCAPED" not in details
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
    deadline = time.monotonic() + 10
    while left := [process for process in psutil.process_iter(["cmdline"]) if mark in str(process.info["cmdline"])]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    assert check(GOOD, TESTS) == Outcome(True, "passed", "")


def test_programs_that_reach_outside() -> None:
    end = "\nraise OSError(f'ESCAPED: {escaped}' if escaped else 'nothing')"
    programs = [(f"NUMBERS = {numbers()}\n{PROBE}{source}{end}", TESTS) for source in REACHES.values()]
    outcomes = dict(zip(REACHES, check_many(programs, Limits(seconds=20))))
    assert {name: outcome for name, outcome in outcomes.items() if outcome.detail != "OSError: nothing"} == {}


def test_the_refused_calls_are_known_here() -> None:
    assert len(numbers()) > 0.8 * len(CALLS)


def test_a_program_that_escapes_is_noticed() -> None:
    """Without a sandbox, a probe succeeds: the test above can fail."""
    probe = "attempt('here', os.stat, '/proc')\nattempt('there', os.stat, '/nowhere')\nraise OSError(str(escaped))"
    outcome = sandbox._run("unsafe", f"NUMBERS = {{}}\n{PROBE}{probe}", TESTS, Limits())
    assert outcome.detail == "OSError: ['here']"


def test_the_callers_keys() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    session, read, unlink = -3, 11, 9
    calls = {name: ctypes.c_long(sandbox_seccomp.number(name)) for name in ("add_key", "keyctl", "request_key")}
    secret = b"SECRET of a keyring"
    key = libc.syscall(calls["add_key"], b"user", b"attnres-test", secret, ctypes.c_size_t(len(secret)), session)
    if key < 0:
        pytest.skip(f"no key can be added to the session's keyring here: {os.strerror(ctypes.get_errno())}")
    try:
        found = ctypes.create_string_buffer(100)
        assert libc.syscall(calls["keyctl"], read, key, found, ctypes.c_size_t(100)) == len(secret)
        program = (
            "import ctypes\nlibc = ctypes.CDLL(None)\nfound = ctypes.create_string_buffer(100)\n"
            f"libc.syscall({calls['keyctl'].value}, {read}, {key}, found, 100)\n"
            f"other = libc.syscall({calls['request_key'].value}, b'user', b'attnres-test', None, 0)\n"
            f"mine = libc.syscall({calls['keyctl'].value}, 0, {session}, 0)\n"
            "raise OSError(f'{found.value} {other} {mine}')"
        )
        assert check(program, TESTS).detail == "OSError: b'' -1 -1"
    finally:
        libc.syscall(calls["keyctl"], unlink, key, session)


def test_the_session_keyring_is_left_even_without_the_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyseccomp")
    number = sandbox_seccomp.number("keyctl")
    monkeypatch.setattr(sandbox_seccomp, "ALLOWED", [*sandbox_seccomp.ALLOWED, "keyctl"])
    monkeypatch.setattr(sandbox_seccomp, "bpf", sandbox_seccomp.bpf.__wrapped__)
    ours = ctypes.CDLL(None).syscall(ctypes.c_long(number), 0, -3, 0)
    outcome = check(f"import ctypes\nraise OSError(ctypes.CDLL(None).syscall({number}, 0, -3, 0))", TESTS)
    serial = int(outcome.detail.removeprefix("OSError: "))
    if serial == -1:
        pytest.skip("keyrings cannot be used here")
    assert serial not in (ours, -1)


def test_programs_that_speak_to_the_tests_side_themselves() -> None:
    programs = [(candidate, TESTS) for candidate, _ in FAMILIES["speak"].values()]
    outcomes = dict(zip(REPLIES, check_many(programs)))
    refused = "the candidate's process "
    assert {name: o for name, o in outcomes.items() if o.status != "failed" or not o.detail.startswith(refused)} == {}


def test_a_program_that_speaks_the_protocol_is_believed() -> None:
    """By the same way as those above, so that they fail for what they say and not for how."""
    honest = (
        'say(b\'[1, "value", ["dict", [["f", ["object", 0]]]]]\\n\')\n'
        "for line in channel.incoming:\n"
        "    request = json.loads(line)\n"
        "    say(json.dumps([request['id'], 'value', 7 * request['do'][1][1][1][1] + 3]).encode() + b'\\n')"
    )
    assert check(SPEAKS + honest, TESTS) == Outcome(True, "passed", "")


def test_programs_that_take_the_tests_time_or_memory() -> None:
    limits = Limits(seconds=1)
    for name, source in DRAINS.items():
        start = time.monotonic()
        outcome = check(source, USES_THE_ANSWER, limits)
        assert not outcome.passed, name
        assert time.monotonic() - start < limits.seconds + 3, (name, outcome)


def test_what_the_caller_keeps_of_it() -> None:
    """A candidate cannot make the caller hold more than the verdict, nor break its lines."""
    before = psutil.Process().memory_info().rss
    for text in ("'x' * 10**7", "'\\x1b[2J\\n\\r\\u202e' * 1000", "'\\ud800' * 1000", '\'["passed", ""]\\n\' * 1000'):
        outcome = check(f"def f(x): raise ValueError({text})", TESTS)
        assert outcome.status == "failed"
        assert 0 < len(outcome.detail) <= 500
        assert outcome.detail.isprintable()
    assert psutil.Process().memory_info().rss - before < 2**26


def test_a_run_leaves_nothing_for_the_next() -> None:
    assert check("open('left', 'w').write('x')\n" + GOOD, TESTS).passed
    assert check("import os\nassert os.listdir() == []\n" + GOOD, TESTS).passed


def test_several_builtins_are_not_redefined() -> None:
    """Where tests ask for nothing but builtins, one of them is the candidate's function, and the others are not."""
    right = "def sum(a, b): return a + b\n"
    assert check(right, "assert abs(sum(2, 3) - 5) < 1e-6").passed
    assert not check("def sum(a, b): return 0\nabs = lambda x: 0", "assert abs(sum(2, 3) - 5) < 1e-6").passed


def test_tests_use_their_own_modules() -> None:
    tests = "assert math.isclose(f(2), 4)"
    assert check("import math\nf = lambda x: x * x", tests).passed
    forged = "class math:\n    isclose = staticmethod(lambda *a: True)\n"
    assert check(forged + "f = lambda x: 0", tests).status == "failed"
    assert check("import math\nmath.isclose = lambda *a: True\nf = lambda x: 0", tests).status == "failed"
    assert check("class calendar:\n    add = staticmethod(lambda x: x + 1)\n", "assert calendar.add(1) == 2").passed
    assert check("def bisect(x): return x", "assert bisect(1) == 1").passed


@pytest.mark.parametrize(
    "verdict",
    [b"", b"[", b"[]", b"null", b"1", b'"passed"', b'["passed"]', b'["passed", 1]', b'["won", ""]', b'["passed", "", 1]',
     b"[[[[" * 3000, b"\xff\xfe", b'{"passed": ""}', b'["failed", null]', b'["ready", ""]'],
)  # fmt: skip
def test_a_verdict_that_is_none_fails_its_candidate_only(verdict: bytes) -> None:
    assert sandbox._outcome(b"ready\n" + verdict).status in ("failed", "exited")


def test_for_an_ordinary_user_too(tmp_path: Path) -> None:
    """Root runs this file again as somebody else. What is closed to others is shown again under an open directory."""
    if os.geteuid() or "ATTNRES_AS_USER" in os.environ:
        pytest.skip("only root can become somebody else; for other users, all of this file has run so")
    shown = {path for path in (sys.prefix, sys.base_prefix, *sys.path, str(Path(__file__).parents[1])) if path}
    shown |= {os.path.realpath(path) for path in shown}
    shown = {path for path in shown if os.path.isdir(path)}
    closed = {str(at) for path in (*shown, tmp_path) for at in Path(path).parents if not at.stat().st_mode & 0o001}
    arguments = ["bwrap", "--dev-bind", "/", "/"]
    for directory in sorted(closed, key=len):
        arguments += ["--perms", "0755", "--tmpfs", directory]
    for path in sorted({*shown, str(tmp_path)}, key=len):
        within = [str(at) for at in reversed(Path(path).parents) if closed & {*map(str, at.parents)}]
        for parent in within:
            arguments += ["--dir", parent]
        if path == str(tmp_path):
            arguments += ["--perms", "1777", "--tmpfs", path]
        elif within or closed & {*map(str, Path(path).parents)}:
            arguments += ["--ro-bind", path, path]
    arguments += [
        "--",
        "setpriv",
        "--reuid=1000",
        "--regid=1000",
        "--clear-groups",
        sys.executable,
        "-m",
        "pytest",
        "-q",
    ]
    arguments += ["-p", "no:cacheprovider", "--basetemp", f"{tmp_path}/pytest", str(Path(__file__))]
    environment = {**os.environ, "ATTNRES_AS_USER": "1", "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    run = subprocess.run(arguments, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    if "No sandbox for the programs of a model" in run.stdout:
        pytest.skip(f"no sandbox for ordinary users here: {run.stdout[-1000:]}")
    assert " passed" in run.stdout
