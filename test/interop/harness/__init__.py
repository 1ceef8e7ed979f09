"""The guest harness: a Debian kernel under QEMU as NVMe/TCP initiator, and the target it talks to.

`image` makes the kernel and initramfs, `machine` boots and commands the guest, `ringstone` and `nvmet` are
the two targets a test can run against, `context` is what a test is given, `runner` runs the tests.
"""
