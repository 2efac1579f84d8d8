#!/usr/bin/python3
"""A server that is killed under load, and the next one that goes on. Prints TAP.

The driver (tests/interop/churn.cpp) keeps its rings, its memory and what it knows of the disk, and connects again, as a
virtual machine does. Nothing is forgiven: every request is answered once, none fails, and the disk holds what was
answered. VBLK_TEST_SEED repeats the requests, not the moments of the kills.
"""

import argparse
import json
import random
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))
import qcow2_images as qcow2  # noqa: E402
from harness import ENGINES, Folder, Report, Script, Server, make_sparse, run, test_seed  # noqa: E402
from qcow2_images import MIB, qemu_img  # noqa: E402

QUEUES = ["--queues", "4", "--iothreads", "2"]
DEPTH = 8
SECONDS = 2.5  # of requests and kills, per image and engine
# A kill while the next server still finishes what the last one had in flight, or any time later.
PAUSES = (0.003, 0.02, 0.15)
MIX = "wwwwwrrrddzuuf"


def serve(options, folder, image, *arguments, listener=None):
    return Server(options.vblk, [image, *QUEUES, *arguments], folder / "s", folder / "log", listener=listener)


def connect(churn, folder, rings="split"):
    answer = churn(f"connect {folder / 's'} 4 keep" + (" packed" if rings == "packed" else ""))
    if not answer["text"].startswith("connected"):
        raise RuntimeError(f"churn: {answer['text']}\n{(folder / 'log').read_text()}")


def is_good(answer):
    return all(answer.get(word, 0) == 0 for word in ("failed", "bad", "lost")) and "error" not in answer["text"]


def recovered(server):
    """Requests that this server has found in flight, by its log."""
    return sum(int(line.split(": ")[-1].split()[0]) for line in server.log.read_text().splitlines()
               if "were in flight when" in line)


def kill_while_running(options, churn, server, restart, stop=Server.kill):
    """Ends servers until the run of `churn` is over; (its answer, servers ended, requests recovered)."""
    kills = found = 0
    while not churn.has_answer(options.random.expovariate(1 / options.random.choice(PAUSES))):
        stop(server[0])
        found += recovered(server[0])
        kills += 1
        server[0] = restart()
    return churn.answer(), kills, found + recovered(server[0])


def check_disk(report, title, folder, churn):
    """What the driver reads is what its model has, which is kept for check_image()."""
    verified = churn("verify")
    report.check(f"{title}: the whole disk is as the model has it", is_good(verified), verified["text"])
    churn(f"dump {folder / 'model'}")


def check_image(report, title, folder, kind, image):
    form = "raw" if kind == "raw" else "qcow2"
    status, text = run("qemu-img", "compare", "-f", "raw", "-F", form, folder / "model", image)
    report.check(f"{title}: qemu-img compare finds the model in the image", status == 0, text)
    if form == "qcow2":
        found = qcow2.check(image)
        report.check(f"{title}: qemu-img check finds leaks at most", qcow2.is_sound(found), found["text"][-2000:])


def make_raw(folder):
    make_sparse(folder / "disk.raw", 24 * MIB)
    return folder / "disk.raw"


def make_qcow2(folder):
    qemu_img("create", "-f", "qcow2", folder / "disk.qcow2", 24 * MIB)
    return folder / "disk.qcow2"


def make_overlay(folder):
    (folder / "base").write_bytes(random.Random(1).randbytes(12 * MIB))
    qemu_img("create", "-f", "qcow2", "-b", folder / "base", "-F", "raw", folder / "disk.qcow2", 24 * MIB)
    return folder / "disk.qcow2"


IMAGES = {"raw": make_raw, "qcow2": make_qcow2, "an overlay": make_overlay}


def test_kills(report, options, kind, engine, cache, rings="split"):
    title = f"{kind} on {engine}, {cache}" + (", packed rings" if rings == "packed" else "")
    with Folder() as folder, Script(options.churn) as churn:
        image = IMAGES[kind](folder)
        if kind == "an overlay":
            qcow2.to_raw(image, folder / "before")
            churn(f"load {folder / 'before'}")
        arguments = ["--aio", engine, "--cache", cache]
        server = [serve(options, folder, image, *arguments)]
        try:
            connect(churn, folder, rings)
            seed = options.random.getrandbits(32)
            churn.start(f"run {seed} 10000000 {DEPTH} 65536 {MIX} {SECONDS}")
            answer, kills, found = kill_while_running(options, churn, server,
                                                      lambda: serve(options, folder, image, *arguments))
            about = f"seed {seed}, {kills} kills, {found} requests recovered\n{answer['text']}\n{server[0].log.read_text()}"
            report.check(f"{title}: every request is answered once, without an error, as the model has it",
                         is_good(answer) and 0 < answer["done"] == answer["started"], about)
            report.check(f"{title}: servers were killed with requests in flight", kills > 2 and found > 0, about)
            print(f"# {title}: {answer['done']} requests, {kills} kills, {found} requests recovered, nothing answered for "
                  f"{answer['longest-silence-ms']} ms at most", flush=True)
            check_disk(report, title, folder, churn)
            churn("disconnect")
            report.check(f"{title}: the last server ends with 0", server[0].stop() == 0, server[0].log.read_text())
        finally:
            server[0].kill()
        check_image(report, title, folder, kind, image)


def test_orderly_updates(report, options, rings):
    """SIGTERM instead: nothing is left for the next server to do again."""
    title = f"a server that is replaced, {rings} rings"
    with Folder() as folder, Script(options.churn) as churn:
        image = make_qcow2(folder)
        server = [serve(options, folder, image)]
        try:
            connect(churn, folder, rings)
            churn.start(f"run 1 10000000 {DEPTH} 65536 {MIX} 1.5")
            statuses = []
            answer, ends, found = kill_while_running(options, churn, server, lambda: serve(options, folder, image),
                                                     lambda ended: statuses.append(ended.stop()))
            report.check(f"{title}: every request is answered once", is_good(answer) and answer["done"] == answer["started"],
                         answer["text"])
            report.check(f"{title}: each ends with 0 and leaves nothing in flight",
                         ends > 2 and all(status == 0 for status in statuses) and found == 0, f"{statuses}, {found} recovered")
            verified = churn("verify")
            report.check(f"{title}: the disk is as the model has it", is_good(verified), verified["text"])
            churn("disconnect")
        finally:
            server[0].kill()


def test_activation(report, options):
    """A socket that outlives its servers: whoever connects between two of them waits."""
    title = "a socket that is passed by LISTEN_FDS"
    with Folder() as folder, Script(options.churn) as churn, socket.socket(socket.AF_UNIX) as listener:
        image = make_raw(folder)
        listener.bind(str(folder / "s"))
        listener.listen(4)
        def restart():
            time.sleep(0.05)
            return serve(options, folder, image, listener=listener)
        server = [restart()]
        try:
            connect(churn, folder)
            churn.start(f"run 1 10000000 {DEPTH} 65536 {MIX} 1.5")
            answer, kills, _ = kill_while_running(options, churn, server, restart)
            report.check(f"{title}: every request is answered once", is_good(answer) and answer["done"] == answer["started"],
                         answer["text"])
            report.check(f"{title}: it was passed on", kills > 2, kills)
            verified = churn("verify")
            report.check(f"{title}: the disk is as the model has it", is_good(verified), verified["text"])
            churn("disconnect")
            report.check(f"{title}: the last server ends with 0", server[0].stop() == 0, server[0].log.read_text())
            report.check(f"{title}: it is there afterwards", (folder / "s").exists())
        finally:
            server[0].kill()


def test_writeback(report, options):
    """A driver that chose write-through is not told again; the next server must know."""
    with Folder() as folder, Script(options.churn) as churn:
        image = make_raw(folder)
        with serve(options, folder, image, "--cache", "writethrough") as server:
            connect(churn, folder)
            server.kill()
        with serve(options, folder, image, "--cache", "none", "--monitor", folder / "m") as server:
            churn.start(f"run 1 100 {DEPTH} 65536 w")
            answer = churn.answer()
            _, text = run(options.vblk, "ctl", folder / "m", "query-status")
            report.check("a driver of a write-through disk finds one after the server has changed",
                         is_good(answer) and json.loads(text)["writeback"] is False, f"{answer['text']}\n{text}")
            churn("disconnect")


def test_suspensions(report, options, kind, engine, rings, migrates):
    """Rings that are stopped with requests in flight, to go on there or with another server of the same image."""
    title = f"rings stopped with requests in flight, {kind} on {engine}, {rings}" + (", from server to server" if migrates else "")
    with Folder() as folder, Script(options.churn) as churn:
        image = IMAGES[kind](folder)
        # What waits for its turn is what is left: so many requests are sent that there is always some.
        arguments = [image, *QUEUES, "--aio", engine, "--limits", "iops-total=300"]
        if migrates:
            arguments += ["--migration", "on"]
        sockets = [folder / "s", folder / "t"] if migrates else [folder / "s"]
        servers = []
        try:
            servers += [Server(options.vblk, arguments, path, folder / f"log{path.name}") for path in sockets]
            words = ["connect", str(sockets[0]), "4", "suspend", *map(str, sockets[1:])] + (["packed"] if rings == "packed" else [])
            answer = churn(" ".join(words))
            if not answer["text"].startswith("connected"):
                raise RuntimeError(answer["text"])
            seed = options.random.getrandbits(32)
            churn.start(f"run {seed} 10000000 {DEPTH} 65536 {MIX} {SECONDS}")
            answer = churn.answer()
            told = f"seed {seed}\n{answer['text']}\n" + "".join(server.log.read_text()[-3000:] for server in servers)
            report.check(f"{title}: every request is answered once, without an error, as the model has it",
                         is_good(answer) and 0 < answer["done"] == answer["started"], told)
            report.check(f"{title}: they were stopped, and requests left in flight",
                         answer.get("suspensions", 0) > 2 and answer.get("left-in-flight", 0) > 0, told)
            print(f"# {title}: {answer['done']} requests, {answer['suspensions']} stops, {answer['left-in-flight']} left in flight, "
                  f"nothing answered for {answer['longest-silence-ms']} ms at most", flush=True)
            check_disk(report, title, folder, churn)
            churn("disconnect")
            report.check(f"{title}: the servers end with 0", all(server.stop() == 0 for server in servers), told)
        finally:
            for server in servers:
                server.kill()
        check_image(report, title, folder, kind, image)


def test_canary(report, options, rings):
    """What the driver must find: a server that does not know what was in flight."""
    with Folder() as folder, Script(options.churn) as churn:
        image = make_raw(folder)
        server = [serve(options, folder, image)]
        try:
            connect(churn, folder, rings)
            churn("forget")
            churn.start(f"run 1 10000000 32 65536 {MIX} 1")
            answer, kills, _ = kill_while_running(options, churn, server, lambda: serve(options, folder, image))
            report.check(f"canary: requests that the next server does not know of are missed, {rings} rings",
                         kills > 0 and answer.get("lost") == 1, f"{kills} kills\n{answer['text']}")
        finally:
            server[0].kill()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vblk", required=True, type=Path, help="the program under test")
    parser.add_argument("--churn", required=True, type=Path, help="the driver for scripts with a model")
    options = parser.parse_args()
    for name in ("vblk", "churn"):
        setattr(options, name, getattr(options, name).resolve())
    options.random = random.Random(test_seed())
    report = Report()
    tests = [(test, rings) for test in (test_canary, test_orderly_updates) for rings in ("split", "packed")]
    tests += [(test_activation,), (test_writeback,)]
    tests += [(test_suspensions, "raw", "io_uring", "split", False), (test_suspensions, "qcow2", "threads", "packed", False),
              (test_suspensions, "raw", "native", "packed", True), (test_suspensions, "qcow2", "io_uring", "split", True)]
    for engine in ENGINES:
        tests += [(test_kills, "raw", engine, "none"), (test_kills, "qcow2", engine, "none")]
    tests += [(test_kills, "an overlay", "io_uring", "writeback")]
    tests += [(test_kills, "raw", engine, "none", "packed") for engine in ENGINES]
    tests += [(test_kills, "qcow2", "io_uring", "none", "packed")]
    for test, *arguments in tests:
        try:
            test(report, options, *arguments)
        except (RuntimeError, OSError) as error:
            report.check(f"{test.__name__} {arguments} runs", False, error)
    report.exit()


if __name__ == "__main__":
    main()
