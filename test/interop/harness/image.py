"""Kernel and initramfs of the guest, made from Debian packages and kept in a cache.

The cache holds, under $RINGSTONE_CACHE (default ~/.cache/ringstone) and there in `guest/`:

    kernel/PACKAGE_VERSION/*.deb
    image/KEY/{vmlinuz,initrd,about}

KEY is a hash of the kernel package, the versions of every package whose files go into the initramfs, the module
list and the files in test/interop/guest, so a changed input makes a new image and nothing else does. Everything is
written under a temporary name and renamed, so that an interrupted or a concurrent build never leaves half an image.
"""

import gzip
import hashlib
import lzma
import os
import re
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from .process import HarnessError

# Files of the host that go into the initramfs, each with the package it comes from.
PROGRAMS = {
    "nvme": "nvme-cli",
    "fio": "fio",
    "mkfs.ext4": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "dd": "coreutils",  # busybox's does not align its buffers for direct I/O
    "blkdiscard": "util-linux",
    "blockdev": "util-linux",
    "fallocate": "util-linux",
    "rdma": "iproute2",
}
# Libraries that programs open at run time, or that only our own binary needs, each with its package.
LIBRARIES = {
    "libgcc_s.so.1": "libgcc-s1",
    "libm.so.6": "libc6",
    "libibverbs.so.1": "libibverbs1",
    "librdmacm.so.1": "librdmacm1",
}
# Soft-RoCE's driver of libibverbs: found by name in a folder beside that library, and named by a file in /etc.
PROVIDER_PACKAGE = "ibverbs-providers"
PROVIDER_FILES = ("libibverbs/librxe-rdmav*.so",)
PROVIDER_NAME = "/etc/libibverbs.d/rxe.driver"
# Programs that run on the host: package and what is looked for.
TOOLS = {
    "qemu-system-x86": "qemu-system-x86_64",
    "busybox-static": "busybox",
    "kmod": "depmod",
    "dpkg": "dpkg-deb",
}
MODULES = [
    "virtio_pci", "virtio_net", "virtio_console",
    "crc32c_generic", "crc32c_intel", "crc32_generic",
    "ext4", "brd",
    "nvme_core", "nvme_fabrics", "nvme_tcp", "nvmet", "nvmet_tcp",
    "rdma_rxe", "rdma_ucm", "ib_uverbs", "nvme_rdma", "nvmet_rdma",
]
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
IMAGES_KEPT = 4
PACKAGES_KEPT = 3


class NoKernel(HarnessError):
    """apt offers no kernel of the series that was asked for."""


def run(command, **kwargs):
    """Runs a host command; its standard output, or a HarnessError that shows why it failed."""
    done = subprocess.run(command, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env={**os.environ, "LC_ALL": "C", "PATH": path_of_host()}, **kwargs)
    if done.returncode != 0:
        raise HarnessError(f"`{' '.join(map(str, command))}` failed with status {done.returncode}:\n"
                           f"{done.stderr.strip()[-2000:]}")
    return done.stdout


def path_of_host():
    """$PATH and the sbin folders, which an unprivileged user's $PATH often lacks."""
    return f"{os.environ.get('PATH', '')}:{SEARCH_PATH}"


def which(program):
    return shutil.which(program, path=path_of_host())


def cache_folder():
    base = os.environ.get("RINGSTONE_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "ringstone")
    return Path(base) / "guest"


class Packages:
    """The Debian packages of this machine, asked by dpkg and apt; package lists are refreshed at most once."""

    def __init__(self, say):
        self.say = say
        self.refreshed = False

    def refresh(self):
        """Fetches the package lists when that is allowed; False when it is not or was already done."""
        if self.refreshed or os.geteuid() != 0 or which("apt-get") is None:
            return False
        self.refreshed = True
        self.say("refreshing the package lists")
        run(["apt-get", "-qq", "update"])
        return True

    def install_missing(self):
        """Installs what the harness needs, or says which packages to install."""
        missing = sorted({package for package, program in TOOLS.items() if which(program) is None}
                         | {package for program, package in PROGRAMS.items() if which(program) is None}
                         | {package for library, package in LIBRARIES.items() if library_path(library) is None}
                         | ({PROVIDER_PACKAGE} if not provider_files() else set()))
        if not missing:
            return
        command = ["apt-get", "-qq", "install", "--yes", "--no-install-recommends", *missing]
        if os.geteuid() != 0 or which("apt-get") is None:
            raise HarnessError("these Debian packages are needed; install them and start again:\n  "
                               f"sudo apt-get install --no-install-recommends {' '.join(missing)}")
        self.say(f"installing {' '.join(missing)}")
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        if subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode != 0:
            self.refresh()
            if subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode != 0:
                raise HarnessError(f"`{' '.join(command)}` failed")

    def versions(self, names):
        """Installed versions by package name."""
        listing = run(["dpkg-query", "--show", "--showformat=${Package}\t${Version}\n", *sorted(names)])
        return dict(line.split("\t") for line in listing.splitlines())

    def newest_kernel(self, series):
        """(package, version) of the newest kernel package of a series such as "6.1" that apt offers, or None.

        Only the general flavour: the cloud one lacks soft-RoCE, the real-time one is another kernel.
        """
        pattern = re.compile(rf"^linux-image-{re.escape(series)}\.(\d+)(?:-(\d+))?(?:\+deb\d+(?:u\d+)?)?-amd64$")
        for attempt in range(2):
            found = []
            if which("apt-cache") is not None:
                listing = run(["apt-cache", "search", "--names-only", f"^linux-image-{re.escape(series)}\\."])
                for line in listing.splitlines():
                    match = pattern.match(line.split(" ", 1)[0])
                    if match:
                        found.append((int(match[1]), int(match[2] or 0), match[0]))
            if found:
                package = max(found)[2]
                shown = run(["apt-cache", "show", "--no-all-versions", package])
                return package, re.search(r"^Version: (\S+)$", shown, re.MULTILINE)[1]
            if attempt == 0 and not self.refresh():
                break
        return None

    def download(self, package, version, folder):
        """The path of a package file fetched into `folder`."""
        command = ["apt-get", "-qq", "download", f"{package}={version}"]
        try:
            run(command, cwd=folder)
        except HarnessError:
            if not self.refresh():
                raise
            run(["apt-get", "-qq", "download", package], cwd=folder)
        return next(Path(folder).glob("*.deb"))


class Archive:
    """A cpio archive in the "newc" format (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).

    Owner, time and inode numbers do not depend on the machine, and no privilege is needed to make device nodes.
    """

    def __init__(self, out):
        self.out = out
        self.inode = 0
        self.folders = set()

    def _entry(self, name, mode, data=b"", device=(0, 0)):
        self.inode += 1
        encoded = name.encode() + b"\0"
        fields = [self.inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0]
        header = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        self.out.write(header + b"\0" * (-len(header) % 4))
        self.out.write(data + b"\0" * (-len(data) % 4))

    def folder(self, name):
        if name and name not in self.folders:
            self.folder(os.path.dirname(name))
            self.folders.add(name)
            self._entry(name, stat.S_IFDIR | 0o755)

    def file(self, name, data, mode=0o755):
        self.folder(os.path.dirname(name))
        self._entry(name, stat.S_IFREG | mode, data)

    def link(self, name, to):
        self.folder(os.path.dirname(name))
        self._entry(name, stat.S_IFLNK | 0o777, to.encode())

    def character_device(self, name, major, minor):
        self.folder(os.path.dirname(name))
        self._entry(name, stat.S_IFCHR | 0o600, device=(major, minor))

    def close(self):
        self.inode = -1
        self._entry("TRAILER!!!", 0)


class Image:
    """A bootable kernel with its initramfs: `kernel` and `initrd` are paths, `about` says what is in it."""

    def __init__(self, folder):
        self.kernel = folder / "vmlinuz"
        self.initrd = folder / "initrd"
        self.about = (folder / "about").read_text().strip()


def kernel_package(packages, package, version, cache, say):
    """The path of the kernel's package file, fetched when the cache has none."""
    folder = cache / "kernel" / f"{package}_{version}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        say(f"fetching {package} {version}")
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            fetched = Path(scratch) / "fetched"
            fetched.mkdir()
            packages.download(package, version, fetched)
            keep_first(fetched, folder)
    os.utime(folder)
    prune(folder.parent, PACKAGES_KEPT)
    return next(folder.glob("*.deb"))


def unpack_kernel(deb, folder):
    """Unpacks a kernel package to `folder` and returns the release it is for; boot/vmlinuz-RELEASE is there then."""
    run(["dpkg-deb", "--extract", deb, folder])
    release = next((folder / "lib/modules").iterdir()).name
    if not (folder / "lib/modules" / release / "modules.dep").exists():
        run(["depmod", "--basedir", folder, release])
    return release


def keep_first(built, final):
    """Renames a finished folder into place; another process that was faster wins."""
    try:
        os.rename(built, final)
    except OSError:
        if not final.is_dir():
            raise


def modules_with_dependencies(kernel, release):
    """Paths below lib/modules/RELEASE of MODULES and all they need, from modules.dep."""
    base = kernel / "lib/modules" / release
    needs, by_name = {}, {}
    for line in (base / "modules.dep").read_text().splitlines():
        path, rest = line.split(":", 1)
        needs[path] = rest.split()
        by_name[re.sub(r"\.ko(\.\w+)?$", "", os.path.basename(path)).replace("-", "_")] = path
    built_in = {re.sub(r"\.ko$", "", os.path.basename(line)).replace("-", "_")
                for line in (base / "modules.builtin").read_text().split()}
    wanted, found = list(MODULES), set()
    while wanted:
        name = wanted.pop()
        path = name if name in needs else by_name.get(name)
        if path is None:
            if name in built_in or name.startswith("crc32"):
                continue  # which of the crc32 modules exist differs between kernels; ext4 and nvme_tcp name theirs
            raise HarnessError(f"kernel {release} has no module {name}")
        if path not in found:
            found.add(path)
            wanted.extend(needs[path])
    return sorted(found)


def read_module(path):
    data = path.read_bytes()
    if path.suffix == ".xz":  # busybox's modprobe cannot read every compressed module
        return lzma.decompress(data)
    if path.suffix == ".gz":
        return gzip.decompress(data)
    if path.suffix != ".ko":
        raise HarnessError(f"{path.name}: a module compression this harness does not know")
    return data


def add_modules(archive, kernel, release, scratch):
    """Adds the modules, uncompressed, and the index that modprobe needs for exactly these."""
    root = Path(scratch) / "modules"
    source, copy = kernel / "lib/modules" / release, root / "lib/modules" / release
    for path in modules_with_dependencies(kernel, release):
        target = copy / re.sub(r"\.ko\.\w+$", ".ko", path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(read_module(source / path))
    for index in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        if (source / index).exists():
            shutil.copy(source / index, copy / index)
    run(["depmod", "--basedir", root, release])
    for path in sorted(copy.rglob("*")):
        if path.is_file():
            archive.file(str(path.relative_to(root)), path.read_bytes(), 0o644)


def library_path(name):
    """Where the dynamic linker finds a library of this machine's own kind, or None."""
    known = run([which("ldconfig"), "--print-cache"])
    match = re.search(rf"^\s*{re.escape(name)} \(libc6,x86-64[^)]*\) => (/\S+)$", known, re.MULTILINE)
    return match[1] if match else None


def provider_files():
    """The files of soft-RoCE's driver, or none if any is missing."""
    library = library_path("libibverbs.so.1")
    found = [Path(PROVIDER_NAME)] if Path(PROVIDER_NAME).exists() else []
    if library is None or not found:
        return []
    for pattern in PROVIDER_FILES:
        matches = sorted(Path(library).parent.glob(pattern))
        if not matches:
            return []
        found += matches
    return found


def libraries_of(programs):
    """Every shared library the programs load, as paths on the host."""
    found = set()
    for program in programs:
        for line in run(["ldd", program]).splitlines():
            match = re.match(r"\s*(?:\S+ => )?(/\S+) \(0x", line)
            if match:
                found.add(match[1])
    return sorted(found)


def write_initramfs(out, kernel, release, guest_files, scratch):
    archive = Archive(out)
    for folder in ("proc", "sys", "dev", "run", "tmp", "mnt", "srv", "root", "etc/nvme"):
        archive.folder(folder)
    archive.character_device("dev/console", 5, 1)
    archive.file("bin/busybox", Path(which("busybox")).read_bytes())
    applets = run([which("busybox"), "--list"]).split()
    for applet in applets:
        if applet not in PROGRAMS and applet != "busybox":
            archive.link(f"bin/{applet}", "busybox")
    # Busybox's shell takes its own applets before $PATH, but functions before its applets.
    functions = [f'{name}() {{ /bin/{name} "$@"; }}\n' for name in PROGRAMS if name in applets]
    archive.file("etc/programs.sh", "".join(functions).encode(), 0o644)
    archive.link("sbin", "bin")  # where the kernel looks for modprobe
    programs = [os.path.realpath(which(program)) for program in PROGRAMS]
    for name, path in zip(PROGRAMS, programs):
        archive.file(f"bin/{name}", Path(path).read_bytes())
    opened = [library_path(name) for name in LIBRARIES]
    drivers = [str(path) for path in provider_files()]
    loaded = programs + opened + [path for path in drivers if path.endswith(".so")]
    libraries = sorted({*libraries_of(loaded), *opened})
    for library in libraries:
        # Kept at the path the program asks for, the dynamic linker's included.
        archive.file(library.lstrip("/"), Path(library).read_bytes())
    for path in drivers:
        # The folder that libibverbs looks in, whichever of its names the linker's cache has.
        home = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        archive.file(home.lstrip("/"), Path(path).read_bytes())
    # Libraries outside the default folders are found by their rpath or the linker's cache; name them all.
    folders = sorted({os.path.dirname(library) for library in libraries})
    archive.file("etc/library-path", ":".join(folders).encode() + b"\n", 0o644)
    add_modules(archive, kernel, release, scratch)
    for path in guest_files:
        archive.file(path.name, path.read_bytes())
    archive.close()


def prune(folder, keep):
    """Removes all but the `keep` most recently used folders."""
    entries = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    for path in entries[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def build(series, guest_folder, say):
    """The image for a kernel series ("6.1", "6.12"): from the cache, or made now."""
    packages, cache = Packages(say), cache_folder()
    packages.install_missing()
    newest = packages.newest_kernel(series)
    if newest is None:
        raise NoKernel(
            f"apt offers no package linux-image-{series}.*-amd64 on this machine. Kernel 6.1 is in Debian 12; 6.12 is in Debian "
            "13, and in bookworm-security for Debian 12. Add that source and run `apt-get update`, or choose another --kernel.")
    package, version = newest
    guest_files = sorted(path for path in Path(guest_folder).iterdir() if path.is_file())
    inputs = [package, version, *MODULES, Path(__file__).read_text()]
    inputs += [f"{name} {found}" for name, found in sorted(
        packages.versions({*PROGRAMS.values(), *LIBRARIES.values(), PROVIDER_PACKAGE, "busybox-static", "libc6"}).items())]
    inputs += [path.name + path.read_text() for path in guest_files]
    key = hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:16]
    folder = cache / "image" / key
    if not folder.is_dir():
        deb = kernel_package(packages, package, version, cache, say)
        say("making the initramfs")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            kernel, built = Path(scratch) / "kernel", Path(scratch) / "built"
            built.mkdir()
            release = unpack_kernel(deb, kernel)
            shutil.copy(kernel / "boot" / f"vmlinuz-{release}", built / "vmlinuz")
            with open(built / "initrd", "wb") as out:
                write_initramfs(out, kernel, release, guest_files, scratch)
            (built / "about").write_text(f"{package} {version}\n")
            keep_first(built, folder)
    os.utime(folder)
    prune(cache / "image", IMAGES_KEPT)
    return Image(folder)
