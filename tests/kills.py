"""Kill a function like `kill -9` at a chosen moment. The function runs in a forked child, so that a kill costs little.

    total = count_operations(lambda: run(tmp_path / "first"), tmp_path)
    was_killed = kill(lambda: run(tmp_path / "second"), tmp_path, at=random.randrange(total))

Moments are numbers of file operations: Python's audit events (open, rename, mkdir, remove, ...) below a folder. They
are the same in every run, so a failure can be repeated. Libraries that write files in C, C++ or Rust cause no events:
`delay` kills while they write.
"""

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path


def count_operations(target: Callable[[], object], folder: Path) -> int:
    """Run a function in a child to its end, and return the number of its file operations below a folder.

    Raises:
        AssertionError: The function failed. The message has its traceback and what it printed.
    """
    was_killed, operations = _run(target, folder, at=None, delay=0.0)
    assert not was_killed
    return operations


def kill(target: Callable[[], object], folder: Path, at: int, delay: float = 0.0) -> bool:
    """Run a function in a child, and kill the child immediately before a file operation.

    Args:
        target: Function to run. Nothing of it is cleaned up: no `finally`, no `atexit`.
        folder: Operations below this folder count.
        at: Number of operations that are done before the kill.
        delay: Seconds to go on after that moment. The kill then may come inside any operation.

    Returns:
        Whether the child was killed. False: the function ended before.

    Raises:
        AssertionError: The function failed. The message has its traceback and what it printed.
    """
    return _run(target, folder, at, delay)[0]


def _run(target: Callable[[], object], folder: Path, at: int | None, delay: float) -> tuple[bool, int]:
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as counter:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                # pytest has replaced these two.
                sys.stdout = sys.stderr = open(1, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
                operations = _count_and_kill(str(folder.resolve()), at, delay)
                target()
                os.write(counter.fileno(), str(operations[0]).encode())
                code = 0
            except BaseException:
                traceback.print_exc(file=sys.stderr)
            finally:
                os._exit(code)  # without the cleaning up of pytest
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGALRM):
            return True, 0
        output.seek(0)
        exit_code = os.waitstatus_to_exitcode(status)
        assert exit_code == 0, f"exit code {exit_code}:\n{output.read().decode(errors='replace')}"
        counter.seek(0)
        return False, int(counter.read())


def _count_and_kill(folder: str, at: int | None, delay: float) -> list[int]:
    """Count the file operations below a folder in the returned list, and kill this process at one of them."""
    operations = [0]

    def watch(event: str, args: tuple):
        if event != "open" and not event.startswith(("os.", "shutil.")):
            return
        paths = [os.fsdecode(arg) for arg in args[:2] if isinstance(arg, str | bytes | os.PathLike)]
        if event in ("os.remove", "os.rmdir") and args[-1] >= 0:  # shutil.rmtree names files relative to a folder
            paths = [os.path.join(os.readlink(f"/proc/self/fd/{args[-1]}"), *paths)]
        if not any(path.startswith(folder) for path in paths):
            return
        if operations[0] == at:
            if delay:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process at once, like SIGKILL
                signal.setitimer(signal.ITIMER_REAL, delay)
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        operations[0] += 1

    sys.addaudithook(watch)
    return operations
