"""discard and write zeroes: the range reads as zeros, its neighbours are untouched, the file gives room back"""

NQN = "nqn.2026-11.io.ringstone:zeroes"
MIB = 16


def test(t):
    t.target.start()
    t.target.subsystem(NQN)
    volume = t.volume(NQN, MIB)
    t.connect(NQN)
    device = t.namespace(NQN)
    queue = f"/sys/block/{device.rpartition('/')[2]}/queue"
    for limit in ("discard_max_bytes", "write_zeroes_max_bytes"):
        t.check(int(t.sh(f"cat {queue}/{limit}")) > 0, f"{limit} is 0: the target does not offer the command")
    if t.target.name == "ringstone":  # the kernel's target does not say it of files, but it is so
        t.equal(t.nvme(f"id-ns {device}")["dlfeat"] & 7, 1, "dlfeat: deallocated blocks read as zeros")
    block = int(t.sh(f"blockdev --getss {device}"))
    t.sh(f"dd if=/dev/urandom of=/tmp/expected bs=1M count={MIB} 2>/dev/null && "
         f"dd if=/tmp/expected of={device} bs=1M oflag=direct conv=fsync 2>/dev/null")
    compare(t, device, "the data written first")
    full = t.target.allocated_bytes(volume)
    # Command, offset and length in bytes: aligned and large, and unaligned to anything but the block.
    for command, offset, length in (
            ("blkdiscard -o {0} -l {1} {2}", 2 << 20, 4 << 20),
            ("blkdiscard -z -o {0} -l {1} {2}", 8 << 20, 2 << 20),
            ("blkdiscard -z -o {0} -l {1} {2}", (10 << 20) + 3 * block, 5 * block),
            ("fallocate --punch-hole --keep-size -o {0} -l {1} {2}", (12 << 20) + 7 * 4096, 3 * 4096),
            ("fallocate --zero-range --keep-size -o {0} -l {1} {2}", 14 << 20, 1 << 20)):
        t.sh(command.format(offset, length, device))
        t.sh(f"dd if=/dev/zero of=/tmp/expected bs={block} seek={offset // block} count={length // block} "
             "conv=notrunc 2>/dev/null")
        compare(t, device, command.format(offset, length, device))
    freed = full - t.target.allocated_bytes(volume)
    # The file system keeps a few blocks more for the list of a file's parts.
    t.check(freed >= (4 << 20) - (64 << 10), f"the discarded 4 MiB gave back {freed} bytes")
    t.sh(f"blkdiscard {device}")
    t.sh(f"dd if=/dev/zero of=/tmp/expected bs=1M count={MIB} 2>/dev/null")
    compare(t, device, "discarding all")
    # Trims of single blocks between writes, verified.
    t.fio(device, 4, rw="randtrim", verify=0)
    t.fio(device, 4, rw="randwrite")
    t.check_never_reconnected()


def compare(t, device, after):
    result = t.guest.run(f"dd if={device} iflag=direct bs=1M 2>/dev/null | cmp - /tmp/expected", check=False)
    t.equal(result.status, 0, f"content after {after} ({(result.out + result.err).strip()})")
