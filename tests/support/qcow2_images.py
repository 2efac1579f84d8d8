"""qcow2 images as Debian's qemu-img and qemu-io make and judge them, and how to damage them."""

import json
import struct
from dataclasses import dataclass, field

from harness import run

KIB, MIB = 1 << 10, 1 << 20
SECTOR = 512
COPIED = 1 << 63
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
INCOMPAT_DIRTY, INCOMPAT_CORRUPT, INCOMPAT_EXTENDED_L2 = 1, 2, 16
EXTENSION_BACKING_FORMAT, EXTENSION_FEATURE_NAMES, EXTENSION_BITMAPS = 0xE2792ACA, 0x6803F857, 0x23852875


def qemu_img(*arguments):
    """Runs qemu-img, which must succeed; returns what it says."""
    status, text = run("qemu-img", *arguments)
    if status != 0:
        raise RuntimeError(f"qemu-img {' '.join(map(str, arguments))}: {text}")
    return text


def qemu_io(path, *commands, status=0, image_format="qcow2", options=()):
    """Runs commands on an image in one qemu-io, which must end with this status."""
    words = [word for command in commands for word in ("-c", command)]
    ended, text = run("qemu-io", "-f", image_format, *options, *words, path)
    if ended != status:
        raise RuntimeError(f"qemu-io {' '.join(map(str, words))} {path}: status {ended}: {text}")
    return text


def check(path):
    """What `qemu-img check` counts: corruptions, leaks, check-errors; "text" is all that it says."""
    _, text = run("qemu-img", "check", "-f", "qcow2", "--output=json", path)
    try:
        found = json.loads(text[text.index("{\n"):text.rindex("}") + 1])
    except ValueError:
        found = {"check-errors": 1}
    return {"corruptions": 0, "leaks": 0} | found | {"text": text}


def is_clean(found):
    return not (found["corruptions"] or found["leaks"] or found["check-errors"])


def is_sound(found):
    """No error; leaks at the very most."""
    return not (found["corruptions"] or found["check-errors"])


def to_raw(image, raw, *options):
    qemu_img("convert", "-f", "qcow2", "-O", "raw", *options, image, raw)


def block_map(image):
    """`qemu-img map` as {offset: (length, data, zero)}."""
    pieces = json.loads(qemu_img("map", "-f", "qcow2", "--output=json", image))
    return {piece["start"]: (piece["length"], piece["data"], piece["zero"]) for piece in pieces}


def unique_content(random, size):
    """Sectors of which no two are alike, and some areas of zeroes."""
    content = bytearray(size)
    for start in range(0, size, 64 * KIB):
        if random.random() < 0.3:
            continue
        for sector in range(start, min(start + 64 * KIB, size), SECTOR):
            content[sector:sector + SECTOR] = struct.pack("<QQ", sector, random.getrandbits(64)) * (SECTOR // 16)
    return content


class Header:
    """The fields of an image's header that the tests look at or damage (qcow2.txt, "Header")."""

    FIELDS = {"version": (4, ">I"), "cluster_bits": (20, ">I"), "size": (24, ">Q"), "crypt_method": (32, ">I"), "l1_size": (36, ">I"),
              "l1_table_offset": (40, ">Q"), "refcount_table_offset": (48, ">Q"),
              "refcount_table_clusters": (56, ">I"), "nb_snapshots": (60, ">I"), "snapshots_offset": (64, ">Q"),
              "incompatible_features": (72, ">Q"), "compatible_features": (80, ">Q"),
              "autoclear_features": (88, ">Q"), "header_length": (100, ">I")}

    def __init__(self, path):
        self.path = path

    def __getitem__(self, name):
        offset, layout = self.FIELDS[name]
        return read_number(self.path, offset, layout)

    def __setitem__(self, name, value):
        offset, layout = self.FIELDS[name]
        write_number(self.path, offset, value, layout)

    def has(self, name):
        """Version 2 ends where version 3 has its feature bits."""
        return self["version"] > 2 or self.FIELDS[name][0] < 72


def read_number(path, offset, layout=">Q"):
    with open(path, "rb") as file:
        file.seek(offset)
        return struct.unpack(layout, file.read(struct.calcsize(layout)))[0]


def write_number(path, offset, value, layout=">Q"):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(struct.pack(layout, value))


def l2_entry_offset(path, cluster, words=1):
    """Where the L2 entry of a guest cluster lies, whose table must exist."""
    header = Header(path)
    entries = (1 << header["cluster_bits"]) // (8 * words)
    table = read_number(path, header["l1_table_offset"] + cluster // entries * 8) & OFFSET_MASK
    assert table, "no L2 table"
    return table + cluster % entries * 8 * words


def extension_offset(path, kind):
    """Where a header extension begins, or None."""
    header = Header(path)
    at = header["header_length"] if header.has("header_length") else 72
    while True:
        found, length = read_number(path, at, ">I"), read_number(path, at + 4, ">I")
        if found == kind:
            return at
        if found == 0:
            return None
        at += 8 + (length + 7) // 8 * 8


@dataclass
class Recipe:
    """An image to be made: options of `qemu-img create`, and what is to be in it."""

    name: str
    options: dict = field(default_factory=dict)
    size: int = 6 * MIB + 7 * SECTOR
    backing: str = ""  # "raw", "qcow2", or none
    backing_size: int = 0
    data_file: bool = False
    compressed: bool = False  # the beginning is written by `qemu-img convert -c`
    snapshots: bool = False
    bitmaps: bool = False

    def cluster_size(self):
        return self.options.get("cluster_size", 64 * KIB)

    def has_small_refcounts(self):
        """Too small for a cluster of compressed data, which has many owners, and snapshots of it."""
        return self.options.get("refcount_bits", 16) < 16

    def __str__(self):
        words = [f"{name}={value}" for name, value in self.options.items()]
        if self.backing:
            words.append(f"{self.backing} backing {'smaller' if self.backing_size < self.size else 'larger'}")
        words += [name for name in ("data_file", "compressed", "snapshots", "bitmaps") if getattr(self, name)]
        return ", ".join(words) or "default"

    def create(self, folder, random):
        """Makes the image with qemu-img alone; returns its path."""
        image = folder / f"{self.name}.qcow2"
        options = dict(self.options)
        if self.data_file:
            options["data_file"] = folder / f"{self.name}.data"
        words = ["-o", ",".join(f"{name}={value}" for name, value in options.items())] if options else []
        if self.backing:
            base, raw = folder / f"{self.name}.base.{self.backing}", folder / "raw"
            raw.write_bytes(unique_content(random, self.backing_size))
            compress = ["-c"] if self.backing == "qcow2" and random.random() < 0.5 else []
            qemu_img("convert", "-f", "raw", "-O", self.backing, *compress, raw, base)
            raw.unlink()
            qemu_img("create", "-f", "qcow2", "-b", base, "-F", self.backing, *words, image, self.size)
        elif self.compressed:
            raw = folder / "raw"
            raw.write_bytes(unique_content(random, self.size // 2 // SECTOR * SECTOR))
            qemu_img("convert", "-f", "raw", "-O", "qcow2", "-c", *words, raw, image)
            raw.unlink()
            qemu_img("resize", "-f", "qcow2", image, self.size)
        else:
            qemu_img("create", "-f", "qcow2", *words, image, self.size)
        if self.bitmaps:
            qemu_img("bitmap", "-f", "qcow2", "--add", "-g", "64k", image, "kept")
            qemu_img("bitmap", "-f", "qcow2", "--add", "--disable", image, "stopped")
        return image

    def fill(self, image, random, count=12):
        """Writes, zero writes and discards by qemu-io, on the whole disk and again on a small part of it."""
        cluster, commands, compressed = self.cluster_size(), [], []
        for _ in range(count):
            length = min(random.choice((SECTOR, 3 * SECTOR, 4096, cluster, 3 * cluster, 100 * KIB)), self.size // 4)
            limit = self.size - length
            offset = random.randrange(0, limit if random.random() < 0.5 else max(limit // 8, 1))
            align = random.choice((SECTOR, 4096, cluster))
            offset = offset // min(align, 2 * MIB) * min(align, 2 * MIB)
            pattern = f"-P {random.randrange(1, 256)}"
            kinds = [f"write {pattern}"] * 4 + ["write -z", "write -z -u", "discard"]
            if not self.data_file and not (self.snapshots and self.has_small_refcounts()):
                kinds.append(f"write -c {pattern}")
            kind = random.choice(kinds)
            if kind.startswith("write -c"):
                offset = offset // cluster * cluster
                if offset + cluster <= self.size:
                    compressed += ["-c", f"{kind} {offset} {cluster}"]
                continue
            commands.append(f"{kind} {offset} {length}")
        # QEMU refuses to compress into a cluster that is in use: those commands do nothing.
        if compressed:
            run("qemu-io", "-f", "qcow2", *compressed, image)
        qemu_io(image, *commands)

    def make(self, folder, random):
        """The image with content; returns its path and the raw contents of its snapshots {name: path}."""
        image, snapshots = self.create(folder, random), {}
        for number in range(3 if self.snapshots else 1):
            if number > 0:
                name = f"s{number}"
                snapshots[name] = folder / f"{self.name}.{name}.raw"
                qemu_img("snapshot", "-c", name, image)
                to_raw(image, snapshots[name])
            self.fill(image, random)
        return image, snapshots


def option_matrix(random, count):
    """Recipes that have every value of every option at least once, and then random combinations."""
    wanted = [dict(compat="0.10"), *(dict(cluster_size=512 << shift) for shift in range(13)),
              *(dict(refcount_bits=1 << order) for order in range(7)), dict(extended_l2="on"),
              dict(extended_l2="on", cluster_size=16 * KIB), dict(extended_l2="on", cluster_size=2 * MIB),
              dict(lazy_refcounts="on"), dict(compressed=True), dict(compressed=True, compression_type="zstd"),
              *(dict(preallocation=mode) for mode in ("off", "metadata", "falloc", "full")),
              dict(data_file=True), dict(data_file=True, data_file_raw="on"), dict(data_file=True, extended_l2="on"),
              *(dict(backing=kind, backing_size=size) for kind in ("raw", "qcow2") for size in (2 * MIB, 9 * MIB)),
              dict(snapshots=True), dict(bitmaps=True), dict(compat="0.10", backing="raw", backing_size=3 * MIB),
              dict(compat="0.10", snapshots=True)]
    while len(wanted) < count:
        wanted.append({})
    for number, fixed in enumerate(wanted[:count]):
        yield random_recipe(random, f"m{number}", fixed)


def random_recipe(random, name, fixed):
    """A recipe that qemu-img takes, with the `fixed` choices."""
    def maybe(key, values, chance=0.35):
        return fixed[key] if key in fixed else random.choice(values) if random.random() < chance else None

    chosen = {}
    old = maybe("compat", ["0.10", "1.1"], 0.2) == "0.10"
    if old:
        chosen["compat"] = "0.10"
    chosen["cluster_size"] = maybe("cluster_size", [512 << shift for shift in range(13)], 0.6)
    if not old:
        chosen["refcount_bits"] = maybe("refcount_bits", [1 << order for order in range(7)])
        chosen["extended_l2"] = maybe("extended_l2", ["on"], 0.3)
        chosen["lazy_refcounts"] = maybe("lazy_refcounts", ["on"], 0.2)
        chosen["compression_type"] = maybe("compression_type", ["zlib", "zstd"], 0.4)
    if chosen.get("extended_l2") and (chosen["cluster_size"] or 64 * KIB) < 16 * KIB:
        chosen["cluster_size" if "extended_l2" in fixed else "extended_l2"] = None
    backing = fixed.get("backing") or (random.choice(["", "", "raw", "qcow2"]) if not fixed else "")
    data_file = not backing and not old and (maybe("data_file", [True], 0.1) or False)
    if data_file:
        chosen["data_file_raw"] = fixed.get("data_file_raw")
        chosen["compression_type"] = None
    compressed = bool(not backing and not data_file and maybe("compressed", [True], 0.2))
    may_preallocate = not compressed and (not backing or chosen.get("extended_l2"))
    if may_preallocate and not (data_file and chosen["data_file_raw"]):
        chosen["preallocation"] = maybe("preallocation", ["metadata", "falloc", "full"], 0.2)
    # A refcount of one bit has no room for a second owner.
    refcount_bits = chosen.get("refcount_bits") or 16
    may_share = refcount_bits > 1 and not (compressed and refcount_bits < 16)
    snapshots = not data_file and may_share and maybe("snapshots", [True], 0.3)
    options = {key: value for key, value in chosen.items() if value is not None}
    size = 6 * MIB + 7 * SECTOR if options.get("cluster_size", 0) < MIB else 24 * MIB + 7 * SECTOR
    return Recipe(name, options, size, backing, fixed.get("backing_size") or random.choice([3 * MIB, 30 * MIB + SECTOR]),
                  bool(data_file), compressed, bool(snapshots), bool(not old and maybe("bitmaps", [True], 0.15)))
