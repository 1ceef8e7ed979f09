# Shell functions every script in the guest can use.

. /etc/programs.sh

# namespace NQN NSID: the block device of a connected namespace, or failure. Hidden per-path devices are not named.
namespace() {
    for block in /sys/block/nvme*n*; do
        case ${block##*/} in nvme*c*n*) continue ;; esac
        [ "$(cat "$block/nsid" 2>/dev/null)" = "$2" ] || continue
        [ "$(cat "$block/device/subsysnqn" 2>/dev/null)" = "$1" ] || continue
        [ -b "/dev/${block##*/}" ] || continue
        echo "/dev/${block##*/}"
        return 0
    done
    return 1
}

# controller NQN HOSTNQN: the name of the controller by which a host is connected to a subsystem, or failure.
controller() {
    for found in /sys/class/nvme/nvme*; do
        [ "$(cat "$found/subsysnqn" 2>/dev/null)" = "$1" ] || continue
        [ "$(cat "$found/hostnqn" 2>/dev/null)" = "$2" ] || continue
        echo "${found##*/}"
        return 0
    done
    return 1
}

# sectors DEVICE: its size as the kernel knows it now, in units of 512 bytes.
sectors() {
    cat "/sys/block/${1##*/}/size"
}

# until_stopped FILE COMMAND...: repeats a command until FILE exists; prints how often it succeeded, ends if it fails.
until_stopped() {
    stop=$1 passes=0
    shift
    until [ -e "$stop" ]; do
        "$@" >"$stop.out" 2>&1 || { status=$?; cat "$stop.out" >&2; return $status; }
        passes=$((passes + 1))
        echo $passes >"$stop.passes"
    done
    echo $passes
}

# soft_roce: an RDMA device rxe0 on the guest's network interface.
soft_roce() {
    # Without the first, adding the device fails with "No such file or directory".
    for module in crc32_generic ib_uverbs rdma_ucm rdma_rxe; do
        modprobe "$module" || return
    done
    [ -e /sys/class/infiniband/rxe0 ] || rdma link add rxe0 type rxe netdev eth0
}

# no_soft_roce: as if soft_roce had never been asked for, by this test or one before.
no_soft_roce() {
    [ ! -e /sys/class/infiniband/rxe0 ] || rdma link delete rxe0
}

# ram_disk: an ext4 file system on memory at /srv, on which holes can be punched and ranges zeroed.
ram_disk() {
    [ ! -e /dev/ram0 ] || return 0
    modprobe brd rd_nr=1 rd_size=1572864 &&
        mkfs.ext4 -q -O ^has_journal -E lazy_itable_init=1 /dev/ram0 && mount -t ext4 /dev/ram0 /srv
}
