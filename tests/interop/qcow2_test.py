#!/usr/bin/python3
"""qcow2 against Debian's qemu-img and qemu-io: what they make reads the same through vblk, and what vblk writes is right
by their judgement. Prints TAP.

VBLK_TEST_SEED repeats a run, VBLK_TEST_ROUNDS is the number of SIGKILLs under load, VBLK_SEQUENCE_RUNS how many random
sequences each image has on each engine.
"""

import argparse
import contextlib
import filecmp
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))
import qcow2_images as qcow2  # noqa: E402
from harness import ENGINES, Folder, Poke, Report, Script, Server, allocated_bytes, make_sparse  # noqa: E402
from harness import refused, run, test_seed, wait_until  # noqa: E402
from qcow2_images import COPIED, KIB, MIB, SECTOR, Header, Recipe, qemu_img, qemu_io  # noqa: E402

QUEUES = ["--queues", "4", "--iothreads", "2"]
MATRIX_COUNT = 44
REQUESTS = 500  # of a random sequence
ROUNDS = 36
# ClusterAllocator::kReserveBytesMax and kReserveClustersMin: what a killed server leaks of clusters taken in advance.
RESERVES, RESERVE_BYTES, RESERVE_CLUSTERS_MIN = 2, 4 * MIB, 4
STATUS_OK, STATUS_IOERR = 0, 1


class Churn(Script):
    """tests/interop/churn.cpp: random requests on several queues, and a model of the disk."""

    def __init__(self, options):
        super().__init__(options.churn)

    def connect(self, server):
        answer = self(f"connect {server.socket} 4")
        if not answer["text"].startswith("connected"):
            raise RuntimeError(f"churn: {answer['text']}\n{server.log.read_text()}")


def is_good(answer):
    """Every request was carried out, and nothing differs from the model."""
    return answer.get("failed", 0) == 0 and answer.get("bad") == 0 and answer.get("lost", 0) == 0


def serve(options, folder, image, *arguments):
    return Server(options.vblk, [image, *QUEUES, *arguments], folder / "s", folder / "log")


def stop(report, title, server):
    status = server.stop(60)
    report.check(f"{title}: the server ends with 0 and nothing to complain of",
                 status == 0 and "damaged" not in server.log.read_text(), f"{status}\n{server.log.read_text()}")


# ---- Reading what others wrote.

def test_matrix(report, options):
    """Every combination reads as `qemu-img convert` reads it, on one engine after the other."""
    for number, recipe in enumerate(qcow2.option_matrix(options.random, MATRIX_COUNT)):
        with Folder() as folder:
            title = f"image {number} ({recipe})"
            try:
                image, _ = recipe.make(folder, options.random)
                qcow2.to_raw(image, folder / "expected")
                before = image.read_bytes()
                mode = ["--read-only"] if number % 2 else []
                engine = ENGINES[number % len(ENGINES)]
                with serve(options, folder, image, "--aio", engine, *mode) as server, Churn(options) as churn:
                    churn.connect(server)
                    answer = churn(f"dump {folder / 'found'}")
                    server.stop()
            except RuntimeError as error:
                report.check(f"{title}: can be made and served", False, error)
                continue
            same = filecmp.cmp(folder / "expected", folder / "found", shallow=False)
            report.check(f"{title}: reads as qemu-img reads it", is_good(answer) and same, answer["text"])
            found = qcow2.check(image)
            if mode:
                report.check(f"{title}: reading alone changes nothing", image.read_bytes() == before)
            elif not recipe.bitmaps:
                report.check(f"{title}: is clean after it was open for writing", qcow2.is_clean(found), found["text"])


# ---- Writing, on several queues.

def written_recipes():
    """What the random sequences and the kills go through: each brings other paths of the code."""
    return [
        Recipe("plain", {}, 24 * MIB),
        Recipe("small_clusters", {"cluster_size": 512, "refcount_bits": 1}, 3 * MIB + SECTOR),
        Recipe("snapshots", {"cluster_size": 4 * KIB, "refcount_bits": 8}, 8 * MIB, snapshots=True),
        Recipe("compressed", {"compression_type": "zstd", "cluster_size": 16 * KIB}, 8 * MIB, compressed=True,
               snapshots=True),
        Recipe("subclusters", {"extended_l2": "on"}, 12 * MIB + 3 * SECTOR, backing="qcow2", backing_size=9 * MIB + SECTOR),
        Recipe("overlay", {}, 16 * MIB, backing="raw", backing_size=30 * MIB),
        Recipe("old_overlay", {"compat": "0.10", "cluster_size": 4 * KIB}, 8 * MIB, backing="qcow2", backing_size=5 * MIB),
        Recipe("lazy", {"lazy_refcounts": "on", "preallocation": "metadata", "refcount_bits": 64}, 12 * MIB),
        Recipe("large_clusters", {"cluster_size": 2 * MIB, "extended_l2": "on", "refcount_bits": 4}, 32 * MIB, snapshots=True),
        Recipe("data_file", {}, 12 * MIB, data_file=True),
        Recipe("raw_data_file", {"data_file_raw": "on"}, 12 * MIB, data_file=True),
    ]


def test_sequences(report, options):
    for run_number, engine in itertools.product(range(options.sequence_runs), ENGINES):
        for recipe in written_recipes():
            with Folder() as folder:
                title = f"{engine}, {recipe.name}" + (f", again {run_number}" if run_number else "")
                try:
                    sequence(report, options, folder, title, engine, recipe)
                except RuntimeError as error:
                    report.check(f"{title}: runs", False, error)


def sequence(report, options, folder, title, engine, recipe):
    image, snapshots = recipe.make(folder, options.random)
    qcow2.to_raw(image, folder / "before")
    cache = options.random.choice(("none", "writeback", "writethrough"))
    arguments = ["--aio", engine, "--cache", cache]
    if options.random.random() < 0.5:
        # Tables come and go.
        arguments += ["--l2-cache-size", "64K", "--refcount-cache-size", "64K"]
    seed = options.random.getrandbits(32)
    with Churn(options) as churn:
        churn(f"load {folder / 'before'}")
        with serve(options, folder, image, *arguments) as server:
            churn.connect(server)
            answer = churn(f"run {seed} {REQUESTS} 6 {recipe.cluster_size()} wwwwwrrrddzuuf")
            report.check(f"{title}: random requests over 4 queues agree with the model", is_good(answer),
                         f"{' '.join(map(str, arguments))}\n{answer['text']}\n{server.log.read_text()}")
            answer = churn("verify")
            report.check(f"{title}: the whole disk agrees with the model", is_good(answer), answer["text"])
            churn(f"dump {folder / 'model'}")
            churn("disconnect")
            stop(report, title, server)
        status, text = run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", folder / "model", image)
        report.check(f"{title}: qemu-img compare finds the model in the image", status == 0, text)
        found = qcow2.check(image)
        report.check(f"{title}: qemu-img check finds neither error nor leak", qcow2.is_clean(found), found["text"])
        if "data_file_raw" in recipe.options:
            data = folder / f"{recipe.name}.data"
            report.check(f"{title}: the data file is the disk", filecmp.cmp(data, folder / "model", shallow=False))
        # Tables of a restart are those of the disk.
        with serve(options, folder, image, "--aio", engine, "--read-only") as server:
            churn.connect(server)
            answer = churn("verify")
            report.check(f"{title}: a new server reads the same", is_good(answer), answer["text"])
            churn("disconnect")
    check_snapshots(report, title, folder, image, snapshots)


def check_snapshots(report, title, folder, image, snapshots):
    for name, expected in snapshots.items():
        qcow2.to_raw(image, folder / "snapshot", "-l", f"snapshot.name={name}")
        report.check(f"{title}: snapshot {name} has kept its content",
                     filecmp.cmp(expected, folder / "snapshot", shallow=False))
    for name, expected in snapshots.items():
        qemu_img("snapshot", "-a", name, image)
        qcow2.to_raw(image, folder / "snapshot")
        found = qcow2.check(image)
        same = filecmp.cmp(expected, folder / "snapshot", shallow=False)
        report.check(f"{title}: the disk goes back to snapshot {name}", same and qcow2.is_clean(found), found["text"])


# ---- SIGKILL.

# Where every cluster has its place already nothing is freed; otherwise a cluster that was freed and that no flush has
# handed on is leaked as well.
KILL_MIXES = ("wwwwwrrf", "wwwwrddzuuf", "wwwwwwwwwdd", "wf")


def test_kills(report, options):
    """SIGKILL at random times under load: what was flushed is there, and nothing has to be repaired."""
    recipes = [recipe for recipe in written_recipes() if recipe.name not in ("data_file", "old_overlay")]
    per_image = 4
    for number in range((options.rounds + per_image - 1) // per_image):
        recipe, engine = recipes[number % len(recipes)], ENGINES[(number + number // len(recipes)) % len(ENGINES)]
        with Folder() as folder:
            title = f"killed {recipe.name} on {engine}"
            try:
                rounds = min(per_image, options.rounds - number * per_image)
                kill_rounds(report, options, folder, title, engine, recipe, rounds)
            except RuntimeError as error:
                report.check(f"{title}: runs", False, error)


def is_let_go(image):
    """A killed process has an image until the kernel has ended its requests."""
    return "lock" not in run("qemu-io", "-r", "-f", "qcow2", "-c", "length", image)[1]


def leaks_bound(recipe, mix):
    cluster = recipe.cluster_size()
    reserve = max(RESERVE_BYTES // cluster, RESERVE_CLUSTERS_MIN) * RESERVES
    # Freed since the last flush, over and over in the same place: so many pieces at most
    # (Qcow2Node::kFreedExtentsMax).
    freed = 65536
    return reserve + (freed if "d" in mix or recipe.snapshots or recipe.compressed else 0)


def kill_rounds(report, options, folder, title, engine, recipe, rounds):
    image, snapshots = recipe.make(folder, options.random)
    qcow2.to_raw(image, folder / "before")
    cache = options.random.choice(("none", "none", "writeback"))
    leaks_before = 0
    with Churn(options) as churn:
        churn(f"load {folder / 'before'}")
        for number in range(rounds):
            mix, seed = options.random.choice(KILL_MIXES), options.random.getrandbits(32)
            pause, in_stop = options.random.expovariate(8), options.random.random() < 0.2
            about = f"round {number}, mix {mix}, seed {seed}, cache {cache}, killed after {pause:.3f} s" \
                    f"{' while it stopped' if in_stop else ''}"
            with serve(options, folder, image, "--aio", engine, "--cache", cache) as server:
                churn.connect(server)
                answer = churn("verify")
                report.check(f"{title}: everything flushed is there", is_good(answer), f"{about}\n{answer['text']}")
                churn.start(f"run {seed} 10000000 8 {recipe.cluster_size()} {mix}")
                time.sleep(pause)
                if in_stop:
                    os.kill(server.pid(), signal.SIGTERM)
                    time.sleep(options.random.expovariate(50))
                server.kill()
                answer = churn.answer()
                report.check(f"{title}: all requests before it agree with the model",
                             answer.get("bad") == 0 and answer.get("failed") == 0,
                             f"{about}\n{answer['text']}\n{server.log.read_text()}")
            wait_until(lambda: is_let_go(image))
            found = qcow2.check(image)
            report.check(f"{title}: qemu-img check finds leaks at most", qcow2.is_sound(found), f"{about}\n{found['text'][-3000:]}")
            leaks, bound = found["leaks"] - leaks_before, leaks_bound(recipe, mix)
            report.check(f"{title}: no more is leaked than stated", leaks <= bound, f"{about}\n{leaks} clusters, {bound} stated")
            leaks_before = found["leaks"]
        with serve(options, folder, image, "--aio", engine) as server:
            churn.connect(server)
            answer = churn("verify")
            report.check(f"{title}: everything flushed is there", is_good(answer), answer["text"])
            churn(f"dump {folder / 'model'}")
            churn("disconnect")
            stop(report, title, server)
    status, text = run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", folder / "model", image)
    report.check(f"{title}: qemu-img compare finds the model in the image", status == 0, text)
    qemu_img("check", "-f", "qcow2", "-r", "leaks", image)
    check_snapshots(report, title, folder, image, snapshots)


def test_canaries(report, options):
    """What the model must find, or it would find nothing in the other tests either."""
    with Folder() as folder, Churn(options) as churn:
        image, old = folder / "disk.qcow2", folder / "old.qcow2"
        qemu_img("create", "-f", "qcow2", image, 4 * MIB)
        shutil.copy(image, old)
        with serve(options, folder, image) as server:
            churn.connect(server)
            churn("run 1 200 4 65536 w")
            answer = churn("flush")
            report.check("canary: the disk is flushed", answer.get("status") == STATUS_OK, answer["text"])
            server.kill()
        shutil.copy(old, image)
        with serve(options, folder, image) as server:
            churn.connect(server)
            answer = churn("verify")
            report.check("canary: flushed writes that a kill has cost are found", answer.get("bad", 0) > 0, answer["text"])
            churn("disconnect")
            server.stop()
        qemu_io(image, f"write -P 3 {MIB} {SECTOR}")
        with serve(options, folder, image) as server:
            churn.connect(server)
            answer = churn("verify")
            report.check("canary: one sector that somebody else wrote is found",
                         (answer.get("bad"), answer.get("first-bad-sector")) == (1, MIB // SECTOR), answer["text"])
            churn("disconnect")


# ---- What is refused.

def damaged(folder, name, change, *create):
    """A small image with some data, changed by `change(path)`."""
    image = folder / name
    qemu_img("create", "-f", "qcow2", *create, image, 4 * MIB)
    qemu_io(image, "write -P 7 0 256k")
    change(image)
    return image


def set_field(name, value):
    def change(path):
        Header(path)[name] = value
    return change


def set_l1(value):
    def change(path):
        qcow2.write_number(path, Header(path)["l1_table_offset"], value)
    return change


def set_refcount_block(value):
    def change(path):
        qcow2.write_number(path, Header(path)["refcount_table_offset"], value)
    return change


def name_feature_42(path):
    """Sets incompatible feature 42, and gives it a name in place of the first one in the feature name table."""
    Header(path)["incompatible_features"] = 1 << 42
    table = qcow2.extension_offset(path, qcow2.EXTENSION_FEATURE_NAMES) + 8
    qcow2.write_number(path, table, 42, ">H")
    with open(path, "r+b") as file:
        file.seek(table + 2)
        file.write(b"time travel".ljust(46, b"\0"))


def test_refusals_by_content(report, options):
    with Folder() as folder:
        at = ["--socket-path", folder / "s"]
        for title, change, names in (
                ("an incompatible feature without a name", set_field("incompatible_features", 1 << 41), "feature 41"),
                ("an incompatible feature with a name", name_feature_42, "time travel"),
                ("AES encryption", set_field("crypt_method", 1), "AES"),
                ("LUKS encryption", set_field("crypt_method", 2), "LUKS"),
                ("an unknown encryption", set_field("crypt_method", 9), "encryption method 9"),
                ("a corrupt image", set_field("incompatible_features", qcow2.INCOMPAT_CORRUPT), "vblk img check -r"),
                ("version 4", lambda path: qcow2.write_number(path, 4, 4, ">I"), "version 4"),
                ("clusters that are too large", set_field("cluster_bits", 22), "2^22"),
                ("an L1 table that is too small", set_field("l1_size", 0), "L1 table"),
                ("an L1 table beyond the end", set_field("l1_table_offset", 1 << 40), "L1 table"),
                ("an L1 table that is not aligned", set_field("l1_table_offset", 0x30010), "L1 table"),
                ("a refcount table beyond the end", set_field("refcount_table_offset", 1 << 40), "refcount table"),
                ("no refcount table", set_field("refcount_table_clusters", 0), "refcount table"),
                ("a refcount table that is too large", set_field("refcount_table_clusters", 1 << 20), "refcount table"),
                ("a snapshot table beyond the end", lambda path: (set_field("nb_snapshots", 2)(path),
                                                                  set_field("snapshots_offset", 1 << 40)(path)),
                 "snapshot table"),
                ("an L2 table beyond the end", set_l1(1 << 40 | COPIED), "L2 table"),
                ("an L2 table over the header", set_l1(COPIED), "L2 table"),
                ("an L2 table over the refcount table", set_l1(64 * KIB | COPIED), "overlaps"),
                ("a refcount block over the L1 table", set_refcount_block(3 * 64 * KIB), "overlaps"),
                ("a file cut within its tables", lambda path: os.truncate(path, 100 * KIB), "beyond the end"),
                ("a file cut within its header", lambda path: os.truncate(path, 90), "disk.qcow2"),
        ):
            image = damaged(folder, "disk.qcow2", change)
            before = image.read_bytes()
            refused(report, options.vblk, title, folder, [image, *at], names)
            report.check(f"{title}: the image is as it was", image.read_bytes() == before)
            image.unlink()
        encrypted(report, options, folder, at)


def encrypted(report, options, folder, at):
    """LUKS as qemu-img makes it."""
    image = folder / "luks.qcow2"

    def is_made():
        return run("qemu-img", "create", "-f", "qcow2", "--object", "secret,id=key,data=passphrase",
                   "-o", "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10", image, MIB)[0] == 0
    # On a busy machine it may not be able to measure how fast its key derivation is.
    if not wait_until(is_made, 60):
        raise RuntimeError("qemu-img cannot make an encrypted image")
    refused(report, options.vblk, "an image encrypted by qemu-img", folder, [image, *at], "LUKS")


def test_refusals_by_surroundings(report, options):
    with Folder() as folder:
        at = ["--socket-path", folder / "s"]
        base, overlay = folder / "base.qcow2", folder / "overlay.qcow2"
        qemu_img("create", "-f", "qcow2", base, MIB)
        qemu_img("create", "-f", "qcow2", "-b", base, "-F", "qcow2", overlay)

        no_format = folder / "no_format.qcow2"
        qemu_img("create", "-f", "qcow2", "-b", base, "-F", "qcow2", no_format)
        # An extension of a kind that nobody knows is skipped.
        qcow2.write_number(no_format, qcow2.extension_offset(no_format, qcow2.EXTENSION_BACKING_FORMAT), 0x12345678, ">I")
        refused(report, options.vblk, "a backing file without a format", folder, [no_format, *at], "vblk img rebase -u -F")
        vmdk = folder / "vmdk.qcow2"
        qemu_img("create", "-f", "vmdk", folder / "base.vmdk", MIB)
        qemu_img("create", "-f", "qcow2", "-b", folder / "base.vmdk", "-F", "vmdk", vmdk)
        refused(report, options.vblk, "a backing file of another format", folder, [vmdk, *at], "'vmdk'")
        orphan = folder / "orphan.qcow2"
        qemu_img("create", "-u", "-f", "qcow2", "-b", folder / "gone.img", "-F", "raw", orphan, MIB)
        refused(report, options.vblk, "a backing file that is missing", folder, [orphan, *at], "gone.img")
        wrong = folder / "wrong.qcow2"
        make_sparse(folder / "base.img", MIB)
        qemu_img("create", "-u", "-f", "qcow2", "-b", folder / "base.img", "-F", "qcow2", wrong, MIB)
        refused(report, options.vblk, "a backing file that is not of its format", folder, [wrong, *at], "base.img")
        loop = folder / "loop.qcow2"
        qemu_img("create", "-u", "-f", "qcow2", "-b", loop, "-F", "qcow2", folder / "other.qcow2", MIB)
        (folder / "other.qcow2").rename(loop)
        refused(report, options.vblk, "an image that is its own backing file", folder, [loop, *at], "its own backing file")
        pair = [folder / "pair1.qcow2", folder / "pair2.qcow2"]
        for one, other in (pair, pair[::-1]):
            qemu_img("create", "-u", "-f", "qcow2", "-b", other, "-F", "qcow2", one, MIB)
        refused(report, options.vblk, "backing files in a circle", folder, [pair[0], *at], "its own backing file")
        external = folder / "external.qcow2"
        qemu_img("create", "-f", "qcow2", "-o", f"data_file={folder / 'external.data'}", external, MIB)
        (folder / "external.data").unlink()
        refused(report, options.vblk, "a data file that is missing", folder, [external, *at], "external.data")
        shutil.copy(base, folder / "disk.img")
        refused(report, options.vblk, "qcow2 in a file whose name says raw", folder, [folder / "disk.img", *at], "--format qcow2")
        shutil.copy(folder / "base.img", folder / "raw.qcow2")
        refused(report, options.vblk, "raw in a file whose name says qcow2", folder, [folder / "raw.qcow2", *at], "raw.qcow2")
        json_name = folder / "json.qcow2"
        qemu_img("create", "-u", "-f", "qcow2", "-b", f'json:{{"driver":"raw","file":{{"filename":"{base}"}}}}', "-F", "raw",
                 json_name, MIB)
        refused(report, options.vblk, "a backing file by a json: description", folder, [json_name, *at], "json:")
        with serve(options, folder, folder / "disk.img", "--format", "qcow2") as server:
            report.check("qcow2 in a file whose name says raw is served where the user says so", server.stop() == 0)
        test_read_only_files(report, options, folder, at)


def test_read_only_files(report, options, folder, at):
    if os.geteuid() != 0:
        report.skip("an image on a read-only file system", "needs root")
        return
    image = folder / "fixed.qcow2"
    qemu_img("create", "-f", "qcow2", image, MIB)
    qemu_io(image, "write -P 9 0 64k")
    wrapper = ["unshare", "-m", "bash", "-c", 'mount --bind -o ro "$1" "$1" && shift && exec "$@"', "ro", str(folder)]
    with Folder() as elsewhere:
        socket = ["--socket-path", elsewhere / "s"]
        refused(report, options.vblk, "an image on a read-only file system", folder, [image, *socket], "fixed.qcow2", wrapper)
        with Server(options.vblk, [image, "--read-only"], elsewhere / "s", elsewhere / "log", wrapper,
                    wrapper_stays=False) as server, Poke(options.poke, server.socket) as poke:
            answer = poke("read 0 128")
            report.check("an image on a read-only file system is served read only",
                         answer.get("first") == 9 and answer.get("same") == "true", answer["text"])
            answer = poke("write 0 8 1")
            report.check("a write to a read-only image fails", answer.get("status") == STATUS_IOERR, answer["text"])


@contextlib.contextmanager
def qemu_io_that_holds(image, *options):
    peer = subprocess.Popen(["qemu-io", "-f", "qcow2", *options, str(image)], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print("length", file=peer.stdin, flush=True)
    peer.stdout.readline()
    yield
    peer.communicate("quit\n", 20)


def test_locks(report, options):
    with Folder() as folder:
        image, base = folder / "disk.qcow2", folder / "base.qcow2"
        other = ["--socket-path", folder / "t"]
        qemu_img("create", "-f", "qcow2", base, MIB)
        qemu_img("create", "-f", "qcow2", "-b", base, "-F", "qcow2", image)
        with serve(options, folder, image):
            refused(report, options.vblk, "an image that another vblk writes", folder, [image, *other], "disk.qcow2")
            refused(report, options.vblk, "an image that another vblk writes, read only", folder,
                    [image, *other, "--read-only"], "disk.qcow2")
            refused(report, options.vblk, "a backing file in use, for writing", folder, [base, *other], "base.qcow2")
            status, text = run("qemu-io", "-r", "-f", "qcow2", "-c", "read 0 512", image)
            report.check("qemu-io may not read what vblk writes", "lock" in text, text)
            status, text = run("qemu-img", "check", "-f", "qcow2", "-U", image)
            report.check("qemu-img check -U may look", status == 0, text)
        second = folder / "second.qcow2"
        qemu_img("create", "-f", "qcow2", "-b", base, "-F", "qcow2", second)
        with serve(options, folder, image), Server(options.vblk, [second], folder / "t", folder / "log2") as server:
            report.check("two servers share a backing file", server.stop() == 0)
        with qemu_io_that_holds(image):
            refused(report, options.vblk, "an image that qemu-io writes", folder, [image, *other], "disk.qcow2")
            refused(report, options.vblk, "a backing file that qemu-io uses, for writing", folder, [base, *other], "base.qcow2")
        with qemu_io_that_holds(image, "-r"):
            refused(report, options.vblk, "an image that qemu-io reads, for writing", folder, [image, *other], "disk.qcow2")
            with serve(options, folder, image, "--read-only") as server:
                report.check("an image that qemu-io reads is served read only", server.stop() == 0)
        with qemu_io_that_holds(base):
            refused(report, options.vblk, "an overlay whose backing file qemu-io writes", folder, [image, *other], "base.qcow2")


# ---- Damage that shows later.

def test_damage(report, options):
    """An entry that points at what is not data: the image is marked corrupt, and nothing is made worse."""
    l1, refcount_table, refcount_block = 3 * 64 * KIB, 64 * KIB, 2 * 64 * KIB
    for title, entry in (("the L1 table", l1 | COPIED), ("the refcount table", refcount_table | COPIED),
                         ("a refcount block", refcount_block | COPIED), ("an L2 table", 4 * 64 * KIB | COPIED),
                         ("no cluster's beginning", (5 * 64 * KIB + SECTOR) | COPIED),
                         ("what lies beyond the end", (1 << 40) | COPIED), ("reserved bits", 5 * 64 * KIB | COPIED | 1 << 60)):
        with Folder() as folder:
            image = folder / "disk.qcow2"
            qemu_img("create", "-f", "qcow2", image, 4 * MIB)
            qemu_io(image, "write -P 7 0 256k")
            place = qcow2.l2_entry_offset(image, 1)
            assert place // (64 * KIB) == 4, "qemu-img has laid the image out in another way"
            qcow2.write_number(image, place, entry)
            before, found_before = image.read_bytes(), qcow2.check(image)
            title = f"an L2 entry that points at {title}"
            with serve(options, folder, image) as server, Poke(options.poke, server.socket) as poke:
                answer = poke("write 128 8 99")
                report.check(f"{title}: a write there fails", answer.get("status") == STATUS_IOERR, answer["text"])
                answer = poke("write 1024 8 98")
                report.check(f"{title}: so do all writes from then on", answer.get("status") == STATUS_IOERR, answer["text"])
                answers = [poke("discard 0 128"), poke("zeroes 0 128 1")]
                report.check(f"{title}: and changes of the mapping", all(a.get("status") == STATUS_IOERR for a in answers), answers)
                answer = poke("read 0 128")
                report.check(f"{title}: what is whole can still be read",
                             answer.get("first") == 7 and answer.get("same") == "true", answer["text"])
                report.check(f"{title}: the log says so once", server.log.read_text().count("is damaged") == 1,
                             server.log.read_text())
                server.stop()
            report.check(f"{title}: the image is marked corrupt", Header(image)["incompatible_features"] & qcow2.INCOMPAT_CORRUPT)
            after = bytearray(image.read_bytes())
            after[79] &= ~qcow2.INCOMPAT_CORRUPT
            report.check(f"{title}: nothing else has changed", after[:len(before)] == before)
            found = qcow2.check(image)
            report.check(f"{title}: qemu-img check finds no more than before", found["corruptions"] <= found_before["corruptions"] + 1,
                         f"{found_before['text']}\n{found['text']}")
            refused(report, options.vblk, f"{title}: served again", folder, [image, "--socket-path", folder / "t"], "corrupt")
            with serve(options, folder, image, "--read-only") as server, Poke(options.poke, server.socket) as poke:
                answer = poke("read 256 64")
                report.check(f"{title}: served read only", answer.get("first") == 7, answer["text"])


def test_lost_refcounts(report, options):
    """Metadata with a refcount of 0 is not given to data."""
    with Folder() as folder:
        image = damaged(folder, "disk.qcow2", lambda path: None)
        l1_cluster = Header(image)["l1_table_offset"] // (64 * KIB)
        qcow2.write_number(image, 2 * 64 * KIB + 2 * l1_cluster, 0, ">H")
        table = image.read_bytes()[l1_cluster * 64 * KIB:(l1_cluster + 1) * 64 * KIB]
        with serve(options, folder, image) as server, Poke(options.poke, server.socket) as poke:
            answer = poke("write 4096 8 99")
            report.check("an L1 table with a refcount of 0: a write that needs clusters fails",
                         answer.get("status") == STATUS_IOERR, f"{answer['text']}\n{server.log.read_text()}")
            answer = poke("read 0 128")
            report.check("an L1 table with a refcount of 0: reads go on", answer.get("first") == 7, answer["text"])
            server.stop()
        report.check("an L1 table with a refcount of 0: it is as it was",
                     image.read_bytes()[l1_cluster * 64 * KIB:(l1_cluster + 1) * 64 * KIB] == table)
        report.check("an L1 table with a refcount of 0: the image is marked corrupt",
                     Header(image)["incompatible_features"] & qcow2.INCOMPAT_CORRUPT)


def test_places_in_data_file(report, options):
    """In a data file a cluster is at its guest offset, or the image is damaged (qcow2.txt, "Header", external data file)."""
    with Folder() as folder:
        image, data = folder / "disk.qcow2", folder / "disk.data"
        qemu_img("create", "-f", "qcow2", "-o", f"data_file={data}", image, 4 * MIB)
        qemu_io(image, "write -P 7 0 256k")
        qcow2.write_number(image, qcow2.l2_entry_offset(image, 1), 0 | COPIED)
        before = data.read_bytes()
        title = "a cluster that has another's place in the data file"
        with serve(options, folder, image) as server, Poke(options.poke, server.socket) as poke:
            answers = [poke(command) for command in ("read 0 128", "read 128 8", "write 128 8 99", "zeroes 128 128 1")]
            report.check(f"{title}: costs its own requests an error",
                         [a.get("status") for a in answers] == [STATUS_OK] + 3 * [STATUS_IOERR], answers)
            server.stop()
        report.check(f"{title}: the data file is as it was", data.read_bytes() == before)
        report.check(f"{title}: the image is marked corrupt", Header(image)["incompatible_features"] & qcow2.INCOMPAT_CORRUPT)


# ---- Left dirty, and bitmaps.

def test_lazy_refcounts(report, options):
    for number, recipe in enumerate((
            Recipe("plain", {"lazy_refcounts": "on"}, 8 * MIB),
            Recipe("snapshots", {"lazy_refcounts": "on", "cluster_size": 4 * KIB, "refcount_bits": 4}, 8 * MIB, snapshots=True),
            Recipe("compressed", {"lazy_refcounts": "on", "cluster_size": 16 * KIB}, 8 * MIB, compressed=True, snapshots=True),
            Recipe("subclusters", {"lazy_refcounts": "on", "extended_l2": "on"}, 8 * MIB, backing="raw", backing_size=4 * MIB),
            Recipe("bitmaps", {"lazy_refcounts": "on", "refcount_bits": 32}, 8 * MIB, bitmaps=True),
            Recipe("data_file", {"lazy_refcounts": "on"}, 8 * MIB, data_file=True))):
        with Folder() as folder:
            title = f"lazy refcounts, {recipe.name}"
            image, snapshots = recipe.make(folder, options.random)
            # 134: SIGABRT, with the refcounts of these clusters unwritten.
            with contextlib.suppress(RuntimeError):
                qemu_io(image, "write -P 200 1M 3M", "write -P 201 100k 5k", "flush", "abort")
            dirty = Header(image)["incompatible_features"] & qcow2.INCOMPAT_DIRTY
            report.check(f"{title}: qemu-io left the image dirty", dirty)
            before = image.read_bytes()
            expected = [(2 * MIB, 200), (100 * KIB, 201)]
            for mode in (["--read-only"], []):
                with serve(options, folder, image, *mode) as server, Poke(options.poke, server.socket) as poke:
                    for offset, pattern in expected:
                        answer = poke(f"read {offset // SECTOR} 8")
                        report.check(f"{title}: what was flushed is read{' by ' + mode[0] if mode else ''}",
                                     answer.get("first") == pattern and answer.get("same") == "true", answer["text"])
                    if not mode:
                        answers = [poke("write 12000 100 77"), poke("flush")]
                        report.check(f"{title}: it can be written", all(a.get("status") == STATUS_OK for a in answers), answers)
                    stop(report, title, server)
                if mode:
                    report.check(f"{title}: reading changes nothing", image.read_bytes() == before)
            found = qcow2.check(image)
            report.check(f"{title}: opened for writing it is counted anew",
                         (qcow2.is_sound if recipe.bitmaps else qcow2.is_clean)(found), found["text"])
            report.check(f"{title}: and not dirty any more", not Header(image)["incompatible_features"] & qcow2.INCOMPAT_DIRTY)
            check_snapshots(report, title, folder, image, snapshots)
            if number == 0:
                qemu_io(image, "read -P 77 6144000 51200")


def test_bitmaps(report, options):
    """A bitmap that vblk has not kept is never taken for one that is up to date."""
    with Folder() as folder:
        image = folder / "disk.qcow2"
        qemu_img("create", "-f", "qcow2", image, 8 * MIB)
        qemu_img("bitmap", "-f", "qcow2", "--add", "-g", "64k", image, "backup")
        qemu_io(image, "write -P 1 0 1M")
        with serve(options, folder, image, "--read-only") as server, Poke(options.poke, server.socket) as poke:
            poke("read 0 8")
            server.stop()
        text = qemu_img("info", image)
        report.check("bitmaps: reading leaves them as they are",
                     "backup" in text and "in-use" not in text and Header(image)["autoclear_features"] & 1, text)
        with serve(options, folder, image) as server, Poke(options.poke, server.socket) as poke:
            report.check("bitmaps: the log says that they are lost", "bitmaps" in server.log.read_text(), server.log.read_text())
            answers = [poke("write 8192 8 2"), poke("flush")]
            report.check("bitmaps: the disk is written", all(a.get("status") == STATUS_OK for a in answers), answers)
            server.kill()
        wait_until(lambda: is_let_go(image))
        usable = "backup" in qemu_img("info", image) and "in-use" not in qemu_img("info", image)
        report.check("bitmaps: none is usable after a write", not usable, qemu_img("info", image))
        with serve(options, folder, image) as server, Poke(options.poke, server.socket) as poke:
            answers = [poke("write 12288 8 3"), poke("flush")]
            report.check("bitmaps: the disk is written again", all(a.get("status") == STATUS_OK for a in answers), answers)
            stop(report, "bitmaps", server)
        found = qcow2.check(image)
        report.check("bitmaps: qemu-img check finds leaks at most", qcow2.is_sound(found), found["text"])
        run("qemu-img", "check", "-f", "qcow2", "-r", "leaks", image)
        found = qcow2.check(image)
        report.check("bitmaps: what they took can be had back", qcow2.is_clean(found), found["text"])
        # Whatever lies where the bitmaps were.
        with serve(options, folder, image) as server, Churn(options) as churn:
            churn.connect(server)
            churn("adopt")
            answer = churn(f"run {options.random.getrandbits(32)} 300 4 65536 wwwwdf")
            report.check("bitmaps: their space is used for others", is_good(answer), answer["text"])
            churn("disconnect")
            stop(report, "bitmaps", server)
        found = qcow2.check(image)
        report.check("bitmaps: and all is clean", qcow2.is_clean(found), found["text"])
        qemu_img("bitmap", "-f", "qcow2", "--add", image, "new")
        # As it may be once others have used the directory's cluster.
        Header(image)["autoclear_features"] = 0
        qcow2.write_number(image, qcow2.extension_offset(image, qcow2.EXTENSION_BITMAPS) + 24, Header(image)["l1_table_offset"])
        with serve(options, folder, image) as server:
            report.check("bitmaps: a directory that nobody vouches for is not looked at", server.stop() == 0)


def test_unknown_features(report, options):
    """Compatible ones are left alone; autoclear ones are cleared by who writes, and by nobody else."""
    with Folder() as folder:
        image = folder / "disk.qcow2"
        qemu_img("create", "-f", "qcow2", image, 4 * MIB)
        header, unknown = Header(image), 1 << 44
        header["compatible_features"] = header["autoclear_features"] = unknown
        for mode, kept in (["--read-only"], True), ([], False):
            with serve(options, folder, image, *mode) as server, Poke(options.poke, server.socket) as poke:
                poke("read 0 8")
                server.stop()
            what = "reading" if mode else "opening for writing"
            report.check(f"unknown features: {what} {'keeps' if kept else 'clears'} autoclear bits",
                         header["autoclear_features"] == (unknown if kept else 0), hex(header["autoclear_features"]))
            report.check(f"unknown features: {what} keeps compatible bits", header["compatible_features"] == unknown)


# ---- Holes.

def map_kinds(image, offset, length):
    """{(data, zero)} of what `qemu-img map` says there."""
    return {(data, zero) for start, (size, data, zero) in qcow2.block_map(image).items()
            if start < offset + length and offset < start + size}


def test_holes(report, options):
    for name, create, backed in (("plain", [], False), ("subclusters", ["-o", "extended_l2=on"], False),
                                 ("small clusters", ["-o", "cluster_size=4k"], False), ("overlay", [], True),
                                 ("version 2", ["-o", "compat=0.10"], False), ("data file", None, False),
                                 ("raw data file", None, False)):
        with Folder() as folder:
            image, data = folder / "disk.qcow2", folder / "disk.qcow2"
            if create is None:
                data = folder / "disk.data"
                raw = ",data_file_raw=on" if name == "raw data file" else ""
                create = ["-o", f"data_file={data}{raw}"]
            if backed:
                (folder / "base").write_bytes(b"\x55" * 16 * MIB)
                create = [*create, "-b", folder / "base", "-F", "raw"]
            qemu_img("create", "-f", "qcow2", *create, image, 16 * MIB)
            holes_in(report, options, folder, name, image, data, backed)


def holes_in(report, options, folder, name, image, data, backed):
    def blocks():
        return allocated_bytes(data)

    sectors, quarter = 4 * MIB // SECTOR, 4 * MIB
    with serve(options, folder, image) as server, Poke(options.poke, server.socket) as poke:
        for start in range(0, 4 * sectors, 2048):
            poke(f"write {start} 2048 17")
        poke("flush")
        full = blocks()
        poke(f"discard 0 {sectors}")
        poke("flush")
        # Punched when the flush has ended and nobody uses the old mapping any more.
        wait_until(lambda: full - blocks() >= quarter * 9 // 10, 3)
        discarded = blocks()
        report.check(f"holes, {name}: a discard gives the blocks below back", full - discarded >= quarter * 9 // 10,
                     f"{full} bytes before, {discarded} after")
        poke(f"zeroes {sectors} {sectors} 1")
        poke("flush")
        wait_until(lambda: discarded - blocks() >= quarter * 9 // 10, 3)
        zeroed = blocks()
        report.check(f"holes, {name}: so do zeroes that may unmap", discarded - zeroed >= quarter * 9 // 10,
                     f"{discarded} bytes before, {zeroed} after")
        poke(f"zeroes {2 * sectors} {sectors} 0")
        poke("flush")
        answers = [poke(f"read {start} 2048") for start in (0, sectors, 2 * sectors, 3 * sectors)]
        expected = [0, 0, 0, 17]
        report.check(f"holes, {name}: everything reads as it should", [a.get("first") for a in answers] == expected, answers)
        stop(report, f"holes, {name}", server)
    found = qcow2.check(image)
    report.check(f"holes, {name}: qemu-img check finds neither error nor leak", qcow2.is_clean(found), found["text"])
    for part, what in enumerate(("a discard", "zeroes that may unmap", "zeroes that keep their space")):
        # The mapping of a raw data file says nothing of zeroes, nor can version 2 say so of clusters that have space.
        if name == "raw data file" or (name, part) == ("version 2", 2):
            continue
        kinds = map_kinds(image, part * quarter, quarter)
        report.check(f"holes, {name}: qemu-img map tells zeroes of {what}", all(zero for _, zero in kinds),
                     f"{kinds}\n{qcow2.block_map(image)}")
    kinds = map_kinds(image, 3 * quarter, quarter)
    report.check(f"holes, {name}: qemu-img map tells data of what was left alone", kinds == {(True, False)}, kinds)


TESTS = {"matrix": test_matrix, "sequences": test_sequences, "kills": test_kills, "canaries": test_canaries,
         "refusals": test_refusals_by_content, "surroundings": test_refusals_by_surroundings, "locks": test_locks,
         "damage": test_damage, "refcounts": test_lost_refcounts, "places": test_places_in_data_file, "lazy": test_lazy_refcounts, "bitmaps": test_bitmaps, "features": test_unknown_features,
         "holes": test_holes}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vblk", required=True, type=Path, help="the program under test")
    parser.add_argument("--poke", required=True, type=Path, help="the driver for scripts")
    parser.add_argument("--churn", required=True, type=Path, help="the driver for scripts with a model")
    parser.add_argument("--only", choices=TESTS, help="one part of the test")
    options = parser.parse_args()
    for name in ("vblk", "poke", "churn"):
        setattr(options, name, getattr(options, name).resolve())
    seed = test_seed()
    options.rounds = int(os.environ.get("VBLK_TEST_ROUNDS", ROUNDS))
    options.sequence_runs = int(os.environ.get("VBLK_SEQUENCE_RUNS", 1))
    report = Report()
    for name, test in TESTS.items():
        if options.only in (None, name):
            options.random = random.Random(f"{seed} {name}")
            try:
                test(report, options)
            except RuntimeError as error:
                report.check(f"{name}: runs", False, error)
    report.exit()


if __name__ == "__main__":
    main()
