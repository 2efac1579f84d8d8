#!/usr/bin/python3
"""A server that is short of threads or memory: requests complete, and what cannot be is said. Prints TAP.

RLIMIT_NPROC does not bind root, so the server runs as a user that owns no other process (needs root itself).
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))
from harness import Folder, Poke, Server, make_sparse, run, run_on_each_engine  # noqa: E402

MIB = 1 << 20
LONELY_USER = 54321
# The server's own: the main thread, one for I/O, one for signals.
OWN_THREADS = 3


def test_no_more_threads(report, options, engine):
    name = f"{engine}, no thread beyond the server's own"
    if os.geteuid() != 0:
        return report.skip(name, "another user's processes need root")
    as_user = ["setpriv", f"--reuid={LONELY_USER}", f"--regid={LONELY_USER}", "--clear-groups"]
    status, output = run(*as_user, options.vblk, "--version")
    if status != 0:
        return report.skip(name, f"other users cannot run the program: {output.strip()}")
    with Folder() as folder:
        image = folder / "disk.img"
        make_sparse(image, 8 * MIB)
        folder.chmod(0o777)
        image.chmod(0o666)
        wrapper = [*as_user, "prlimit", f"--nproc={OWN_THREADS}"]
        with Server(options.vblk, [image, "--aio", engine], folder / "s", folder / "log", wrapper,
                    wrapper_stays=False) as server:
            with Poke(options.poke, server.socket) as poke:
                for command in ("write 0 8 7", "flush", "read 0 8", "zeroes 0 8 1", "discard 8 8", "flush"):
                    answer = poke(command)
                    report.check(f"{name}: {command}", answer.get("status") == 0, answer["text"])
            status = server.stop()
            report.check(f"{name}: ends with 0", status == 0, f"{status}\n{server.log.read_text()}")


def test_little_memory(report, options, engine):
    """Whatever the limit stops: one line says it, or the frontend is refused; never an abort."""
    name = f"{engine}, little address space"
    status, _ = run("prlimit", f"--as={1024 * MIB}", options.vblk, "--version")
    if status != 0:
        return report.skip(name, "a sanitizer needs more address space than there is to limit")
    aborted = []
    with Folder() as folder:
        image = folder / "disk.img"
        make_sparse(image, 8 * MIB)
        for limit in range(16, 400, 16):
            arguments = [image, "--aio", engine, "--iothreads", "2", "--queues", "4", "--queue-size", "1024"]
            try:
                with Server(options.vblk, arguments, folder / "s", folder / "log",
                            ["prlimit", f"--as={limit * MIB}"], wrapper_stays=False) as server:
                    try:
                        with Poke(options.poke, server.socket) as poke:
                            poke("read 0 8")
                    except (RuntimeError, OSError):
                        pass
                    status = server.stop()
                    if status != 0:
                        aborted.append(f"{limit} MiB: ends with {status}: {server.log.read_text()}")
            except RuntimeError as error:
                # The loader itself needs some; what follows is the program's.
                if "terminate" in str(error) or "Assertion" in str(error):
                    aborted.append(f"{limit} MiB: {error}")
    report.check(f"{name}: nothing aborts", not aborted, "\n".join(aborted))


if __name__ == "__main__":
    run_on_each_engine(__doc__, test_no_more_threads, test_little_memory)
