#!/usr/bin/python3
"""Writes tests/fuzz/corpus anew: inputs that lead far into the code, which the unit tests run and fuzzers begin with.

Frontends are written down step by step, in the form that hostile_frontend.cpp reads; each is named after what it does. Rings and
images are some of each kind that fuzz.py and make_seeds.py draw. Whoever finds a better one adds its file, and leaves this alone.
"""

import random
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).resolve().parent
PACKED, EVENT_INDEX, HANDED_OVER, NO_RECOVERY, HOLDS_INTERRUPTS, LIMITED = 1, 2, 4, 8, 16, 32
LOGS, AREA, CHANNEL, MARKS_RING, STATUS = 1, 2, 4, 8, 16
READ, WRITE, FLUSH, DISCARD, ZEROES, GET_ID = range(6)
ENOSPC, NO_ERROR = 2, 0
RIGHT = 0xc0  # nothing is wrong with the message


def set_up(what=AREA):
    return bytes([7, what])


def request(kind, ring=0, slot=0):
    return bytes([8, ring, 6 * slot + kind, 1])


def requests(count, ring=0):
    return b"".join(request((WRITE, READ, FLUSH, ZEROES, DISCARD, GET_ID)[i % 6], ring, i % 5) for i in range(count))


def say(number, *payload):
    return bytes([0, number, *payload, RIGHT])


def stop(ring=0):
    return say(11, ring, 0)


def start(ring=0):
    """A ring of 16, from its size to its enabling, but for its base."""
    return say(8, ring, 16) + say(9, ring, 0, 0) + say(12, ring, 1) + say(18, ring, 1)


SET_OWNER, GET_STATUS, RESET_DEVICE = say(3), say(40), say(34)
RESET = say(39, 0)


def error(what):
    return bytes([13, what])


def pause(is_on):
    return bytes([14, 1 if is_on else 0])


NEXT_CONNECTION = bytes([15])
BOTH_STOP = stop(0) + stop(1)


def features(bits):
    return say(2, 255, *bits.to_bytes(8, "little"))


SPLIT_FEATURES = 1 << 32 | 1 << 28 | 1 << 9 | 1 << 30
PACKED_FEATURES = SPLIT_FEATURES | 1 << 34


def frontends():
    for kind, flags in (("split", 0), ("packed", PACKED)):
        for turns in (0, 5):
            yield f"{kind}-requests-{turns}", flags | EVENT_INDEX, turns, set_up() + requests(12) + requests(6, 1) + BOTH_STOP
        yield f"{kind}-suspended-and-resumed", flags | LIMITED, 2, \
            set_up() + requests(6) + requests(4, 1) + BOTH_STOP + set_up() + requests(3) + BOTH_STOP
        yield f"{kind}-suspended-for-the-next-connection", flags | LIMITED, 2, \
            set_up() + requests(6) + BOTH_STOP + NEXT_CONNECTION + set_up() + requests(2)
        yield f"{kind}-waiting-without-an-area", flags | LIMITED, 2, set_up(0) + requests(6) + BOTH_STOP + set_up(0) + requests(2)
        yield f"{kind}-suspended-and-handed-over", flags | LIMITED | HANDED_OVER, 1, \
            set_up(AREA | LOGS | MARKS_RING) + requests(5) + BOTH_STOP + NEXT_CONNECTION + set_up(AREA | LOGS) + requests(3)
        yield f"{kind}-kept-and-suspended", flags, 1, \
            set_up() + error(ENOSPC) + requests(5) + BOTH_STOP + error(NO_ERROR) + set_up() + requests(2) + BOTH_STOP
        yield f"{kind}-kept-for-the-next-connection", flags, 1, \
            set_up() + error(ENOSPC) + requests(5) + NEXT_CONNECTION + error(NO_ERROR) + set_up() + requests(2)
        yield f"{kind}-paused-in-between", flags, 3, set_up() + requests(3) + pause(True) + requests(3) + pause(False) + requests(2)
        yield f"{kind}-reset-with-requests-in-flight", flags, 15, \
            set_up(AREA | STATUS) + requests(6) + RESET + GET_STATUS + set_up(AREA | STATUS) + requests(3) + RESET_DEVICE
        yield f"{kind}-two-sessions", flags, 1, set_up(AREA | CHANNEL) + requests(4) + BOTH_STOP + SET_OWNER + set_up() + requests(4)
        yield f"{kind}-memory-that-goes-and-comes-back", flags, 1, \
            set_up() + requests(3) + say(38, 0) + say(18, 0, 0) + say(18, 0, 1) + say(37, 0) + start() + requests(3)
        yield f"{kind}-interrupts-held", flags | HOLDS_INTERRUPTS, 4, set_up() + requests(12) + requests(12, 1) + BOTH_STOP
        yield f"{kind}-without-recovery", flags | NO_RECOVERY, 4, set_up(0) + requests(6) + BOTH_STOP + set_up(0) + requests(6)
        yield f"{kind}-the-area-is-shortened", flags, 1, set_up() + requests(2) + bytes([12, 130]) + requests(3)
        yield f"{kind}-the-memory-is-shortened", flags, 1, set_up() + requests(2) + bytes([12, 128]) + requests(3)
        other = SPLIT_FEATURES if flags & PACKED else PACKED_FEATURES
        yield f"{kind}-reset-to-the-other-kind", flags, 0, set_up() + requests(2) + RESET + features(other) + start(0) + start(1)


def main():
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCE / "corpus"
    for part in ("frontend", "ring", "image"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for name, flags, turns, steps in frontends():
        (folder / "frontend" / name).write_bytes(bytes([flags, turns]) + steps)
    source = random.Random(2)
    for number in range(16):
        # The first byte is the kind of ring, of which there are as many; the steps lead somewhere.
        steps = b"".join(bytes([source.choice([0, 2, 3, 6, 8, 8, 9, 9])]) + source.randbytes(5) for _ in range(40))
        (folder / "ring" / f"kind-{number:02}").write_bytes(bytes([number, source.randrange(64), source.randrange(256)]) + steps)
    with tempfile.TemporaryDirectory() as seeds:
        subprocess.run([SOURCE / "make_seeds.py", seeds], check=True, stdout=subprocess.DEVNULL)
        for seed in sorted(Path(seeds).iterdir())[::9]:
            (folder / "image" / seed.name).write_bytes(seed.read_bytes())


if __name__ == "__main__":
    main()
