"""What a power cut leaves of files that a command writes: its system calls are noted by strace(1), with what they write, and played
up to a moment, in which what was not flushed is lost or kept, write by write or sector by sector."""

import re
import subprocess
from dataclasses import dataclass

SECTOR = 512
FATES = ("lost", "kept", "by write", "by sector")


@dataclass
class Operation:
    kind: str  # "write", "zero" (also: punch a hole), "size", "flush"
    path: str
    offset: int = 0
    length: int = 0
    data: bytes = b""
    begun: int = 0
    ended: int | None = None


def text_of(hexadecimal):
    return bytes.fromhex(hexadecimal.replace("\\x", "")) if "\\x" in hexadecimal else hexadecimal.encode()


def decode(call, arguments):
    """An operation of what strace prints between a call's parentheses, or None."""
    path, rest = re.match(r"\d+<([^>]*)>(?:, )?(.*)", arguments, re.S).groups()
    path = text_of(path).decode()
    if call in ("fdatasync", "fsync"):
        return Operation("flush", path)
    if call == "ftruncate":
        return Operation("size", path, length=int(re.match(r"\d+", rest)[0]))
    if call == "fallocate":
        mode, offset, length = re.match(r"([^,]+), (\d+), (\d+)", rest).groups()
        return Operation("zero", path, int(offset), int(length)) if "ZERO" in mode or "PUNCH" in mode else None
    data = b"".join(text_of(piece) for piece in re.findall(r'"([^"]*)"', rest))
    # pwrite64: length and offset; pwritev, pwritev2: count, offset, and for the latter flags.
    offset = re.search(r'", \d+, (\d+)' if call == "pwrite64" else r"\], \d+, (\d+)", rest)[1]
    return Operation("write", path, int(offset), len(data), data)


def operations_of(trace, *command):
    """Runs a command, without io_uring; what it did to files, in order."""
    subprocess.run(["strace", "-f", "-y", "-xx", "-s", str(1 << 24), "-o", trace,
                    "-e", "trace=io_uring_setup,pwritev2,pwritev,pwrite64,fdatasync,fsync,ftruncate,fallocate",
                    "-e", "inject=io_uring_setup:error=ENOSYS", *map(str, command)],
                   stdout=subprocess.DEVNULL, check=True, timeout=60)
    operations, unfinished = [], {}
    for number, line in enumerate(trace.read_text().splitlines()):
        begun = re.match(r"(\d+) +(pwritev2|pwritev|pwrite64|fdatasync|fsync|ftruncate|fallocate)\((.*)", line)
        resumed = re.match(r"(\d+) +<\.\.\. \w+ resumed>", line)
        if begun:
            operation = decode(begun[2], begun[3])
            if operation is None:
                continue
            operation.begun = number
            operations.append(operation)
            if line.endswith("<unfinished ...>"):
                unfinished[begun[1]] = operation
            else:
                operation.ended = number
        elif resumed and resumed[1] in unfinished:
            unfinished.pop(resumed[1]).ended = number
    trace.unlink()
    return operations


def apply(content, operation, sectors=None):
    """`sectors`: says of each one whether it is written; None: all are."""
    if operation.kind == "size":
        del content[operation.length:]
        content.extend(bytes(operation.length - len(content)))
        return
    data = operation.data if operation.kind == "write" else bytes(operation.length)
    if operation.kind == "zero":
        data = data[:max(0, len(content) - operation.offset)]
    for at in range(0, len(data), SECTOR) if sectors else [0]:
        piece = data[at:at + SECTOR] if sectors else data
        if sectors and not sectors():
            continue
        begin = operation.offset + at
        content.extend(bytes(max(0, begin - len(content))))
        content[begin:begin + len(piece)] = piece


def after_power_cut(content, path, operations, moment, fate, rng, loses_flushes=False):
    """What is left of a file that had `content`, when the power goes right after a line of the trace."""
    ours = [operation for operation in operations if operation.path == str(path) and operation.begun <= moment]
    flushes = [] if loses_flushes else [flush for flush in ours if flush.kind == "flush" and flush.ended is not None and
                                        flush.ended <= moment]
    left = bytearray(content)
    for operation in ours:
        if operation.kind == "flush":
            continue
        is_stable = operation.ended is not None and any(operation.ended < flush.begun for flush in flushes)
        if is_stable or fate == "kept" or fate == "by write" and rng.random() < 0.5:
            apply(left, operation)
        elif fate == "by sector" and operation.kind == "write":
            apply(left, operation, lambda: rng.random() < 0.5)
        elif fate == "by sector" and rng.random() < 0.5:
            apply(left, operation)
    return bytes(left)
