#!/usr/bin/env bash
# Puts Debian's cloud kernel into a folder without installing it: nothing on the machine boots from it.
#
# Usage: fetch_guest_kernel.sh FOLDER
# Afterwards FOLDER/boot/vmlinuz-VERSION and FOLDER/lib/modules/VERSION exist and FOLDER/version names VERSION.
# VBLK_GUEST_KERNEL_DEB may name a linux-image package that is there already. A second call does nothing.
set -euo pipefail

folder=${1:?usage: fetch_guest_kernel.sh FOLDER}
[[ -s $folder/version ]] && exit 0

rm -rf "$folder"
mkdir -p "$folder"
package_file=${VBLK_GUEST_KERNEL_DEB:-}
if [[ -z $package_file ]]; then
  # The meta package's first dependency is the kernel itself, named with its version.
  find_package() {
    apt-cache depends linux-image-cloud-amd64 2> /dev/null |
      sed -n 's/^ *Depends: \(linux-image-.*\)$/\1/p' | head -n 1 || true
  }
  package=$(find_package)
  if [[ -z $package && $EUID -eq 0 ]]; then
    # Containers come without lists of packages.
    apt-get update -q >&2
    package=$(find_package)
  fi
  if [[ -z $package ]]; then
    echo "fetch_guest_kernel: apt knows no linux-image-cloud-amd64: run apt-get update first" >&2
    exit 1
  fi
  # apt drops its privileges for a download, and may not write where the caller may.
  (cd "$folder" && apt-get download -q -o APT::Sandbox::User=root "$package" >&2)
  package_file=$(echo "$folder"/*.deb)
fi
dpkg-deb -x "$package_file" "$folder"
rm -f "$folder"/*.deb
version=$(basename "$folder"/boot/vmlinuz-* | sed 's/^vmlinuz-//')
PATH=$PATH:/sbin:/usr/sbin depmod -b "$folder" "$version"
echo "$version" > "$folder/version"
