"""Child processes that need not import torch: forked from one that has it already.

PROGRAM starts as `python -m duet` does, and takes `-c CODE` too. It asks a server, one per process of the tests, which
forks: the child has the caller's directory, environment, streams and cores, gets its signals, and dies with it. Starting
an interpreter with torch and transformers takes three to six seconds, a fork a few milliseconds, and the tests start
hundreds. What an interpreter's own start decides (imports, what a wheel holds, torchrun) is tested without this.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
PROGRAM = (sys.executable, "-I", "-S", __file__, f"{tempfile.gettempdir()}/duet-tests-{os.getpid()}")
WITHOUT_US = 5.0  # seconds between two looks whether the tests are still there


def ask(address: str, arguments: list[str]) -> int:
    """Have a command run; returns its exit code, or ends as it did where a signal ended it."""
    with _connected(address) as server:
        asked = {
            "arguments": arguments,
            "cwd": os.getcwd(),
            "environment": dict(os.environ),
            "cores": list(os.sched_getaffinity(0)),
            "group": os.getpgrp(),
        }
        socket.send_fds(server, [b"\n"], [0, 1, 2])
        server.sendall(json.dumps(asked).encode() + b"\n")
        answers = server.makefile()
        child = int(answers.readline())
        for number in FORWARDED:
            signal.signal(number, lambda number, _frame: os.kill(child, number))
        code = int(answers.readline() or 1)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    return code


def _connected(address: str) -> socket.socket:
    """A connection to the server, which is started by the first that needs it."""
    with open(f"{address}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        server = socket.socket(socket.AF_UNIX)
        try:
            server.connect(address)
            return server
        except OSError:
            code = (
                f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import warm; warm.serve({address!r})"
            )
            environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_NUM")}
            with open(
                f"{address}.log", "w"
            ) as said:  # never the caller's own streams: who reads them waits for their end
                process = subprocess.Popen(
                    [sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment
                )
        while process.poll() is None:
            try:
                server.connect(address)
                return server
            except OSError:
                time.sleep(0.05)
    raise RuntimeError("the server that starts the tests' child processes did not start")


def serve(address: str) -> None:
    """Import what the commands need, then fork one child per connection until the tests are gone."""
    run = _forked_forever(address)  # returns in a child
    code: object = 0
    try:
        run()
    except SystemExit as exit:
        code = exit.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))  # taking torch down takes two seconds


def _forked_forever(address: str) -> Callable[[], None]:
    tests = int(address.rpartition("-")[2])
    _import_all()
    use_in_commands((*PROGRAM[:-1], address))
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as door:
        Path(address).unlink(missing_ok=True)
        door.bind(address)
        door.listen(64)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the tests end, and then we do
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the handlers
        while _alive(tests):
            if not select.select([door], [], [], WITHOUT_US)[0]:
                continue
            client, _ = door.accept()
            if os.fork():
                client.close()
                continue
            door.close()
            for number in (signal.SIGINT, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            return _handled(client)
    for suffix in ("", ".lock", ".log"):
        Path(address + suffix).unlink(missing_ok=True)
    sys.exit()


def _handled(client: socket.socket) -> Callable[[], None]:
    """In the handler's process: fork the child, tell its end. Returns, in the child, what it has to run."""
    _, streams, _, _ = socket.recv_fds(client, 1, 3)
    asked = json.loads(client.makefile().readline())
    child = os.fork()
    if not child:
        client.close()
        return _as_asked(asked, streams)
    for stream in streams:
        os.close(stream)
    client.sendall(f"{child}\n".encode())
    ended = os.pidfd_open(child)
    if client in select.select([client, ended], [], [])[0]:  # the caller was killed
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(OSError):
        client.sendall(f"{code}\n".encode())
    os._exit(0)


def _as_asked(asked: dict, streams: list[int]) -> Callable[[], None]:
    import torch

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(asked["cwd"])
    os.sched_setaffinity(0, asked["cores"])
    with contextlib.suppress(PermissionError):  # where the caller began a session of its own
        os.setpgid(0, asked["group"])  # a signal to the caller's group is one to the child
    os.environ.clear()
    os.environ.update(asked["environment"])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or len(asked["cores"])))
    arguments = asked["arguments"]
    if arguments[:1] == ["-c"]:
        sys.argv = ["-c", *arguments[2:]]
        return lambda: exec(arguments[1], {"__name__": "__main__"})
    from duet.pipeline.cli.main import entry

    sys.argv = ["duet", *arguments]
    return entry


def use_in_commands(program: tuple[str, ...] = PROGRAM) -> None:
    """The commands of this process start their children with it."""
    from duet.pipeline.commands import compare, distill, evaluate, run, teacher_logits

    for module in (compare, distill, evaluate, run, teacher_logits):
        module.THIS_PROGRAM = program


def _import_all() -> None:
    import transformers.models.gpt2.modeling_gpt2
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(ask(sys.argv[1], sys.argv[2:]))
