#!/bin/bash
# A real S3 server for the tests: Ceph RADOS Gateway from Debian's packages, on 127.0.0.1.
# One monitor, one object store daemon on a sparse file, one gateway; no manager, no systemd, nothing installed.
#
#   ceph_rgw.sh unpack ROOT                            fetch the packages and unpack them under ROOT (66 MB, 325 MB unpacked)
#   ceph_rgw.sh start ROOT DATA PORT MON KEY SECRET    start, making the cluster in DATA the first time; prints the endpoint
#   ceph_rgw.sh stop DATA                              stop gently; what is in DATA can be started again
#   ceph_rgw.sh run ROOT DATA PORT MON KEY SECRET      start, print the endpoint, kill everything once stdin is closed
#
# PORT is the gateway's, MON the monitor's. With the packages installed by apt, ROOT is / and `unpack` is not needed.
# `run` is for a parent that may itself be killed: its end of the pipe closes with it, so no daemon outlives it.
set -euo pipefail

fail() { echo "ceph_rgw.sh: $*" >&2; exit 1; }

unpack() {
    local root=$1 packages=(ceph-mon ceph-osd radosgw) wanted
    command -v apt-get >/dev/null && command -v dpkg >/dev/null || fail "apt-get and dpkg are needed to fetch Ceph: not a Debian system?"
    simulate() { apt-get install -s --no-install-recommends "${packages[@]}"; }
    # A fresh image has no package lists; only root can fetch them.
    simulate >/dev/null 2>&1 || [ "$(id -u)" != 0 ] || apt-get update -qq >&2 || fail "apt-get update failed"
    wanted=$(simulate) || fail "apt knows no package ${packages[*]}: run 'apt-get update' as root, or enable a Debian archive"
    wanted=$(awk '/^Inst/ {print $2}' <<<"$wanted")
    [ -n "$wanted" ] || fail "${packages[*]} are installed already: use / as ROOT"
    mkdir -p "$root/debs"
    # shellcheck disable=SC2086  # one word a package
    (cd "$root/debs" && apt-get download -qq -o APT::Sandbox::User=root $wanted) >/dev/null || fail "the packages could not be downloaded"
    local deb
    for deb in "$root"/debs/*.deb; do dpkg -x "$deb" "$root"; done
    rm -r "$root/debs"
}

# The configuration: the smallest cluster that answers, with authentication only at the S3 door.
configure() {
    local data=$1 port=$2 mon=$3 lib=$4
    cat <<C
[global]
fsid = $(cat /proc/sys/kernel/random/uuid)
mon host = [v2:127.0.0.1:$mon]
mon initial members = a
ms bind msgr1 = false
auth cluster required = none
auth service required = none
auth client required = none
# Without authentication there is no key to encrypt with: in any mode but crc the gateway waits 300 s and gives up.
ms mon client mode = crc
ms client mode = crc
ms mon service mode = crc
ms mon cluster mode = crc
ms cluster mode = crc
ms service mode = crc
ms bind ipv6 = false
public addr = 127.0.0.1
cluster addr = 127.0.0.1
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
mon data avail crit = 1
mon data = $data/mon
osd data = $data/osd
run dir = $data/run
admin socket = $data/run/\$name.asok
pid file = $data/run/\$name.pid
log file = $data/log/\$name.log
mon cluster log file = $data/log/cluster.log
plugin dir = $lib/ceph
erasure code dir = $lib/ceph/erasure-code
osd class dir = $lib/rados-classes
osd class load list = *
osd class default list = *
osd objectstore = bluestore
bluestore block size = ${RGW_DISK_BYTES:-21474836480}
bluestore cache autotune = false
bluestore cache size = 134217728
osd op num shards = 2
osd op num threads per shard = 1
rgw data = $data
rgw enable usage log = false
rgw dynamic resharding = false
rgw thread pool size = 64
rgw frontends = beast endpoint=127.0.0.1:$port
C
}

quietly() { "$@" </dev/null >>"$data/log/start.log" 2>&1 || fail "$1 failed: $(tail -n 5 "$data/log/start.log")"; }

start() {
    local root=${1%/} data=$2 port=$3 mon=$4 key=$5 secret=$6
    local conf=$data/ceph.conf keyring=$data/keyring lib first= python=/usr/bin/python3 uuid
    lib=$(dirname "$(ls -d "$root"/usr/lib/*-linux-gnu/ceph 2>/dev/null | head -n 1)")
    [ -d "$lib/ceph" ] || fail "no Ceph under ${root:-/}: run 'ceph_rgw.sh unpack ROOT' first"
    [ -x $python ] || fail "$python is needed: Debian's ceph command has its bindings for that Python only"
    # Debian's Python reads its own modules only, whatever virtual environment the caller is in.
    unset PYTHONHOME VIRTUAL_ENV
    export LD_LIBRARY_PATH=$lib:$lib/ceph:$root/lib/${lib##*/} PATH=$root/usr/bin:$PATH PYTHONPATH=$root/usr/lib/python3/dist-packages
    if [ ! -f "$conf" ]; then
        first=1
        mkdir -p "$data"/{mon,osd,run,log}
        configure "$data" "$port" "$mon" "$lib" >"$conf"
        quietly monmaptool --create --clobber --fsid "$(awk '/^fsid/ {print $3}' "$conf")" \
            --addv a "[v2:127.0.0.1:$mon]" "$data/monmap"
        quietly ceph-mon -c "$conf" --mkfs -i a --monmap "$data/monmap"
        quietly ceph-authtool --create-keyring "$keyring" --gen-key -n client.admin
    fi
    rm -f "$data"/run/*.asok
    quietly ceph-mon -c "$conf" -i a
    if [ -n "$first" ]; then
        uuid=$(cat /proc/sys/kernel/random/uuid)
        quietly timeout 60 $python "$root/usr/bin/ceph" -c "$conf" osd new "$uuid" 0
        quietly ceph-osd -c "$conf" -i 0 --mkfs --osd-uuid "$uuid"
    fi
    quietly ceph-osd -c "$conf" -i 0
    if [ -n "$first" ]; then
        quietly timeout 120 radosgw-admin -c "$conf" --keyring "$keyring" user create --uid=tester --display-name=tester \
            --access-key="$key" --secret="$secret"
    fi
    quietly radosgw -c "$conf" -n client.admin --keyring "$keyring"
    for _ in $(seq 150); do
        (exec 3<>/dev/tcp/127.0.0.1/"$port") 2>/dev/null && { echo "http://127.0.0.1:$port"; return; }
        sleep 0.2
    done
    fail "the gateway did not answer on port $port within 30 s: see $data/log"
}

# A killed daemon may stay a zombie for seconds, until whatever is process 1 here reaps it: that counts as gone.
alive() { kill -0 "$1" 2>/dev/null && ! grep -q '^State:[[:space:]]*Z' "/proc/$1/status" 2>/dev/null; }

# stop DATA [SIGNAL]: gateway first, monitor last; what does not go within 10 s is killed.
stop() {
    local name pid file
    for name in client.admin osd.0 mon.a; do
        file=$1/run/$name.pid
        [ -s "$file" ] || continue
        pid=$(cat "$file")
        kill "-${2:-TERM}" "$pid" 2>/dev/null || true
        for _ in $(seq 50); do alive "$pid" || break; sleep 0.2; done
        kill -9 "$pid" 2>/dev/null || true
        rm -f "$file"
    done
}

command=${1:-}; shift || true
case $command in
    unpack) [ $# = 1 ] || fail "usage: unpack ROOT"; unpack "$@" ;;
    start) [ $# = 6 ] || fail "usage: start ROOT DATA PORT MON KEY SECRET"; start "$@" ;;
    stop) [ $# = 1 ] || fail "usage: stop DATA"; stop "$@" ;;
    run)
        [ $# = 6 ] || fail "usage: run ROOT DATA PORT MON KEY SECRET"
        data=$2
        trap 'stop "$data" KILL' EXIT
        trap 'exit 1' TERM INT
        start "$@"
        while read -r _; do :; done
        ;;
    *) fail "unknown command '$command': unpack, start, stop or run" ;;
esac
