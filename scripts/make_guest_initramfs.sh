#!/usr/bin/env bash
# Makes the guest's initial RAM file system: busybox, the kernel's virtio and ext4 modules, e2fsprogs, fio.
#
# Usage: make_guest_initramfs.sh KERNEL_FOLDER INIT_SCRIPT OUTPUT
# KERNEL_FOLDER is what fetch_guest_kernel.sh made. INIT_SCRIPT becomes /init.
set -euo pipefail
export PATH=$PATH:/sbin:/usr/sbin

kernel=${1:?usage: make_guest_initramfs.sh KERNEL_FOLDER INIT_SCRIPT OUTPUT}
init=${2:?usage: make_guest_initramfs.sh KERNEL_FOLDER INIT_SCRIPT OUTPUT}
output=${3:?usage: make_guest_initramfs.sh KERNEL_FOLDER INIT_SCRIPT OUTPUT}
version=$(cat "$kernel/version")

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root
mkdir -p "$root"/{bin,dev,lib,proc,sys,tmp,mnt,modules}
cp /bin/busybox "$root/bin/busybox"
install -m 755 "$init" "$root/init"

# Modules in the order in which insmod must load them; a module that two others need is named once.
for module in virtio_pci virtio_blk crc32c_generic ext4; do
  modprobe -d "$kernel" -S "$version" --show-depends "$module"
done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' | while read -r path; do
  cp "$path" "$root/modules/"
  basename "$path" >> "$root/modules/order"
done

# fio is linked with libraries for storage that no guest here has. They are more than all the rest together, and each start of fio
# would load and relocate them. Others of the same names take their places, with functions that nobody calls.
stub_libraries() {
  local program=$1 folder=$2 library path options
  readelf -d "$program" | sed -nE 's/.*\(NEEDED\).*\[(lib(gfapi|nbd|ibverbs|rdmacm|rados|rbd|pmem|pmemblk)\..*)\]/\1/p' |
    while read -r library; do
      path=$(ldd "$program" | awk -v name="$library" '$1 == name { print $3 }')
      # What the program has of this library: NAME, or NAME@VERSION.
      nm -D --defined-only "$path" | awk '{ sub("@.*", "", $3); print $3 }' > "$work/defined"
      nm -D --undefined-only "$program" |
        awk 'NR == FNR { defined[$1]; next } { split($2, part, "@") } part[1] in defined { print part[1], part[2] }' \
          "$work/defined" - > "$work/used"
      awk '{ print ".globl " $1 "\n.type " $1 ", @function\n" $1 ": ud2" }
        END { print ".section .note.GNU-stack, \"\", @progbits" }' "$work/used" > "$work/stub.s"
      awk '$2 { of[$2] = of[$2] " " $1 ";" } END { for (version in of) print version " {" of[version] " };" }' \
        "$work/used" > "$work/versions"
      options=("-Wl,-soname,$library")
      [[ ! -s $work/versions ]] || options+=("-Wl,--version-script=$work/versions")
      cc -shared -nostdlib -o "$folder/$library" "$work/stub.s" "${options[@]}"
    done
}

# With its libraries, and first of all those that are in the root's /lib already.
copy_program() {
  local program
  program=$(command -v "$1")
  cp -L "$program" "$root/bin/$(basename "$1")"
  LD_LIBRARY_PATH=$root/lib ldd "$program" | grep -o '/[^ ]*' | sort -u | while read -r library; do
    [[ $library == "$root"/* ]] && continue
    mkdir -p "$root$(dirname "$library")"
    [[ -e $root$library ]] || cp -L "$library" "$root$library"
  done
}
stub_libraries "$(command -v fio)" "$root/lib"
copy_program mkfs.ext4
copy_program e2fsck
copy_program resize2fs
copy_program fio

(cd "$root" && find . | cpio --quiet -o -H newc | gzip -1) > "$output.tmp"
mv "$output.tmp" "$output"
