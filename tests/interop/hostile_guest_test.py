#!/usr/bin/python3
"""Guests that point outside their memory, loop chains, lie about their rings, and take memory away. Prints TAP.

Each meets a server of its own, on every engine. It may cost the guest its request or its queue, with a line in the log
and the queue's error descriptor signalled; the disk's content and the next guest must not notice.
"""

import argparse
import mmap
import os
import select
import socket
import struct
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))
from harness import ENGINES, Folder, Poke, Report, Server, wait_until  # noqa: E402

MIB = 1 << 20
SECTOR = 512
CANARY = 0x5A
RING_SIZE = 128
STATUS_OK, STATUS_IOERR, STATUS_UNTOUCHED = 0, 1, 0xEE
READ, WRITE = 0, 1
NEXT, WRITABLE, INDIRECT = 1, 2, 4
# vhost-user.rst, "Front-end message types"; virtio 1.2, "Reserved Feature Bits".
(GET_FEATURES, SET_FEATURES, SET_OWNER, SET_MEM_TABLE, SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, SET_VRING_KICK,
 SET_VRING_ERR, SET_PROTOCOL_FEATURES, SET_VRING_ENABLE, ADD_MEM_REG, REM_MEM_REG) = (
     1, 2, 3, 5, 8, 9, 10, 12, 14, 16, 18, 37, 38)
FEATURES = 1 << 32 | 1 << 30 | 1 << 28 | 1 << 9  # VERSION_1, PROTOCOL_FEATURES, INDIRECT_DESC, FLUSH
PROTOCOL_FEATURES = 1 << 3 | 1 << 15  # REPLY_ACK, CONFIGURE_MEM_SLOTS
# Where things lie in the first piece of memory. User addresses are guest addresses here.
BASE, BASE_BYTES = 0x100000, MIB
AVAIL, USED, HEADERS, STATUSES, BUFFER = 0x1000, 0x2000, 0x4000, 0x8000, 0x10000
# The second piece holds nothing but data.
DATA, DATA_BYTES = 0x10000000, 4 * MIB
NOWHERE = 0x7777_0000_0000


class Memory:
    """A piece of guest memory."""

    def __init__(self, address, size):
        self.address, self.size = address, size
        self.fd = os.memfd_create("hostile")
        os.ftruncate(self.fd, size)
        self.bytes = mmap.mmap(self.fd, size)

    def region(self):
        return struct.pack("<QQQQ", self.address, self.size, self.address, 0)


class Guest:
    """A driver with one queue that does with its ring what it is told."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(str(path))
        self.base, self.data = Memory(BASE, BASE_BYTES), Memory(DATA, DATA_BYTES)
        self.ring = self.base.bytes
        self.kick_fd, self.error_fd = os.eventfd(0), os.eventfd(0, os.EFD_NONBLOCK)
        self.available = 0
        self.say(SET_OWNER)
        self.say(SET_FEATURES, struct.pack("<Q", FEATURES))
        self.say(SET_PROTOCOL_FEATURES, struct.pack("<Q", PROTOCOL_FEATURES))
        self.ask(SET_MEM_TABLE, struct.pack("<II", 2, 0) + self.base.region() + self.data.region(),
                 [self.base.fd, self.data.fd])
        self.ask(SET_VRING_NUM, struct.pack("<II", 0, RING_SIZE))
        self.ask(SET_VRING_BASE, struct.pack("<II", 0, 0))
        self.ask(SET_VRING_ADDR, struct.pack("<IIQQQQ", 0, 0, BASE, BASE + USED, BASE + AVAIL, 0))
        self.ask(SET_VRING_ERR, struct.pack("<Q", 0), [self.error_fd])
        self.ask(SET_VRING_KICK, struct.pack("<Q", 0), [self.kick_fd])
        self.ask(SET_VRING_ENABLE, struct.pack("<II", 0, 1))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()
        for fd in (self.base.fd, self.data.fd, self.kick_fd, self.error_fd):
            os.close(fd)

    def say(self, request, payload=b"", fds=(), flags=1):
        socket.send_fds(self.socket, [struct.pack("<III", request, flags, len(payload)) + payload], fds)

    def ask(self, request, payload=b"", fds=()):
        """With NEED_REPLY; returns whether it was done."""
        self.say(request, payload, fds, 1 | 8)
        reply = self.socket.recv(20, socket.MSG_WAITALL)
        if len(reply) != 20:
            raise RuntimeError(f"the server has ended the connection after message {request}")
        return struct.unpack_from("<Q", reply, 12)[0] == 0

    def descriptor(self, index, address, length, flags=0, following=0):
        struct.pack_into("<QIHH", self.ring, 16 * index, address, length, flags, following)

    def request(self, slot, kind, sector, address, length, status_address=None):
        """Header, data and status in three descriptors of their own, made available but not announced."""
        header, status = HEADERS + 16 * slot, STATUSES + slot
        struct.pack_into("<IIQ", self.ring, header, kind, 0, sector)
        self.ring[status] = STATUS_UNTOUCHED
        self.descriptor(3 * slot, BASE + header, 16, NEXT, 3 * slot + 1)
        self.descriptor(3 * slot + 1, address, length, NEXT | (WRITABLE if kind == READ else 0), 3 * slot + 2)
        self.descriptor(3 * slot + 2, BASE + status if status_address is None else status_address, 1, WRITABLE)
        self.offer(3 * slot)

    def offer(self, head):
        struct.pack_into("<H", self.ring, AVAIL + 4 + 2 * (self.available % RING_SIZE), head)
        self.available = (self.available + 1) % 65536

    def kick(self):
        struct.pack_into("<H", self.ring, AVAIL + 2, self.available)
        os.eventfd_write(self.kick_fd, 1)

    def used(self):
        return struct.unpack_from("<H", self.ring, USED + 2)[0]

    def statuses(self, count):
        return list(self.ring[STATUSES:STATUSES + count])

    def finishes(self, count):
        return wait_until(lambda: self.used() == count)

    def is_told_of_an_error(self):
        return bool(select.select([self.error_fd], [], [], 10)[0])


def fails_one_request(guest):
    """The bad request ends with an error, and the queue goes on."""
    guest.kick()
    ended = guest.finishes(1)
    guest.request(1, READ, 0, BASE + BUFFER, 4096)
    guest.kick()
    return ended and guest.finishes(2) and guest.statuses(2) == [STATUS_IOERR, STATUS_OK] and \
        guest.ring[BUFFER:BUFFER + 4096] == bytes([CANARY]) * 4096


def stops_the_queue(guest):
    """Nothing is answered, the error descriptor is signalled."""
    guest.kick()
    return guest.is_told_of_an_error() and guest.used() == 0


def data_outside(guest):
    guest.request(0, WRITE, 0, NOWHERE, 4096)
    return fails_one_request(guest)


def data_beyond_the_end(guest):
    guest.request(0, WRITE, 0, DATA + DATA_BYTES - 4096, 8192)
    return fails_one_request(guest)


def data_that_wraps(guest):
    guest.request(0, READ, 0, 2**64 - 2048, 4096)
    return fails_one_request(guest)


def read_into_nowhere(guest):
    guest.request(0, READ, 0, NOWHERE, 4096)
    return fails_one_request(guest)


def status_outside(guest):
    guest.request(0, WRITE, 0, BASE + BUFFER, 4096, status_address=NOWHERE)
    return stops_the_queue(guest)


def chain_that_loops(guest):
    guest.request(0, WRITE, 0, BASE + BUFFER, 512)
    guest.descriptor(1, BASE + BUFFER, 512, NEXT, 0)
    return stops_the_queue(guest)


def indirect_outside(guest):
    guest.descriptor(0, NOWHERE, 48, INDIRECT)
    guest.offer(0)
    return stops_the_queue(guest)


def head_outside(guest):
    guest.offer(RING_SIZE)
    return stops_the_queue(guest)


def entries_without_end(guest):
    guest.request(0, WRITE, 0, BASE + BUFFER, 512)
    guest.available = 65535
    return stops_the_queue(guest)


SLOTS, SLOT_BYTES = 40, 65536


def many_requests(guest, kind):
    for slot in range(SLOTS):
        start = slot * SLOT_BYTES
        guest.data.bytes[start:start + SLOT_BYTES] = bytes([slot + 1]) * SLOT_BYTES
        guest.request(slot, kind, (MIB + start) // SECTOR, DATA + start, SLOT_BYTES)
    guest.kick()


def unmapped_under_requests(guest):
    """When the answer comes, nothing uses the memory any more: what is done to it then reaches nobody."""
    many_requests(guest, WRITE)
    removed = guest.ask(REM_MEM_REG, struct.pack("<Q", 0) + guest.data.region())
    guest.data.bytes[:] = b"\xff" * DATA_BYTES
    os.ftruncate(guest.data.fd, 0)
    # Those that had not been taken from the ring by then have nowhere to read from.
    ended = guest.finishes(SLOTS)
    statuses = guest.statuses(SLOTS)
    guest.acknowledged = [slot for slot in range(SLOTS) if statuses[slot] == STATUS_OK]
    guest.request(0, READ, 0, BASE + BUFFER, 4096)
    guest.kick()
    return removed and ended and set(statuses) <= {STATUS_OK, STATUS_IOERR} and guest.finishes(SLOTS + 1) and \
        guest.statuses(1) == [STATUS_OK]


def shrunk_under_requests(guest):
    """Pages that are gone cannot be told from others before they are touched: the queue may go on, or stop."""
    many_requests(guest, READ)
    os.ftruncate(guest.data.fd, 0)
    return wait_until(lambda: guest.used() == SLOTS) or guest.is_told_of_an_error()


def rings_shrunk(guest):
    many_requests(guest, READ)
    os.ftruncate(guest.base.fd, 0)
    os.eventfd_write(guest.kick_fd, 1)
    return guest.is_told_of_an_error()


CASES = (
    ("a write from outside its memory", data_outside, None),
    ("a write from beyond the end of its memory", data_beyond_the_end, None),
    ("a read into memory that wraps around", data_that_wraps, None),
    ("a read into no memory", read_into_nowhere, None),
    ("a status outside its memory", status_outside, "no place for its status"),
    ("a chain that loops", chain_that_loops, "loops"),
    ("an indirect table outside its memory", indirect_outside, "indirect table outside"),
    ("a head beyond its ring", head_outside, "beyond the table"),
    ("65535 new entries", entries_without_end, "more available buffers"),
    ("memory unmapped under its requests", unmapped_under_requests, None),
    ("memory shrunk under its requests", shrunk_under_requests, None),
    ("rings that are gone", rings_shrunk, "taken away"),
)


def blocks_are(image, guest):
    """Acknowledged writes are in the image, whatever became of the memory they came from."""
    with open(image, "rb") as file:
        for slot in getattr(guest, "acknowledged", ()):
            file.seek(MIB + slot * SLOT_BYTES)
            if file.read(SLOT_BYTES) != bytes([slot + 1]) * SLOT_BYTES:
                return False
    return True


def test_case(report, options, arguments, title, behave, logged):
    with Folder() as folder:
        image = folder / "disk.img"
        image.write_bytes(bytes([CANARY]) * (8 * MIB))
        with Server(options.vblk, [image, *arguments], folder / "s", folder / "log") as server:
            with Guest(server.socket) as guest:
                good = behave(guest)
                report.check(f"{title}: costs the guest no more than its queue", good, server.log.read_text())
            if logged:
                report.check(f"{title}: the log says why", logged in server.log.read_text(), server.log.read_text())
            with Poke(options.poke, server.socket) as poke:
                answer = poke("read 0 256")
                intact = answer.get("status") == STATUS_OK and answer.get("first") == CANARY and answer.get("same") == "true"
                report.check(f"{title}: the next guest finds the disk as it was", intact, answer["text"])
            report.check(f"{title}: the server ends with 0", server.stop() == 0, server.log.read_text())
            report.check(f"{title}: acknowledged writes are in the image", blocks_are(image, guest))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vblk", required=True, type=Path, help="the program under test")
    parser.add_argument("--poke", required=True, type=Path, help="the driver for scripts")
    options = parser.parse_args()
    options.vblk, options.poke = options.vblk.resolve(), options.poke.resolve()
    report = Report()
    servers = [(engine, ["--aio", engine]) for engine in ENGINES]
    servers.append(("io_uring with registered memory", ["--aio", "io_uring", "--io-uring", "registered-buffers=on"]))
    for name, arguments in servers:
        for title, behave, logged in CASES:
            try:
                test_case(report, options, arguments, f"{name}, {title}", behave, logged)
            except (RuntimeError, OSError) as error:
                report.check(f"{name}, {title}: runs", False, error)
    report.exit()


if __name__ == "__main__":
    main()
