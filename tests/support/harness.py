"""What the tests that run whole programs share: TAP output, temporary folders, and a served disk.

Every check is one TAP line, so that each counts as a case of its own.
"""

import argparse
import contextlib
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ENGINES = ("threads", "native", "io_uring")


def test_seed():
    """The seed of what is random in a test: said at the start, and given by VBLK_TEST_SEED to repeat it."""
    seed = int(os.environ.get("VBLK_TEST_SEED", random.SystemRandom().getrandbits(32)))
    print(f"# VBLK_TEST_SEED={seed}", flush=True)
    return seed


class Report:
    """Prints TAP as checks finish, on any thread; `exit()` ends the program with the right status."""

    def __init__(self):
        self.count = 0
        self.failed = 0
        self.lock = threading.Lock()

    def check(self, name, passed, detail=""):
        about = "" if passed else "".join(f"\n# {line}" for line in str(detail).splitlines())
        with self.lock:
            self.count += 1
            self.failed += not passed
            print(f"{'ok' if passed else 'not ok'} {self.count} - {name}{about}", flush=True)
        return passed

    def skip(self, name, reason):
        with self.lock:
            self.count += 1
            print(f"ok {self.count} - {name} # SKIP {reason}", flush=True)

    def exit(self):
        print(f"1..{self.count}", flush=True)
        sys.exit(1 if self.failed or not self.count else 0)


class Folder:
    """A temporary folder that is gone afterwards. Its path is short: Unix socket paths end at 107 bytes."""

    def __enter__(self):
        self.path = Path(tempfile.mkdtemp(prefix="vblk-", dir=os.environ.get("VBLK_TEST_DIR", "/var/tmp")))
        return self.path

    def __exit__(self, *_):
        shutil.rmtree(self.path, ignore_errors=True)


def activation(fd, count=1):
    """A wrapper that becomes the program behind it, with a descriptor passed as sd_listen_fds(3) has it."""
    return ["sh", "-c", f'LISTEN_PID=$$ LISTEN_FDS={count} exec "$@" 3<&{fd}', "activation"]


class Server:
    """A running `vblk serve`. `wrapper` is a command that runs it, such as strace with its options.

    A wrapper either stays as the server's parent or becomes the server itself. With `listener`, a socket that listens at
    `socket` already, the server gets it as systemd would pass it; with `connection`, one that is connected to a frontend, by
    --fd. Both remain the caller's.
    """

    def __init__(self, vblk, arguments, socket, log, wrapper=(), wrapper_stays=True, listener=None, connection=None):
        self.socket = Path(socket)
        self.log = Path(log)
        self.wrapped = bool(wrapper) and wrapper_stays
        command = [*wrapper, str(vblk), "serve", *map(str, arguments)]
        passed = ()
        if connection is not None:
            passed = (connection.fileno(),)
            command += ["--fd", str(connection.fileno())]
        elif listener is None:
            command += ["--socket-path", str(socket)]
        else:
            passed = (listener.fileno(),)
            command = [*activation(listener.fileno()), *command]
        with open(self.log, "wb") as log_file:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log_file,
                                            pass_fds=passed)
        line = self._first_line(20)
        if not line.startswith("vblk: ready on "):
            self.kill()
            raise RuntimeError(f"no ready line but {line!r} from {' '.join(command)}\n{self.log.read_text()}")

    def _first_line(self, seconds):
        readable, _, _ = select.select([self.process.stdout], [], [], seconds)
        return self.process.stdout.readline().decode() if readable else ""

    def pid(self):
        """The server itself, also where a wrapper runs it."""
        if not self.wrapped:
            return self.process.pid
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    def stop(self, seconds=20):
        """SIGTERM; returns the exit status, or None where the server did not end in time."""
        os.kill(self.pid(), signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def kill(self):
        if self.process.poll() is None:
            os.kill(self.pid(), signal.SIGKILL)
            self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()


class Devices:
    """A running `vblk serve --config` of a file that says `text`. Its log is in `folder`. `prefix` is a command that runs it."""

    def __init__(self, vblk, folder, text, prefix=()):
        (folder / "vblk.toml").write_text(text)
        self.log = folder / "log"
        with open(self.log, "wb") as log:
            command = [*map(str, prefix), str(vblk), "serve", "--config", str(folder / "vblk.toml")]
            # A session of its own, so that what strace runs is killed with it.
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, bufsize=0,
                                            start_new_session=True)
        for _ in range(text.count("[[device]]")):
            readable, _, _ = select.select([self.process.stdout], [], [], 20)
            line = self.process.stdout.readline().decode() if readable else ""
            if not line.startswith("vblk: ready on "):
                self.process.kill()
                raise RuntimeError(f"no ready line but {line!r}\n{self.log.read_text()}")

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            return None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Script:
    """A driver for scripts: takes a command per line on standard input, and answers each in one line."""

    def __init__(self, program, *arguments):
        self.process = subprocess.Popen([str(program), *map(str, arguments)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)

    def start(self, command):
        print(command, file=self.process.stdin, flush=True)

    def has_answer(self, seconds):
        """Whether the answer to start()'s command is there within so many seconds."""
        return bool(select.select([self.process.stdout], [], [], seconds)[0])

    def answer(self):
        """The answer's name=value words as a dictionary; "text" is the whole line."""
        line = self.process.stdout.readline().strip()
        answer = dict(word.split("=", 1) for word in line.split() if "=" in word)
        return {name: int(value, 0) if value[:1].isdigit() else value for name, value in answer.items()} | {"text": line}

    def __call__(self, command):
        self.start(command)
        return self.answer()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


class Poke(Script):
    """tests/interop/poke.cpp, connected to a served disk."""

    def __init__(self, program, socket, features_refused=0, queues=1):
        super().__init__(program, socket, hex(features_refused), queues)
        line = self.process.stdout.readline().strip()
        if line != "connected":
            self.__exit__()
            raise RuntimeError(f"poke cannot connect: {line}")


class KernelTrace:
    """Kernel tracepoints while a `with` block runs, in a mount namespace and a tracing instance of their own.

    `refusal` says why nothing is traced (no root, no tracefs), or is None. Times are CLOCK_MONOTONIC.
    """

    SCRIPT = """
        # What is left there slows down the whole machine until it is started again.
        end() {
            cd "$1/tracefs"
            for event in $2; do echo 0 > "instances/vblk-$$/events/$event/enable"; done
            for _ in $(seq 50); do rmdir "instances/vblk-$$" && break; sleep 0.1; done
        }
        mount -t tracefs tracefs "$1/tracefs" && cd "$1/tracefs" && mkdir "instances/vblk-$$" || exit 1
        trap 'end "$@"' EXIT
        cd "instances/vblk-$$" && echo mono > trace_clock || exit 1
        for event in $2; do echo 1 > "events/$event/enable" || exit 1; done
        echo ready
        cat trace_pipe > "$1/trace" &
        read -r _
        sleep 0.3
        kill $!
        wait $!
    """

    def __init__(self, folder, *events):
        self.folder, self.events, self.process, self.refusal = folder, events, None, None

    def __enter__(self):
        if os.geteuid() != 0:
            self.refusal = "the kernel's tracepoints need root"
            return self
        (self.folder / "tracefs").mkdir()
        self.process = subprocess.Popen(
            ["unshare", "-m", "bash", "-c", self.SCRIPT, "trace", str(self.folder), " ".join(self.events)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        if self.process.stdout.readline().strip() != b"ready":
            self.__exit__()
            self.refusal = "this kernel offers no tracepoints " + " ".join(self.events)
        return self

    def __exit__(self, *_):
        if self.process is not None:
            self.process.communicate(b"end\n")
            self.process = None

    def lines(self):
        """What was traced; after the `with` block."""
        path = self.folder / "trace"
        return path.read_text(errors="replace").splitlines() if path.exists() else []


def allocated_bytes(path):
    return os.stat(path).st_blocks * 512


def make_sparse(path, size_bytes):
    with open(path, "wb") as file:
        file.truncate(size_bytes)


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def run(*command, **options):
    """Runs a command to its end; returns (status, output and errors together)."""
    done = subprocess.run(
        list(map(str, command)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=options.pop("timeout", 120), **options)
    return done.returncode, done.stdout.decode(errors="replace")


def refused(report, vblk, title, folder, arguments, names, prefix=()):
    """Runs `vblk serve` with bad input and checks all that is promised about it."""
    before = sorted(os.listdir(folder))
    command = [*prefix, vblk, "serve", *map(str, arguments)]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=20)
    except subprocess.TimeoutExpired:
        report.check(f"{title}: refused", False, "still running after 20 s")
        return
    lines = [line for line in done.stderr.decode(errors="replace").splitlines() if line]
    good = done.returncode > 0 and len(lines) == 1 and names in lines[0] and sorted(os.listdir(folder)) == before
    report.check(f"{title}: refused in one line that names it", good,
                 f"status {done.returncode}, expected '{names}' in\n" + "\n".join(lines))


TOOLS = {"poke": "the driver for scripts (tests/interop/poke)",
         "churn": "the driver for scripts with a model (tests/interop/churn)"}


def run_tests(description, tools, tests):
    """A script's main program: each of `tests`, a tuple of a function and its arguments behind (report, options), in turn.

    `tools` are what it needs besides --vblk, of TOOLS. The options have their paths, and `random`, seeded and told.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--vblk", required=True, type=Path, help="the program under test")
    for tool in tools:
        parser.add_argument(f"--{tool}", required=True, type=Path, help=TOOLS[tool])
    options = parser.parse_args()
    for name in ("vblk", *tools):
        setattr(options, name, getattr(options, name).resolve())
    options.random = random.Random(test_seed())
    report = Report()
    for test, *arguments in tests:
        try:
            test(report, options, *arguments)
        except (RuntimeError, OSError) as error:
            report.check(" ".join(map(str, (test.__name__, *arguments, "runs"))), False, error)
    report.exit()


def run_on_each_engine(description, *tests):
    """run_tests() for each `test(report, options, engine)` on each engine."""
    run_tests(description, ("poke",), [(test, engine) for engine in ENGINES for test in tests])
