"""The program of hosts that misbehave over RDMA, in the guest."""

import os
import subprocess

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
VANDAL = "/opt/rdma_vandal"


def install(t):
    """Builds the program and copies it into the guest."""
    built = subprocess.run(["cargo", "build", "--quiet", "-p", "ringstone-sim", "--example", "rdma_vandal"], cwd=ROOT)
    t.check(built.returncode == 0, "the example rdma_vandal does not build")
    folder = os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))
    t.guest.install(os.path.join(folder, "debug", "examples", "rdma_vandal"), VANDAL)
