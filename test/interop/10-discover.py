"""discover: the log page lists what is served, follows changes, and an unknown subsystem is refused"""

from harness.targets import FIRST_VOLUME_MIB, FIRST_VOLUME_NQN

OTHER = "nqn.2026-11.io.ringstone:other"


def test(t):
    t.target.start(first_volume=True)
    records, generation = t.discover()
    t.check(FIRST_VOLUME_NQN in records, f"the first volume is not in the discovery log: {records}")
    record = records[FIRST_VOLUME_NQN]
    found = {key: record[key] for key in ("trtype", "adrfam", "subtype", "traddr", "trsvcid")}
    t.equal(found, {"trtype": "tcp", "adrfam": "ipv4", "subtype": "nvme subsystem",
                    "traddr": t.target.own_address, "trsvcid": str(t.target.port)}, "the discovery record")

    t.target.subsystem(OTHER)
    t.volume(OTHER, 16, name="other")
    records, later = t.discover()
    t.check(OTHER in records, f"a new subsystem is not in the discovery log: {records}")
    t.check(later != generation, f"the generation counter stayed {generation} although a subsystem was added")

    t.refused(t.connect_command("nqn.2026-11.io.ringstone:missing"), "failed to (write to|connect)|No such|Input/output|Invalid")
    t.connect(FIRST_VOLUME_NQN)
    t.await_size(t.namespace(FIRST_VOLUME_NQN), FIRST_VOLUME_MIB)
    t.fio(t.namespace(FIRST_VOLUME_NQN), 4)
    # A discovery while connected must not disturb the connection.
    t.discover()
    t.check_never_reconnected()
