"""remote bdevs over soft-RoCE: on the kernel's NVMe/RDMA target and on our own, through targets that go away and come back"""

import json

from harness.inside import ADDRESS, PROGRAM, Inside
from harness.targets import FIRST_VOLUME_MIB, FIRST_VOLUME_NQN, Nvmet

TARGETS = ("ringstone",)
KERNEL_PORT, OWN_PORT, FRONT_PORT = 4430, 4440, 4421
OWN = "nqn.2026-11.io.ringstone:own"
OWN_MIB = 64
TIMEOUT_S = 400
PATIENT = {"ctrlr_loss_timeout_sec": -1, "reconnect_delay_sec": 1}
NVMET = "/sys/kernel/config/nvmet"


def test(t):
    front = Inside(t, "front", cores="0")
    front.start()
    t.sh("no_soft_roce")
    there = {"name": "K", "trtype": "RDMA", "traddr": ADDRESS, "trsvcid": str(KERNEL_PORT),
             "subnqn": FIRST_VOLUME_NQN}
    for method, params in (("bdev_nvme_attach_controller", there),
                           ("bdev_nvme_start_discovery", {"name": "d", "trtype": "rdma", "traddr": ADDRESS})):
        t.refused(front.command(method, **params), "rdma link add rxe0 type rxe", TIMEOUT_S)
    t.sh("soft_roce")
    # Nobody listens; and what RDMA has not is not taken.
    t.refused(front.command("bdev_nvme_attach_controller", **there), "refused", TIMEOUT_S)
    t.refused(front.command("bdev_nvme_attach_controller", **there, hdgst=True), "no digests", TIMEOUT_S)
    front.rpc("nvmf_create_transport", trtype="TCP")

    kernel = Nvmet(t.guest, listen="0.0.0.0")
    kernel.start(first_volume=True)
    try:
        t.sh(f"""
            modprobe nvmet-rdma
            cd {NVMET}
            mkdir ports/9
            echo rdma >ports/9/addr_trtype
            echo ipv4 >ports/9/addr_adrfam
            echo {ADDRESS} >ports/9/addr_traddr
            echo {KERNEL_PORT} >ports/9/addr_trsvcid
            {link()}
        """)
        on_the_kernels(t, front, there)
    finally:
        t.sh(f"cd {NVMET} && rm -f ports/9/subsystems/* && rmdir ports/9")
        problem = kernel.finish()
    t.check(problem is None, problem)
    on_our_own(t, front)
    front.stop()


def link():
    return f"ln -s {NVMET}/subsystems/{FIRST_VOLUME_NQN} {NVMET}/ports/9/subsystems/"


def connected(t, front, bdev, nqn):
    """A bdev of ours as a namespace of the kernel's host."""
    front.rpc("nvmf_create_subsystem", nqn=nqn, allow_any_host=True, serial_number="FRONT001", max_namespaces=16)
    front.rpc("nvmf_subsystem_add_ns", nqn=nqn, namespace={"bdev_name": bdev, "nsid": 1})
    front.listener(nqn, FRONT_PORT, "TCP")
    host = t.hosts[0]
    t.sh(f"nvme connect -t tcp -a {ADDRESS} -s {FRONT_PORT} --nqn {nqn} --hostnqn {host.nqn} --hostid {host.id} "
         f"--nr-io-queues 2 --keep-alive-tmo 60", TIMEOUT_S)
    return t.namespace(nqn)


def gone(t, front, nqn):
    t.sh(f"nvme disconnect --nqn {nqn}", TIMEOUT_S)
    front.rpc("nvmf_delete_subsystem", nqn=nqn)


def state(front, name):
    return front.rpc("bdev_nvme_get_controllers", name=name)[0]["ctrlrs"][0]["state"]


def await_state(t, front, name, wanted):
    shown = front.command("bdev_nvme_get_controllers", name=name)
    t.eventually(f"{shown} | grep -q '\"{wanted}\"'", TIMEOUT_S)


def on_the_kernels(t, front, there):
    nqn = "nqn.2026-11.io.ringstone:front-k"
    t.equal(front.rpc("bdev_nvme_attach_controller", **there, **PATIENT), ["Kn1"], "the bdevs")
    shown = front.rpc("bdev_nvme_get_controllers", name="K")[0]["ctrlrs"][0]
    t.equal((shown["state"], shown["trid"]["trtype"]), ("enabled", "RDMA"), "the controller")
    size = front.rpc("bdev_get_bdevs", name="Kn1")[0]
    t.equal(size["num_blocks"] * size["block_size"], FIRST_VOLUME_MIB << 20, "the bdev's size")
    device = connected(t, front, "Kn1", nqn)
    for size, depth, mib in (("4k", 16, 4), ("16k", 8, 4), ("128k", 8, 16), ("1m", 2, 16)):
        t.fio(device, mib, bs=size, iodepth=depth, timeout_s=600)

    # Reset, disabled and enabled, and a target that is gone for a while, all under load.
    load = t.load(device, size_mib=1, iodepth=8)
    load.await_passes(1)
    t.equal(front.rpc("bdev_nvme_reset_controller", name="K"), True, "a reset")
    load.await_passes(1)
    t.equal(front.rpc("bdev_nvme_disable_controller", name="K"), True, "disabled")
    t.equal(state(front, "K"), "disabled", "the state")
    t.equal(front.rpc("bdev_nvme_enable_controller", name="K"), True, "enabled")
    load.await_passes(1)
    t.sh(f"rm {NVMET}/ports/9/subsystems/*")
    await_state(t, front, "K", "reconnect_is_delayed")
    t.sh(link())
    await_state(t, front, "K", "enabled")
    load.await_passes(1)
    load.finish()

    # As it is saved, attached again from that, and without it.
    gone(t, front, nqn)
    saved = json.loads(t.sh(f"cat {front.state}/state/config.json"))
    calls = [call for subsystem in saved["subsystems"] for call in subsystem["config"] or []
             if call["method"] == "bdev_nvme_attach_controller"]
    t.equal([(call["params"]["name"], call["params"]["trtype"]) for call in calls], [("K", "RDMA")], "what is saved")
    front.kill()
    front.start("")
    await_state(t, front, "K", "enabled")
    t.eventually(f"{front.command('bdev_get_bdevs', name='Kn1')} | grep -q Kn1", TIMEOUT_S)
    front.rpc("bdev_nvme_detach_controller", name="K", trtype="RDMA")
    t.equal(front.rpc("bdev_nvme_get_controllers"), [], "the controllers")


def on_our_own(t, front):
    nqn = "nqn.2026-11.io.ringstone:front-o"
    back = Inside(t, "back", cores="1")
    back.start()
    t.sh(f"truncate -s {OWN_MIB}M {back.state}/disk")
    back.rpc("nvmf_create_transport", trtype="RDMA", max_io_size=1 << 20)
    back.rpc("bdev_uring_create", name="disk", filename=f"{back.state}/disk", block_size=512)
    back.subsystem(OWN, OWN_PORT)
    back.rpc("nvmf_subsystem_add_ns", nqn=OWN, namespace={"bdev_name": "disk", "nsid": 1})

    remote = f"--trtype rdma --traddr {ADDRESS} --trsvcid {OWN_PORT}"
    for options in ("--rw randrw --count 300 --qd 8", "--rw randrw --count 100 --qd 8 --bs 16384 --queues 2",
                    "--rw randrw --count 50 --qd 4 --bs 131072", "--rw write --count 8 --qd 2 --bs 1048576"):
        report = json.loads(t.sh(f"{PROGRAM} perf {remote} --subnqn {OWN} --io-timeout 200 --size {16 << 20} --verify "
                                 f"--json {options}", TIMEOUT_S))
        t.equal((report["errors"], report["verify"]["mismatches"]), (0, 0), f"{options}: {report}")
        t.check(report["verify"]["checked_blocks"] > 0, f"nothing was checked: {report}")

    there = {"trtype": "RDMA", "traddr": ADDRESS, "trsvcid": str(OWN_PORT)}
    front.rpc("bdev_nvme_attach_controller", name="O", subnqn=OWN, **there, **PATIENT)
    device = connected(t, front, "On1", nqn)
    t.fio(device, 8, bs="4k", timeout_s=600)
    t.fio(device, 16, bs="128k", iodepth=4, timeout_s=600)
    load = t.load(device, size_mib=1, iodepth=8)
    for _ in range(2):
        load.await_passes(1)
        back.kill()
        await_state(t, front, "O", "reconnect_is_delayed")
        back.start("")
        await_state(t, front, "O", "enabled")
    load.await_passes(1)
    load.finish()
    gone(t, front, nqn)
    front.rpc("bdev_nvme_detach_controller", name="O")
    back.stop()
