"""Runs commands of main.py as on Windows, as far as that can be imitated; prints the exit code of each.

    python without_posix.py FLAGS [--then FLAGS ...]

Modules, functions and signals that Windows has not are missing, /proc and /dev/shm too; processes are spawned, and
files are synchronized, replaced and deleted by its rules.
"""

import builtins
import fcntl
import io
import multiprocessing
import os
import signal
import sys
from itertools import groupby
from pathlib import Path

MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix_ipc")
OF_OS = ("sched_getaffinity", "sched_setaffinity", "sysconf", "posix_fallocate", "posix_fadvise", "getuid",
         "geteuid", "getgid", "uname", "getpgid", "setpgid", "setsid", "getpriority", "nice", "mkfifo", "chown",
         "fchown", "fchmod", "getloadavg", "pread", "preadv", "sendfile", "sync", "fdatasync")
OF_SIGNAL = ("SIGHUP", "SIGBUS", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGQUIT", "SIGPIPE",
             "pthread_kill", "setitimer", "alarm", "sigwait", "siginterrupt")
MISSING = ("/proc/", "/dev/shm", "/sys/")


def _is_missing(path):
    return isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(MISSING)


def _refuse(function, error=FileNotFoundError):
    def checked(path, *args, **kwargs):
        if _is_missing(path):
            raise error(2, "No such file or directory", path)
        return function(path, *args, **kwargs)
    return checked


def _fsync(descriptor, fsync=os.fsync):
    if not fcntl.fcntl(descriptor, fcntl.F_GETFL) & (os.O_WRONLY | os.O_RDWR):
        raise OSError(9, "Bad file descriptor")
    fsync(descriptor)


def _is_open(path, listdir=os.listdir, readlink=os.readlink):
    """Whether this process has the file open: Windows then neither replaces nor deletes it."""
    path, folder = os.path.realpath(path), "/proc/self/fd"
    for number in listdir(folder):
        try:
            if readlink(f"{folder}/{number}") == path:
                return True
        except OSError:                                 # that of the listing itself
            pass
    return False


def _kill(pid, number, kill=os.kill):
    if not number or pid == os.getpid():                # but for multiprocessing, which ends its children so
        raise AssertionError(f"os.kill({pid}, {number}) ends a process on Windows, or sends it a Ctrl-C")
    kill(pid, number)


def _closed(function, which=0):
    def checked(*paths, **kwargs):
        if os.path.isfile(paths[which]) and _is_open(paths[which]):
            raise PermissionError(13, "The process cannot access the file because it is being used by another process",
                                  paths[which])
        return function(*paths, **kwargs)
    return checked


def hide():
    """Let this process be without POSIX; those that it spawns are as ever."""
    import torch  # noqa: F401 - its own modules may use POSIX while they are imported

    import utils

    multiprocessing.set_start_method("spawn", force=True)
    for name in MODULES:
        sys.modules[name] = None
    for module, names in ((os, OF_OS), (signal, OF_SIGNAL)):
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    builtins.open = io.open = _refuse(open)
    os.stat, os.readlink, os.path.isdir = _refuse(os.stat), _refuse(os.readlink), lambda path, isdir=os.path.isdir: (
        not _is_missing(path) and isdir(path))
    os.fsync, os.kill, utils.ON_WINDOWS = _fsync, _kill, True
    os.replace, os.unlink, os.remove = _closed(os.replace, 1), _closed(os.unlink), _closed(os.remove)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    hide()
    import main

    for is_end, flags in groupby(sys.argv[1:], lambda flag: flag == "--then"):
        if not is_end:
            print(f"exit code {main.main(list(flags))}", flush=True)
