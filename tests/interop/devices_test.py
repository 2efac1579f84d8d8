#!/usr/bin/python3
"""Several devices of one process, described in a file: used at once, failing one by one; and files that are wrong. Prints TAP."""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))
import qcow2_images as qcow2  # noqa: E402
from harness import Devices, Folder, Poke, Script, make_sparse, run, run_tests  # noqa: E402
from qcow2_images import qemu_img  # noqa: E402

MIB = 1 << 20
STATUS_OK, STATUS_IOERR = 0, 1


def ctl(options, monitor, *words):
    status, output = run(options.vblk, "ctl", monitor, *words)
    if status != 0:
        raise RuntimeError(f"vblk ctl {words}: {output}")
    return json.loads(output)


def is_good(answer):
    return all(answer.get(word, 0) == 0 for word in ("failed", "bad", "lost")) and "error" not in answer["text"]


def two_devices(folder):
    make_sparse(folder / "disk.raw", 16 * MIB)
    qemu_img("create", "-f", "qcow2", folder / "disk.qcow2", 16 * MIB)
    return f"""
        # One of each kind.
        [[device]]
        name = "first"
        image = "{folder}/disk.raw"
        format = "raw"
        socket-path = "{folder}/s1"
        monitor = "{folder}/m1"
        queues = 4
        iothreads = 2
        aio = "io_uring"
        werror = "report"

        [[device]]
        name = "second"
        image = "{folder}/disk.qcow2"
        socket-path = "{folder}/s2"
        monitor = "{folder}/m2"
        queues = 4
        iothreads = 2
        aio = {{ read = "native", flush = "threads" }}
        cache = "writeback"
        limits = {{ iops-total = 4000, bps-write = "100M" }}
        l2-cache-size = "1M"
        share-flushes = false
        serial = "two"
    """


def test_at_once(report, options):
    with Folder() as folder, Script(options.churn) as one, Script(options.churn) as two:
        with Devices(options.vblk, folder, two_devices(folder)) as devices:
            for churn, name in ((one, "s1"), (two, "s2")):
                answer = churn(f"connect {folder / name} 4")
                report.check(f"a driver connects to {name}", answer["text"].startswith("connected"), answer["text"])
            seeds = [options.random.getrandbits(32) for _ in range(2)]
            one.start(f"run {seeds[0]} 10000000 8 65536 wwwrrdzuf 3")
            two.start(f"run {seeds[1]} 10000000 8 65536 wwwrrdzuf 3")
            time.sleep(0.5)
            first, second = (ctl(options, folder / name, "query-status") for name in ("m1", "m2"))
            report.check("each monitor tells of its own device", first["image"].endswith("disk.raw") and
                         second["image"].endswith("disk.qcow2") and first["werror"] == "report" and second["werror"] == "enospc",
                         f"{first}\n{second}")
            report.check("limits are those of the device that they were given to", first["limits"] == "none" and
                         second["limits"] == "iops-total=4000,bps-write=104857600", f"{first}\n{second}")
            engines = [[route["engine"] for route in ctl(options, folder / name, "query-aio")["iothreads"][0]["routes"]]
                       for name in ("m1", "m2")]
            report.check("engines are those of the device that they were given to", set(engines[0]) == {"io_uring"} and
                         engines[1][0] == "native" and "threads" in engines[1], engines)
            # One pauses and changes its engines; the other does not notice.
            ctl(options, folder / "m1", "pause")
            ctl(options, folder / "m1", "set-aio", "threads")
            before = sum(queue["requests"] for queue in ctl(options, folder / "m2", "query-status")["queues"])
            time.sleep(0.3)
            after = sum(queue["requests"] for queue in ctl(options, folder / "m2", "query-status")["queues"])
            report.check("one goes on while the other is paused", after > before, f"{before}, {after}")
            ctl(options, folder / "m1", "resume")
            for churn, name, seed in ((one, "first", seeds[0]), (two, "second", seeds[1])):
                answer = churn.answer()
                report.check(f"the {name} device: every request is answered once, as the model has it",
                             is_good(answer) and 0 < answer["done"] == answer["started"], f"seed {seed}\n{answer['text']}")
                verified = churn("verify")
                report.check(f"the {name} device: is as the model has it", is_good(verified), verified["text"])
                churn("disconnect")
            status = devices.stop()
            log = devices.log.read_text()
            report.check("SIGTERM ends both with 0", status == 0, f"{status}\n{log}")
            report.check("the log says which device it speaks of", "first: a frontend has connected" in log and
                         "second: a frontend has connected" in log, log)
            left = [name for name in ("s1", "s2", "m1", "m2") if (folder / name).exists()]
            report.check("no socket is left", not left, left)
        found = qcow2.check(folder / "disk.qcow2")
        report.check("qemu-img check finds nothing", qcow2.is_clean(found), found["text"])


def test_failures_stay_where_they_are(report, options):
    with Folder() as folder, Script(options.churn) as churn:
        fault = ["strace", "-f", "-qq", "-o", "/dev/null", "-P", folder / "disk.raw", "-e", "trace=pwritev2", "-e",
                 "inject=pwritev2:error=EIO"]
        text = two_devices(folder).replace('aio = "io_uring"', 'aio = "threads"\n cache = "writeback"')
        with Devices(options.vblk, folder, text, fault) as devices:
            churn(f"connect {folder / 's2'} 4")
            seed = options.random.getrandbits(32)
            churn.start(f"run {seed} 10000000 8 65536 wwwrrdzuf 3")
            with Poke(options.poke, folder / "s1") as poke:
                answer = poke("write 0 8 1")
                report.check("the device whose image fails says so", answer.get("status") == STATUS_IOERR, answer["text"])
            with socket.socket(socket.AF_UNIX) as other:
                other.connect(str(folder / "s1"))
                other.sendall(b"\xff" * 4096)
                other.settimeout(10)
                try:
                    ended = other.recv(1) == b""
                except ConnectionError:
                    ended = True
                report.check("a frontend that sends garbage is disconnected", ended)
            with Poke(options.poke, folder / "s1") as poke:
                report.check("and the next one served", poke("read 0 8").get("status") == STATUS_OK)
                os.kill(poke.process.pid, signal.SIGKILL)
            answer = churn.answer()
            report.check("the other device has noticed nothing", is_good(answer) and 0 < answer["done"] == answer["started"],
                         f"seed {seed}\n{answer['text']}\n{devices.log.read_text()}")
            churn("disconnect")


def test_kills(report, options):
    """Both devices go on after SIGKILL, each with its own driver."""
    with Folder() as folder, Script(options.churn) as one, Script(options.churn) as two:
        text = two_devices(folder)
        devices = Devices(options.vblk, folder, text)
        try:
            for churn, name in ((one, "s1"), (two, "s2")):
                churn(f"connect {folder / name} 4 keep")
                churn.start(f"run {options.random.getrandbits(32)} 10000000 8 65536 wwwrrdzuf 2")
            kills = 0
            while not one.has_answer(0.3):
                devices.process.kill()
                devices.process.wait()
                kills += 1
                devices = Devices(options.vblk, folder, text)
            for churn, name in ((one, "first"), (two, "second")):
                answer = churn.answer()
                report.check(f"{kills} kills: the {name} device's requests are each answered once",
                             kills > 0 and is_good(answer) and answer["done"] == answer["started"], answer["text"])
                churn("disconnect")
        finally:
            devices.process.kill()
            devices.process.wait()


def test_wrong_files(report, options):
    device = '[[device]]\nimage = "{0}/a.img"\nsocket-path = "{0}/s"\n'
    second = '[[device]]\nimage = "{0}/b.img"\nsocket-path = "{0}/s2"\n'
    cases = [
        ("nothing in it", "# nothing\n", "no [[device]]"),
        ("no TOML", "[[device]\n", ":1:"),
        ("another table", device + "[servers]\nx = 1\n", ":4:2: 'servers'"),
        ("a device that is no list", "[device]\n", "[[device]]"),
        ("an unknown key", device + 'sockets = "x"\n', ":4:1: a device has no key 'sockets'"),
        ("an option of the program", device + 'log-level = "info"\n', ":4:1: a device has no key 'log-level'"),
        ("a number for text", device + "serial = 5\n", ":4:10: serial must be text"),
        ("text for a number", device + 'queues = "4"\n', ":4:10: queues must be a whole number"),
        ("a number for a switch", device + "read-only = 1\n", ":4:13: read-only must be true or false"),
        ("a fraction", device + "queues = 1.5\n", "queues must be a whole number"),
        ("a table of tables", device + "limits = { iops-total = { x = 1 } }\n", "limits.iops-total must be"),
        ("too many queues", device + "queues = 65\n", ":4:10: device 'device-1': --queues 65"),
        ("limits that make no sense", device + 'limits = "iops=5"\n', ":4:10: device 'device-1': --limits"),
        ("no image", '[[device]]\nsocket-path = "{0}/s"\n', ":1:1: device 'device-1': no image"),
        ("no socket", '[[device]]\nimage = "{0}/a.img"\n', "socket-path"),
        ("an empty path", '[[device]]\nimage = "{0}/a.img"\nsocket-path = ""\n', ":3:15: socket-path is empty"),
        ("a key twice", device + "queues = 1\nqueues = 2\n", ":5:"),
        ("one name twice", device + 'name = "x"\n' + second + 'name = "x"\n', ":8:8: there is a device 'x'"),
        ("one socket twice", device + second.replace("s2", "../{1}/s"), ":6:15: socket-path"),
        ("one monitor twice", device + 'monitor = "{0}/m"\n' + second + 'monitor = "{0}/m"\n', ":8:11: monitor"),
        ("a monitor on its own socket", device + 'monitor = "{0}/s"\n', ":4:11: monitor and socket-path"),
        ("a monitor on another's socket", device + second + 'monitor = "{0}/s"\n', ":7:11: monitor"),
        ("one image twice", device + second.replace("b.img", "a.img"), ":5:9: image"),
        ("one image by two names", device + second.replace("b.img", "link"), ":5:9: image"),
        ("one image, read once", device + "read-only = true\n" + second.replace("b.img", "a.img"), ":6:9: image"),
        ("an image that is not there", device + second.replace("b.img", "missing"), "device 'device-2': "),
        ("a processor that is not there", device + "iothread-cpus = [1023]\n", "processor 1023"),
    ]
    with Folder() as folder:
        for name in ("a.img", "b.img"):
            make_sparse(folder / name, MIB)
        (folder / "link").symlink_to(folder / "a.img")
        for title, text, names in cases:
            (folder / "vblk.toml").write_text(text.replace("{0}", str(folder)).replace("{1}", folder.name))
            before = sorted(os.listdir(folder))
            status, output = run(options.vblk, "serve", "--config", folder / "vblk.toml", timeout=20)
            lines = [line for line in output.splitlines() if " info: " not in line]
            report.check(f"refused in one line that tells the place: {title}",
                         status in (1, 2) and len(lines) == 1 and names in lines[0], f"{status}, {names}\n{output}")
            report.check(f"leaves nothing behind: {title}", sorted(os.listdir(folder)) == before, os.listdir(folder))
        for title, words, names in (("no such file", ["--config", folder / "none"], "none"),
                                    ("an image beside it", [folder / "a.img", "--config", folder / "vblk.toml"], "image ="),
                                    ("an option beside it", ["--queues", "2", "--config", folder / "vblk.toml"], "--queues")):
            status, output = run(options.vblk, "serve", *words, timeout=20)
            report.check(f"refused in one line: {title}", status == 2 and len(output.splitlines()) == 1 and names in output, output)


def test_shared_for_reading(report, options):
    with Folder() as folder:
        (folder / "a.img").write_bytes(b"\x07" * MIB)
        text = "".join(f'[[device]]\nimage = "{folder}/a.img"\nsocket-path = "{folder}/s{i}"\nread-only = true\n' for i in (1, 2))
        with Devices(options.vblk, folder, text) as devices, Poke(options.poke, folder / "s1") as one, \
                Poke(options.poke, folder / "s2") as two:
            answers = [poke("read 0 8") for poke in (one, two)]
            report.check("two devices may read one image", all(answer.get("first") == 7 for answer in answers), answers)
            report.check("they end with 0", devices.stop() == 0, devices.log.read_text())


def test_processors(report, options):
    """I/O threads run where they are told to, and nowhere else."""
    with Folder() as folder:
        make_sparse(folder / "a.img", MIB)
        allowed = sorted(os.sched_getaffinity(0))
        wanted = [allowed[0], allowed[-1]]
        text = (f'[[device]]\nname = "pinned"\nimage = "{folder}/a.img"\nsocket-path = "{folder}/s"\nqueues = 2\niothreads = 2\n'
                f"iothread-cpus = {wanted}\n")
        with Devices(options.vblk, folder, text) as devices:
            threads = {}
            for task in Path(f"/proc/{devices.process.pid}/task").iterdir():
                threads[(task / "comm").read_text().strip()] = os.sched_getaffinity(int(task.name))
            found = [threads.get(f"pinned-io-{i}") for i in (0, 1)]
            report.check("each I/O thread is on its processor", found == [{wanted[0]}, {wanted[1]}], threads)
            others = [cpus for name, cpus in threads.items() if not name.startswith("pinned-io")]
            report.check("and no other thread is kept there", all(cpus == set(allowed) for cpus in others), threads)
        status, output = run(options.vblk, "serve", folder / "a.img", "--socket-path", folder / "s", "--iothread-cpus", "0,0")
        report.check("more lists than threads are refused", status == 2 and "--iothreads is 1" in output, output)
        status, output = run(options.vblk, "serve", folder / "a.img", "--socket-path", folder / "s", "--iothread-cpus", "x")
        report.check("what names no processor is refused", status == 2 and "names no processors" in output, output)


if __name__ == "__main__":
    run_tests(__doc__, ("poke", "churn"), [
        (test_wrong_files,), (test_shared_for_reading,), (test_processors,), (test_at_once,), (test_failures_stay_where_they_are,),
        (test_kills,)])
