"""A guest that runs in QEMU without KVM, with its disks, and how a test talks to it and to QEMU."""

import dataclasses
import json
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from harness import wait_until

SOURCE = Path(__file__).resolve().parent
SCRIPTS = SOURCE.parent.parent / "scripts"
# An emulated processor on a busy machine: a boot takes about 20 s alone on two cores.
BOOT_SECONDS_MAX = 420


@dataclasses.dataclass
class Disk:
    """One vhost-user-blk device. The words are QEMU's: `properties` of the device, `chardev` of its connection."""

    socket: Path
    queues: int = 2
    properties: str = ""
    chardev: str = ""

    def arguments(self, number):
        more = [f",{words}" if words else "" for words in (self.chardev, self.properties)]
        return ["-chardev", f"socket,id=c{number},path={self.socket}{more[0]}",
                "-device", f"vhost-user-blk-pci,id=d{number},chardev=c{number},num-queues={self.queues}{more[1]}"]


class GuestSystem:
    """The kernel and initial RAM file system, made once per build folder."""

    def __init__(self, cache):
        cache.mkdir(parents=True, exist_ok=True)
        kernel = cache / "kernel"
        self.initramfs = cache / "initramfs.gz"
        subprocess.run([SCRIPTS / "fetch_guest_kernel.sh", kernel], check=True, stdout=sys.stderr)
        subprocess.run([SCRIPTS / "make_guest_initramfs.sh", kernel, SOURCE / "init", self.initramfs], check=True)
        self.vmlinuz = next((kernel / "boot").glob("vmlinuz-*"))

    def command(self, disks, parameters, more=(), memory="memory-backend-memfd,share=on"):
        """Of QEMU. `disks` are vda, vdb and so on; `parameters` is what tests/guest/init reads; `more` are QEMU's options, and
        `memory` is the object that has the guest's memory, but for its name and size."""
        words = " ".join(f"vblk.{key}={value}" for key, value in parameters.items())
        return [
            "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "512",
            "-machine", "q35,memory-backend=mem", "-object", f"{memory},id=mem,size=512M",
            *more, *(word for number, disk in enumerate(disks) for word in disk.arguments(number)),
            "-kernel", str(self.vmlinuz), "-initrd", str(self.initramfs),
            "-append", f"console=ttyS0 quiet panic=-1 {words}",
            "-nographic", "-no-reboot", "-nodefaults", "-serial", "stdio", "-net", "none",
        ]

    def boot(self, disks, parameters, on_ready=None, more=()):
        """Boots, waits for power-off; returns (console text, whether it ended in time). The rest: command(), RunningGuest."""
        return RunningGuest(self.command(disks, parameters, more), on_ready).finish()


class RunningGuest:
    """A guest, in one QEMU or, when it migrates, in several one after another.

    `on_ready` has for a disk ("vda") what the host does when the guest says that it is ready: a list of functions, one for each
    time. Each runs on a thread of its own, and the guest is told when it has returned. One that raises is a failed check of the
    guest's.
    """

    def __init__(self, command, on_ready=None):
        self.on_ready = {disk: list(actions) for disk, actions in (on_ready or {}).items()}
        self.processes, self.readers, self.actions, self.console, self.lock = [], [], [], b"", threading.Lock()
        self.start(command)

    def start(self, command):
        """One more QEMU, which has the console from now on."""
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.processes.append(process)
        self.readers.append(threading.Thread(target=self._read, args=(process,)))
        self.readers[-1].start()

    def _read(self, process):
        for line in process.stdout:
            self._note(line)
            found = re.search(rb"VBLK-GUEST: READY (\w+)", line)
            if found:
                self.actions.append(threading.Thread(target=self._act, args=(found[1].decode(),)))
                self.actions[-1].start()

    def _act(self, disk):
        try:
            self.on_ready[disk].pop(0)()
        except Exception as error:  # whatever it is, it belongs into the report, and the guest is not to wait for ever
            self._note(f"VBLK-GUEST: FAIL {disk}: what the host does meanwhile: {error!r}\n".encode())
        self.tell(disk)

    def tell(self, disk):
        """The host is done with what it does to this disk."""
        try:
            self.processes[-1].stdin.write(f"{disk}\n".encode())
            self.processes[-1].stdin.flush()
        except OSError as error:
            self._note(f"VBLK-GUEST: FAIL {disk}: the guest can be told: {error!r}\n".encode())

    def _note(self, line):
        with self.lock:
            self.console += line

    def finish(self):
        """Waits for power-off; (console text, whether it came in time)."""
        try:
            self.processes[-1].wait(BOOT_SECONDS_MAX)
            ended = True
        except subprocess.TimeoutExpired:
            ended = False
        self.kill()
        return self.console.decode(errors="replace").replace("\r", ""), ended


    def kill(self):
        for process in self.processes:
            process.kill()
            process.wait()
        for thread in (*self.readers, *self.actions):
            thread.join()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()


class Qmp:
    """A connection to QEMU's monitor (-qmp unix:PATH,server=on,wait=off)."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        # The path is there a moment before QEMU listens.
        if not wait_until(lambda: self.socket.connect_ex(str(path)) == 0, 30):
            raise OSError(f"no monitor at {path}")
        self.rest, self.events = b"", []
        self._next(60)
        self("qmp_capabilities")

    def _next(self, seconds):
        self.socket.settimeout(seconds)
        while b"\n" not in self.rest:
            data = self.socket.recv(65536)
            if not data:
                raise OSError("QEMU is gone")
            self.rest += data
        line, _, self.rest = self.rest.partition(b"\n")
        return json.loads(line)

    def __call__(self, command, **arguments):
        """The answer, an error too; {"error": ...}."""
        self.socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = self._next(60)
            if "return" in answer or "error" in answer:
                return answer
            self.events.append(answer)

    def must(self, command, **arguments):
        answer = self(command, **arguments)
        if "error" in answer:
            raise RuntimeError(f"{command}: {answer['error']['desc']}")
        return answer["return"]

    def wait_for(self, name, seconds=60, **data):
        """Waits for an event with such data; raises where it does not come."""
        deadline = time.monotonic() + seconds
        while True:
            for event in self.events:
                if event.get("event") == name and data.items() <= event.get("data", {}).items():
                    self.events.remove(event)
                    return
            left = deadline - time.monotonic()
            if left <= 0:
                raise RuntimeError(f"no {name} {data} within {seconds} s")
            try:
                self.events.append(self._next(left))
            except TimeoutError:
                pass

    def close(self):
        self.socket.close()
