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

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
mkdir -p "$root"/{bin,dev,proc,sys,tmp,mnt,modules}
cp /bin/busybox "$root/bin/busybox"
install -m 755 "$init" "$root/init"

# Modules in the order in which insmod must load them; a module that two others need is named once.
for module in virtio_pci virtio_blk crc32c_generic ext4; do
  modprobe -d "$kernel" -S "$version" --show-depends "$module"
done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' | while read -r path; do
  cp "$path" "$root/modules/"
  basename "$path" >> "$root/modules/order"
done

copy_program() {
  local program
  program=$(command -v "$1")
  cp -L "$program" "$root/bin/$(basename "$1")"
  ldd "$program" | grep -o '/[^ ]*' | sort -u | while read -r library; do
    mkdir -p "$root$(dirname "$library")"
    [[ -e $root$library ]] || cp -L "$library" "$root$library"
  done
}
copy_program mkfs.ext4
copy_program e2fsck
copy_program resize2fs
copy_program fio

(cd "$root" && find . | cpio --quiet -o -H newc | gzip -1) > "$output.tmp"
mv "$output.tmp" "$output"
