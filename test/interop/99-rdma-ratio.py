"""fio over RDMA against this target and against the kernel's own, in one guest: the ratio is told, not judged"""

import json

from harness.inside import ADDRESS, Inside

TARGETS = ("ringstone",)
NQN = "nqn.2026-11.io.ringstone:rdma-ratio"
DISK_MIB = 64
KERNEL_PORT = 4440
NVMET = "/sys/kernel/config/nvmet"
# Shape, block size, depth.
SHAPES = (("randread", "4k", 16), ("randwrite", "4k", 16), ("read", "128k", 8), ("write", "128k", 8))
SECONDS = 5


def bytes_per_second(t, device, rw, size, depth):
    report = json.loads(t.sh(
        f"fio --name={rw} --filename={device} --rw={rw} --bs={size} --iodepth={depth} --ioengine=libaio --direct=1 "
        f"--size={DISK_MIB}m --allow_file_create=0 --time_based --runtime={SECONDS} --output-format=json", 600))
    job = report["jobs"][0]
    return job["write" if "write" in rw else "read"]["bw_bytes"]


def measure(t, port):
    host = t.hosts[0]
    t.sh(f"nvme connect --transport rdma --traddr {ADDRESS} --trsvcid {port} --nqn {NQN} --hostnqn {host.nqn} "
         f"--hostid {host.id} --nr-io-queues 2", 240)
    device = t.namespace(NQN)
    t.fio(device, 8, bs="64k")
    figures = [bytes_per_second(t, device, *shape) for shape in SHAPES]
    t.disconnect(NQN)
    t.eventually("! ls -d /sys/class/nvme/nvme* 2>/dev/null")
    return figures


def kernel_target(t):
    t.sh(f"""
        set -e
        modprobe nvmet-rdma
        grep -q ' /sys/kernel/config ' /proc/mounts || mount -t configfs configfs /sys/kernel/config
        ram_disk
        truncate -s {DISK_MIB}M /srv/ratio
        cd {NVMET}
        mkdir subsystems/{NQN}
        echo 1 >subsystems/{NQN}/attr_allow_any_host
        mkdir subsystems/{NQN}/namespaces/1
        echo /srv/ratio >subsystems/{NQN}/namespaces/1/device_path
        echo 1 >subsystems/{NQN}/namespaces/1/buffered_io
        echo 1 >subsystems/{NQN}/namespaces/1/enable
        mkdir ports/9
        echo rdma >ports/9/addr_trtype
        echo ipv4 >ports/9/addr_adrfam
        echo {ADDRESS} >ports/9/addr_traddr
        echo {KERNEL_PORT} >ports/9/addr_trsvcid
        ln -s "$PWD/subsystems/{NQN}" ports/9/subsystems/""", 240)


def no_kernel_target(t):
    t.sh(f"""
        cd {NVMET}
        rm -f ports/9/subsystems/* && rmdir ports/9
        rmdir subsystems/{NQN}/namespaces/1 subsystems/{NQN}
        rm -f /srv/ratio""")


def test(t):
    inside = Inside(t)
    inside.start_rdma()
    inside.subsystem(NQN)
    inside.malloc(NQN, 1, DISK_MIB)
    ours = measure(t, 4420)
    inside.stop()
    kernel_target(t)
    try:
        theirs = measure(t, KERNEL_PORT)
    finally:
        no_kernel_target(t)
    for (rw, size, depth), our, their in zip(SHAPES, ours, theirs):
        t.check(our > 0 and their > 0, f"nothing moved: {ours} {theirs}")
        print(f"    {rw} {size} depth {depth}: {our / (1 << 20):.1f} MiB/s, the kernel's target {their / (1 << 20):.1f} MiB/s, "
              f"ratio {our / their:.2f}")
