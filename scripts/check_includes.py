#!/usr/bin/python3
"""Checks that every #include points in the direction that docs/architecture.md allows. Prints TAP."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Folder -> the folders of ours it may include besides itself. What is not listed is not allowed.
ALLOWED = {
    "threadpool": set(),
    "aio": {"threadpool"},
    "blockdev": {"aio", "threadpool"},
    "blockdev/qcow2": {"blockdev", "aio"},
    "blockdev/image": {"blockdev/qcow2", "blockdev", "aio"},
    "blockdev/img": {"blockdev/image", "blockdev/qcow2", "blockdev", "aio"},
    "blockdev/virtio": {"blockdev", "aio"},
    "blockdev/vhost_user": {"blockdev/virtio", "blockdev", "aio"},
    "blockdev/driver": {"blockdev/vhost_user", "blockdev/virtio", "blockdev", "aio"},
    "blockdev/bench": {"blockdev/image", "blockdev/driver", "blockdev/virtio", "blockdev", "aio"},
    "blockdev/conform": {"blockdev/driver", "blockdev/vhost_user", "blockdev/virtio", "blockdev", "aio"},
    "blockdev/demo": {"blockdev/bench", "blockdev/driver", "blockdev/vhost_user", "blockdev/virtio", "blockdev", "aio"},
    "blockdev/wash": {"blockdev/bench", "blockdev/image", "blockdev/driver", "blockdev/vhost_user", "blockdev", "aio", "threadpool"},
    "blockdev/cli": {"blockdev/image", "blockdev/img", "blockdev/bench", "blockdev/conform", "blockdev/demo", "blockdev/wash", "blockdev/vhost_user", "blockdev/virtio", "blockdev", "aio"},
}
# The engines are known by the block layer's core and by the commands that let a user choose; nowhere else.
ENGINE_HEADER = re.compile(r"^aio/(\w+_engine|engine_set|engine)\.h$")
NO_ENGINES = {"blockdev/qcow2", "blockdev/virtio", "blockdev/vhost_user", "blockdev/driver"}
# The driver is the other end of the wire: of the device it may see the formats, not the code.
DRIVER_MAY_SEE = re.compile(
    r"^(blockdev/driver/|blockdev/vhost_user/(protocol|socket)\.h|blockdev/virtio/(blk_wire|split_ring|packed_ring|\w*endian)\.h"
    r"|aio/(error|event_fd)\.h|blockdev/(log|byte_size)\.h)")
# Libraries that few files may include.
CONFINED = {"libaio.h": {"aio/native_engine.cpp", "aio/native_file_calls.cpp"},
            "liburing.h": {"aio/io_uring_engine.cpp", "aio/io_uring_file_calls.cpp", "aio/io_uring_tables.cpp"}}
# One pool is Boost's, to be measured beside ours.
THREADPOOL_BOOST = {"threadpool/asio_pool.cpp": re.compile(r"^boost/asio/(post|thread_pool)\.hpp$")}
THREADPOOL_SYSTEM = re.compile(r"^([a-z_]+|linux/futex\.h|sys/\w+\.h|unistd\.h|pthread\.h)$")


def folder_of(path):
    return path.rsplit("/", 1)[0]


def violations(path, text):
    """What is wrong with the includes of one file; `path` is relative to the root."""
    folder, found = folder_of(path), []
    for kind, name in re.findall(r'^\s*#\s*include\s*(["<])([^">]+)[">]', text, re.MULTILINE):
        if name in CONFINED and path not in CONFINED[name]:
            found.append(f"{name} is for {' and '.join(sorted(CONFINED[name]))} alone")
        if kind == "<":
            allowed_boost = THREADPOOL_BOOST.get(path)
            if folder == "threadpool" and not THREADPOOL_SYSTEM.match(name) and not (
                    allowed_boost and allowed_boost.match(name)):
                found.append(f"<{name}>: threadpool/ is on the standard library only")
            continue
        target = folder_of(name) if "/" in name else ""
        if target != folder and target not in ALLOWED[folder]:
            found.append(f"{name}: {folder}/ may not include {target or 'files without their folder'}")
        elif folder in NO_ENGINES and ENGINE_HEADER.match(name):
            found.append(f"{name}: {folder}/ knows no engine")
        elif folder == "blockdev/driver" and not DRIVER_MAY_SEE.match(name):
            found.append(f"{name}: the driver sees the wire, not the device")
        elif folder == "blockdev/conform" and target != folder and not DRIVER_MAY_SEE.match(name):
            found.append(f"{name}: the suite is on the driver's side")
    return found


# A checker that finds nothing proves nothing: each of these must be found.
CANARIES = [
    ("threadpool/x.cpp", '#include "aio/error.h"\n'),
    ("threadpool/x.cpp", "#include <boost/asio.hpp>\n"),
    ("threadpool/asio_pool.cpp", "#include <boost/json.hpp>\n"),
    ("aio/x.h", '#include "blockdev/image.h"\n'),
    ("blockdev/x.cpp", '#include "blockdev/virtio/blk_wire.h"\n'),
    ("blockdev/virtio/x.cpp", '#include "aio/threads_engine.h"\n'),
    ("blockdev/qcow2/x.cpp", '#include "aio/engine_set.h"\n'),
    ("blockdev/x.cpp", '#include "blockdev/qcow2/qcow2_node.h"\n'),
    ("blockdev/driver/x.cpp", '#include "blockdev/virtio/blk_device.h"\n'),
    ("blockdev/conform/x.cpp", '#include "blockdev/virtio/blk_device.h"\n'),
    ("blockdev/vhost_user/x.cpp", '#include "blockdev/cli/options.h"\n'),
    ("aio/x.cpp", "#include <liburing.h>\n"),
    ("aio/x.cpp", "#include <libaio.h>\n"),
]


def main():
    number = failed = 0

    def check(name, details):
        nonlocal number, failed
        number += 1
        failed += bool(details)
        print(f"{'not ok' if details else 'ok'} {number} - {name}")
        for detail in details:
            print(f"# {detail}")

    for path, text in CANARIES:
        check(f"canary is found: {text.strip()} in {path}", [] if violations(path, text) else ["not found"])
    for folder in ALLOWED:
        for file in sorted((ROOT / folder).glob("*.[ch]*")):
            path = str(file.relative_to(ROOT))
            check(f"includes of {path}", violations(path, file.read_text()))
    print(f"1..{number}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
