#!/usr/bin/python3
"""QEMU's frontend without a guest: its firmware reads and writes the disk, for a boot sector that asks it to. Prints TAP.

That brings the frontend through what it does with STATUS: it stops and starts the device with the virtual machine, resets it
with the machine, sets it up for the firmware again, reconnects, and takes it to another QEMU. QEMU 7.2 sends SET_STATUS 0
before it asks a stopped device where its rings are, which must cost nothing.

The boot sector reads sectors 1 to 1023 one after another, each of which begins with its own number, writes each to the
sector 2047 places further on, and says '.' on the debug port for each and 'X' for a mistake, after which it halts.
"""

import argparse
import json
import re
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))
from harness import Folder, Report, Server, run, wait_until  # noqa: E402

MIB = 1 << 20
SECTORS = 1024
COPIES = 2048
SECONDS_MAX = 60

# 16-bit code at 0x7c00:
#        ljmp $0, $go
#   go:  cli; all segments 0; stack below 0x7c00; sti; mov %dl, drive
#   again: lba = 1
#   next: read lba to 0x8000 (int 0x13, %ah 0x42); cmp lba, (0x8000); jne bad
#        write it to lba + 2048 (%ah 0x43); out '.', $0xe9
#        if (++lba < 1024) goto next; goto again
#   bad: out 'X', $0xe9; hlt for ever
# with the packet of the call behind it.
BOOT_CODE = bytes.fromhex(
    "ea057c0000fa31c08ed88ec08ed0bc007cfb8816667cc706707c0100b442e83000a100803b06707c7535a1707c50050008a3707cb44330c0e8180058"
    "a3707cb02ee6e9ff06707c813e707c000472cdebc530c0be687c8a16667ccd137201c3b058e6e9f4ebfd0090100001000080")


def make_disk(path):
    with open(path, "wb") as file:
        file.write(BOOT_CODE.ljust(510, b"\0") + b"\x55\xaa")
        for number in range(1, SECTORS):
            file.write(struct.pack("<H", number).ljust(512, bytes([number % 251])))
        file.truncate(2 * MIB)


class Machine:
    """A QEMU that runs its firmware and the boot sector."""

    def __init__(self, folder, number, disk_socket, *arguments):
        self.qmp, self.port, self.trace = folder / f"qmp-{number}", folder / f"port-{number}", folder / f"trace-{number}"
        with open(self.trace, "wb") as trace:
            self.process = subprocess.Popen(
                ["qemu-system-x86_64", "-accel", "tcg", "-nodefaults", "-no-user-config", "-display", "none",
                 "-machine", "q35,memory-backend=mem", "-m", "64",
                 "-object", "memory-backend-memfd,id=mem,size=64M,share=on",
                 "-chardev", f"socket,id=disk,path={disk_socket},reconnect=1",
                 "-device", "vhost-user-blk-pci,chardev=disk,bootindex=0",
                 "-chardev", f"file,id=port,path={self.port}", "-device", "isa-debugcon,iobase=0xe9,chardev=port",
                 "-qmp", f"unix:{self.qmp},server=on,wait=off", "-trace", "vhost_user_write", *map(str, arguments)],
                stdin=subprocess.DEVNULL, stdout=trace, stderr=subprocess.STDOUT)

    def tell(self, command, **arguments):
        wait_until(self.qmp.exists, SECONDS_MAX)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(SECONDS_MAX)
            connection.connect(str(self.qmp))
            lines = connection.makefile("rw")
            for request in ({"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments}):
                lines.write(json.dumps(request) + "\n")
                lines.flush()
                answer = {}
                while "return" not in answer and "error" not in answer:
                    answer = json.loads(lines.readline())
        if "error" in answer:
            raise RuntimeError(f"{command}: {answer['error']}")
        return answer["return"]

    def said(self):
        return self.port.read_bytes() if self.port.exists() else b""

    def goes_on(self, sectors=50):
        """Whether so many sectors more are read and written, and none was wrong."""
        before = len(self.said())
        return wait_until(lambda: len(self.said()) >= before + sectors, SECONDS_MAX) and b"X" not in self.said()

    def requests(self):
        """The messages that the frontend has sent, by number."""
        return [int(number) for number in re.findall(rb"vhost_user_write req:(\d+)", self.trace.read_bytes())]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


def device_status(options, monitor):
    status, output = run(options.vblk, "ctl", monitor, "query-status")
    return json.loads(output).get("device-status") if status == 0 else output


def check_copies(report, title, disk, machine):
    """All sectors have been through once since the last reset, which begins anew; the copies are what was read."""
    before = len(machine.said())
    report.check(f"{title}: every sector has come by",
                 wait_until(lambda: len(machine.said()) > before + 2 * SECTORS, SECONDS_MAX))
    machine.tell("stop")
    data = disk.read_bytes()
    first, copies = data[512:SECTORS * 512], data[(COPIES + 1) * 512:(COPIES + SECTORS) * 512]
    report.check(f"{title}: and was written as it was read", first == copies)
    machine.tell("cont")


def test_states(report, options, folder, properties):
    title = f"firmware, {properties or 'split rings'}"
    disk = folder / "disk.raw"
    make_disk(disk)
    arguments = [disk, "--cache", "writeback", "--monitor", folder / "m"]
    server = Server(options.vblk, arguments, folder / "s", folder / "log")
    try:
        with Machine(folder, 0, folder / "s", *(["-global", f"vhost-user-blk-pci.{properties}"] if properties else [])) as machine:
            if not report.check(f"{title}: it boots", machine.goes_on(), machine.trace.read_text()[-2000:]):
                return
            report.check(f"{title}: STATUS was negotiated, and says that a driver is at work",
                         device_status(options, folder / "m") == 15, device_status(options, folder / "m"))
            good, status = True, []
            for _ in range(5):
                machine.tell("stop")
                status.append(device_status(options, folder / "m"))
                machine.tell("cont")
                good = good and machine.goes_on()
            report.check(f"{title}: it goes on after each of five stops of the virtual machine", good, status)
            report.check(f"{title}: whose frontend resets the device by SET_STATUS", status == [0] * 5, status)
            for _ in range(3):
                machine.tell("system_reset")
                time.sleep(0.5)
                good = good and machine.goes_on()
            report.check(f"{title}: it boots again after each of three resets", good)
            check_copies(report, title, disk, machine)
            server.kill()
            server = Server(options.vblk, arguments, folder / "s", folder / "log")
            report.check(f"{title}: it goes on with another server after one was killed", machine.goes_on())
            report.check(f"{title}: SET_STATUS and GET_STATUS were among its messages", {39, 40} <= set(machine.requests()))
            report.check(f"{title}: the server ends as it should", server.stop() == 0, server.log.read_text()[-2000:])
    finally:
        server.kill()


def test_migration(report, options, folder):
    title = "firmware that migrates"
    disk = folder / "disk.raw"
    make_disk(disk)
    machines = []
    with Server(options.vblk, [disk, "--cache", "writeback", "--migration", "on"], folder / "s0", folder / "log0"), \
            Server(options.vblk, [disk, "--cache", "writeback", "--migration", "on"], folder / "s1", folder / "log1"):
        try:
            machines.append(Machine(folder, 0, folder / "s0"))
            if not report.check(f"{title}: it boots", machines[0].goes_on(), machines[0].trace.read_text()[-2000:]):
                return
            for turn in range(1, 4):
                path = folder / f"migrate-{turn}"
                machines.append(Machine(folder, turn, folder / f"s{turn % 2}", "-incoming", f"unix:{path}"))
                wait_until(path.exists, SECONDS_MAX)
                machines[-2].tell("migrate", uri=f"unix:{path}")
                status = {}

                def is_over():
                    status.update(machines[-2].tell("query-migrate"))
                    return status.get("status") in ("completed", "failed", "cancelled")
                over = wait_until(is_over, SECONDS_MAX)
                machines[-2].tell("quit")
                machines[-2].process.wait(SECONDS_MAX)
                if not report.check(f"{title}: move {turn}", over and status.get("status") == "completed", status):
                    return
                report.check(f"{title}: it goes on after move {turn}", machines[-1].goes_on(), machines[-1].said()[-100:])
            check_copies(report, title, disk, machines[-1])
        finally:
            for machine in machines:
                machine.__exit__()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vblk", required=True, type=Path)
    options = parser.parse_args()
    options.vblk = options.vblk.resolve()
    report = Report()
    for properties in ("", "packed=on"):
        with Folder() as folder:
            test_states(report, options, folder, properties)
    with Folder() as folder:
        test_migration(report, options, folder)
    report.exit()


if __name__ == "__main__":
    main()
