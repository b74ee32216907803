#!/usr/bin/env bash
# Builds the Dockerfile, carries out the Apptainer definition's steps, and runs the doctor and `make demo`'s stages in the
# image, where neither a daemon nor a registry of images is at hand. As root on Debian, from the project's top folder:
#   apt-get install buildah mmdebstrap
#   containers/check.sh [--env NAME=VALUE | --volume FROM:TO:ro ...]     # for pip: a mirror's configuration, certificates
# Debian 12 takes the place of NVIDIA's image, so this shows that the steps work, not that CUDA does. The image
# esi_ds is kept.
set -euo pipefail
export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot
from=$(sed -n 's/^FROM //p' containers/Dockerfile)
work=$(mktemp -d)
base='' image='' definition=''
# shellcheck disable=SC2086 # those that were made
trap 'set +e; buildah rm $base $image $definition; buildah rmi --force "docker.io/$from"; rm -rf "$work"' EXIT

mmdebstrap --variant=minbase --include=ca-certificates,build-essential bookworm "$work/base.tar" http://deb.debian.org/debian
base=$(buildah from scratch)
buildah add --quiet "$base" "$work/base.tar" / > /dev/null
buildah commit --quiet "$base" "docker.io/$from" > /dev/null

echo "== Dockerfile"
buildah build --pull=never --format docker "$@" --file containers/Dockerfile --tag esi_ds .
image=$(buildah from --pull=never localhost/esi_ds)
buildah run "$image" -- esi-ds doctor
# The demo reads a checkout's models and configs; its data are links into the package.
mkdir "$work/demo"
cp -rL examples configs launch ds_configs "$work/demo"
buildah run --volume "$work/demo:/work" "$image" -- python examples/demo.py

echo "== Apptainer definition"
definition=$(buildah from --pull=never "docker.io/$from")
section() { sed -n "/^%$1\$/,/^%/p" containers/esi_ds.def | sed '/^%/d'; }
while read -r file target; do buildah copy --quiet "$definition" "$file" "$target" > /dev/null; done < <(section files | grep .)
for name in post environment test runscript; do section "$name" > "$work/$name.sh"; done
buildah run "$@" --volume "$work:/sections:ro" "$definition" -- sh -e /sections/post.sh
buildah run --volume "$work:/sections:ro" "$definition" -- sh -e /sections/test.sh
# shellcheck disable=SC2016 # the container's shell expands it
buildah run --volume "$work:/sections:ro" --workingdir /tmp "$definition" -- sh -ec '. /sections/environment.sh; . /sections/runscript.sh' esi_ds doctor
