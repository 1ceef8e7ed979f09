//! What every engine must do, run on each of them, on a memory file system and on a disk, cached and direct.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};

use super::os::OsFile;
use super::threads::ThreadEngine;
use super::uring::{Mode, UringEngine};
use super::*;
use crate::buffer::{Buffer, BufferPool, PoolConfig};
use crate::file::os::OsFiles;
use crate::park::{EpollParker, Ready};

/// A payload that tells when it is dropped.
struct Memory {
    list: Buffers,
    dropped: Option<Arc<AtomicUsize>>,
}

impl Payload for Memory {
    fn buffers(&mut self) -> &mut Buffers {
        &mut self.list
    }
    fn into_any(self: Box<Self>) -> Box<dyn Any + Send> {
        self
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Some(count) = &self.dropped {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn memory_of(payload: Box<dyn Payload>) -> Buffers {
    std::mem::take(&mut payload.into_any().downcast::<Memory>().unwrap().list)
}

/// A folder of its own, removed with it.
pub(super) struct Folder(pub PathBuf);

impl Folder {
    pub(super) fn new(parent: &Path) -> Folder {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("ringstone-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = parent.join(name);
        std::fs::create_dir(&path).unwrap();
        Folder(path)
    }

    pub(super) fn temporary() -> Folder {
        Folder::new(&std::env::temp_dir())
    }

    fn volume(&self, bytes: u64) -> PathBuf {
        let path = self.0.join("volume");
        OsFiles.create(&path, bytes).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Anonymous memory as a file, which can be sealed.
struct MemoryFile {
    fd: OwnedFd,
    bytes: u64,
}

impl MemoryFile {
    fn new(bytes: u64) -> MemoryFile {
        use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
        let fd = memfd_create("ringstone-test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, bytes).unwrap();
        MemoryFile { fd, bytes }
    }
}

impl File for MemoryFile {
    fn path(&self) -> &Path {
        Path::new("memory")
    }
    fn source(&self) -> Source {
        Source::Fd(self.fd.as_raw_fd())
    }
    fn info(&self) -> FileInfo {
        FileInfo {
            bytes: self.bytes,
            io_unit: 1,
            physical_block: 4096,
            block_device: false,
            direct: false,
            discard: true,
            discard_zeroes: true,
            write_zeroes: true,
            volatile_cache: true,
        }
    }
    fn bytes(&self) -> io::Result<u64> {
        Ok(self.bytes)
    }
}

/// An engine with the reactor's things that it needs.
struct Bench {
    // First, so that nothing is under way when the memory goes.
    engine: Box<dyn FileEngine>,
    pool: BufferPool,
    parker: EpollParker,
}

impl Bench {
    fn new(engine: impl FnOnce(Region, &mut EpollParker) -> io::Result<Box<dyn FileEngine>>) -> io::Result<Bench> {
        let pool = BufferPool::new(PoolConfig { small: 128, medium: 32, large: 8 })?;
        let mut parker = EpollParker::new()?;
        let engine = engine(pool.region(), &mut parker)?;
        Ok(Bench { engine, pool, parker })
    }

    fn uring(mode: Mode, register: bool) -> io::Result<Bench> {
        Bench::new(|region, parker| {
            // A region that is not mapped cannot be registered, like one beyond the limit of locked memory.
            let region = if register { region } else { Region { base: 4096, bytes: 4096 } };
            Ok(Box::new(UringEngine::on(mode.build()?, mode, region, parker)?))
        })
    }

    fn submit(&mut self, slot: FileSlot, op: FileOp, offset: u64, list: Buffers, token: u64) {
        let payload = Box::new(Memory { list, dropped: None });
        self.engine.submit(FileRequest { slot, op, offset, payload, token });
    }

    /// Sleeps until the engine has something, as a reactor does.
    fn next(&mut self) -> Vec<FileDone> {
        let mut out = Vec::new();
        self.engine.flush();
        while self.engine.reap(&mut out) == 0 {
            assert!(self.engine.in_flight() > 0, "waiting for nothing");
            let mut ready: Vec<Ready> = Vec::new();
            self.parker.wait(None, &mut ready).unwrap();
            assert!(ready.iter().all(|r| r.token == ENGINE_TOKEN));
        }
        out
    }

    /// All that is under way, by token.
    fn finish(&mut self) -> HashMap<u64, FileDone> {
        let mut all = HashMap::new();
        while self.engine.in_flight() > 0 {
            for done in self.next() {
                let token = done.token;
                assert!(all.insert(token, done).is_none(), "operation {token} ended twice");
            }
        }
        all
    }

    fn run(&mut self, slot: FileSlot, op: FileOp, offset: u64, list: Buffers) -> (Result<(), Errno>, Buffers) {
        self.submit(slot, op, offset, list, 77);
        let done = self.finish().remove(&77).unwrap();
        (done.result, memory_of(done.payload))
    }

    fn read(&mut self, slot: FileSlot, offset: u64, len: usize) -> Vec<u8> {
        let mut list = Buffers::heap(len);
        list.fill(0xEE);
        let (result, list) = self.run(slot, FileOp::Read, offset, list);
        assert_eq!(result, Ok(()));
        list.to_vec()
    }
}

/// The engines that this host has.
fn benches() -> Vec<Bench> {
    let mut list = vec![Bench::new(|_, parker| Ok(Box::new(ThreadEngine::new(parker)?))).unwrap()];
    for (mode, register) in
        [(Mode::Deferred, true), (Mode::Deferred, false), (Mode::Cooperative, true), (Mode::Plain, true)]
    {
        match Bench::uring(mode, register) {
            Ok(bench) => list.push(bench),
            Err(error) => eprintln!("skipped: io_uring in mode {mode:?} ({error})"),
        }
    }
    list
}

/// Where files can lie: a disk (or whatever holds temporary files) and memory.
fn parents() -> Vec<PathBuf> {
    let memory = PathBuf::from("/dev/shm");
    let mut list = vec![std::env::temp_dir()];
    list.extend(memory.is_dir().then_some(memory));
    list
}

/// Marsaglia's xorshift64: a reproducible sequence.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// Payload memory in any of the shapes that callers bring.
fn some_memory(random: &mut Random, pool: &mut BufferPool, len: usize, unit: usize) -> Buffers {
    if random.below(3) > 0
        && let Some(list) = pool.alloc(len)
    {
        return list;
    }
    let mut list = Buffers::new();
    while list.len() < len {
        let left = len - list.len();
        let piece = (1 + random.below(40_000) as usize).next_multiple_of(unit).min(left);
        list.push(Buffer::heap(piece));
    }
    list
}

/// Rounds of operations at once on disjoint ranges, against a copy of the file in memory.
fn against_a_model(bench: &mut Bench, path: &Path, direct: bool, seed: u64) {
    const BYTES: usize = 2 << 20;
    let mut random = Random(seed);
    let file = OsFiles.open(path, OpenOptions { read_only: false, direct }).unwrap();
    let info = file.info();
    let unit = info.io_unit as usize;
    let slot = bench.engine.attach(file).unwrap();
    let mut model = vec![0u8; BYTES];
    for round in 0..25 {
        let mut cuts: Vec<usize> =
            (0..random.below(30)).map(|_| random.below(BYTES as u64) as usize / unit * unit).collect();
        cuts.extend([0, BYTES]);
        cuts.sort();
        cuts.dedup();
        let mut expected = HashMap::new();
        for (token, range) in cuts.windows(2).enumerate() {
            let (start, len) = (range[0], (range[1] - range[0]).min(400 * 1024));
            let op = match random.below(6) {
                0 => FileOp::Write { durable: true },
                1 | 2 => FileOp::Write { durable: false },
                3 if info.discard => FileOp::Discard { len: len as u64 },
                4 => FileOp::WriteZeroes { len: len as u64, may_unmap: random.below(2) == 0 },
                _ => FileOp::Read,
            };
            let mut list = Buffers::new();
            match op {
                FileOp::Read => {
                    list = some_memory(&mut random, &mut bench.pool, len, unit);
                    list.fill(0xEE);
                    expected.insert(token as u64, start..start + len);
                }
                FileOp::Write { .. } => {
                    list = some_memory(&mut random, &mut bench.pool, len, unit);
                    let bytes: Vec<u8> = (0..len).map(|_| random.below(256) as u8).collect();
                    list.write_at(0, &bytes);
                    model[start..start + len].copy_from_slice(&bytes);
                }
                _ => model[start..start + len].fill(0),
            }
            bench.submit(slot, op, start as u64, list, token as u64);
        }
        bench.submit(slot, FileOp::Sync, 0, Buffers::new(), u64::MAX);
        for (token, done) in bench.finish() {
            assert_eq!(done.result, Ok(()), "seed {seed}, round {round}, operation {token}");
            let list = memory_of(done.payload);
            if let Some(range) = expected.remove(&token) {
                assert!(list.to_vec() == model[range], "seed {seed}, round {round}, operation {token}: wrong bytes");
            }
            bench.pool.put(list);
        }
        assert!(expected.is_empty() && bench.pool.is_whole());
    }
    assert!(bench.read(slot, 0, BYTES) == model, "seed {seed}: wrong bytes in the end");
    bench.engine.detach(slot);
    assert!(std::fs::read(path).unwrap() == model, "seed {seed}: another reader sees other bytes");
}

#[test]
fn random_operations_agree_with_a_model() {
    for mut bench in benches() {
        for parent in parents() {
            for direct in [false, true] {
                for seed in 1..3 {
                    let folder = Folder::new(&parent);
                    let path = folder.volume(2 << 20);
                    against_a_model(&mut bench, &path, direct, 0x9E37_79B9_7F4A_7C15 ^ seed);
                }
            }
        }
    }
}

#[test]
fn a_read_past_the_end_fails_and_shows_zeroes_there() {
    for mut bench in benches() {
        for parent in parents() {
            for direct in [false, true] {
                let folder = Folder::new(&parent);
                let path = folder.volume(0);
                let bytes: Vec<u8> = (0..150_777).map(|i| (i % 251) as u8 | 1).collect();
                std::fs::write(&path, &bytes).unwrap();
                let file = OsFiles.open(&path, OpenOptions { read_only: true, direct }).unwrap();
                let slot = bench.engine.attach(file).unwrap();
                for (offset, len) in [(147_456, 8192), (0, 200_704), (151_552, 4096), (1 << 40, 4096)] {
                    let mut list = bench.pool.alloc(len).unwrap();
                    list.fill(0xEE);
                    let (result, list) = bench.run(slot, FileOp::Read, offset, list);
                    assert_eq!(result, Err(Errno(libc::EIO)), "{offset}+{len}");
                    let mut want: Vec<u8> = bytes.iter().copied().skip(offset as usize).take(len).collect();
                    want.resize(len, 0);
                    assert!(list.to_vec() == want, "{offset}+{len} direct: {direct}");
                    bench.pool.put(list);
                }
                bench.engine.detach(slot);
            }
        }
    }
}

#[test]
fn the_hosts_refusals_come_back() {
    for mut bench in benches() {
        let folder = Folder::temporary();
        let path = folder.volume(65_536);
        let slot =
            bench.engine.attach(OsFiles.open(&path, OpenOptions { read_only: true, direct: false }).unwrap()).unwrap();
        let write = FileOp::Write { durable: false };
        assert_eq!(bench.run(slot, write, 0, Buffers::heap(512)).0, Err(Errno(libc::EBADF)));
        let zero = FileOp::WriteZeroes { len: 512, may_unmap: false };
        assert_eq!(bench.run(slot, zero, 0, Buffers::new()).0, Err(Errno(libc::EBADF)));
        assert_eq!(bench.run(slot, FileOp::Discard { len: 512 }, 0, Buffers::new()).0, Err(Errno(libc::EBADF)));
        // It still reads.
        assert_eq!(bench.read(slot, 0, 512), [0; 512]);
        bench.engine.detach(slot);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 65_536);
    }
}

#[test]
fn a_write_that_the_host_cuts_short_is_continued_up_to_its_error() {
    use rustix::fs::{SealFlags, fcntl_add_seals};
    for mut bench in benches() {
        let file = Arc::new(MemoryFile::new(65_536));
        fcntl_add_seals(&file.fd, SealFlags::GROW).unwrap();
        let slot = bench.engine.attach(file.clone()).unwrap();
        let mut list = Buffers::new();
        (0..4).for_each(|_| list.push(Buffer::heap(16_384)));
        list.fill(9);
        // The file ends, and may not grow, in the middle of this.
        let (result, list) = bench.run(slot, FileOp::Write { durable: false }, 32_768, list);
        assert_eq!(result, Err(Errno(libc::EPERM)));
        assert_eq!(list.len(), 65_536);
        assert_eq!(bench.read(slot, 32_768, 32_768), [9; 32_768]);
        bench.engine.detach(slot);
    }
}

/// Mounts a memory file system of `bytes` bytes on `at` that this thread alone sees. Only root may.
fn mount_small(at: &Path, bytes: usize) -> io::Result<()> {
    use std::ffi::CString;
    use std::os::unix::ffi::OsStrExt;
    let checked = |result: i32| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    let at = CString::new(at.as_os_str().as_bytes())?;
    let options = CString::new(format!("size={bytes}"))?;
    let none = std::ptr::null();
    // SAFETY: no memory is involved.
    checked(unsafe { libc::unshare(libc::CLONE_NEWNS) })?;
    // SAFETY: all strings end in a zero byte and live through the call.
    checked(unsafe {
        libc::mount(none, c"/".as_ptr(), none, libc::MS_REC | libc::MS_PRIVATE, none.cast::<libc::c_void>())
    })?;
    // SAFETY: as above.
    checked(unsafe {
        libc::mount(c"none".as_ptr(), at.as_ptr(), c"tmpfs".as_ptr(), 0, options.as_ptr().cast::<libc::c_void>())
    })
}

#[test]
fn a_full_disk_refuses_writes_and_goes_on() {
    for mut bench in benches() {
        let folder = Folder::temporary();
        if let Err(error) = mount_small(&folder.0, 1 << 20) {
            eprintln!("skipped: this user may not mount ({error})");
            return;
        }
        // Sparse: twice of what there is room for.
        let path = folder.volume(2 << 20);
        let slot = bench.engine.attach(OsFiles.open(&path, OpenOptions::default()).unwrap()).unwrap();
        let write = FileOp::Write { durable: false };
        let mut list = Buffers::heap(2 << 20);
        list.fill(3);
        let (result, list) = bench.run(slot, write, 0, list);
        assert_eq!(result, Err(Errno(libc::ENOSPC)));
        // What was written before is there, and there is room again once something was discarded.
        assert_eq!(bench.read(slot, 0, 65_536), [3; 65_536]);
        assert_eq!(bench.run(slot, FileOp::Discard { len: 1 << 20 }, 0, Buffers::new()).0, Ok(()));
        let small = Buffers::from(&list.to_vec()[..65_536]);
        assert_eq!(bench.run(slot, write, (2 << 20) - 65_536, small).0, Ok(()));
        assert_eq!(bench.read(slot, (2 << 20) - 65_536, 65_536), [3; 65_536]);
        bench.engine.detach(slot);
        let mounted = std::ffi::CString::new(folder.0.to_str().unwrap()).unwrap();
        // SAFETY: the path ends in a zero byte.
        unsafe { libc::umount2(mounted.as_ptr(), libc::MNT_DETACH) };
    }
}

#[test]
fn operations_without_extent_succeed_and_absurd_ones_do_not() {
    for mut bench in benches() {
        let slot = bench.engine.attach(Arc::new(MemoryFile::new(4096))).unwrap();
        let zero = |len| FileOp::WriteZeroes { len, may_unmap: true };
        for op in [FileOp::Read, FileOp::Write { durable: true }, FileOp::Discard { len: 0 }, zero(0)] {
            assert_eq!(bench.run(slot, op, 4096, Buffers::new()).0, Ok(()));
        }
        for op in [FileOp::Discard { len: u64::MAX }, zero(1 << 63)] {
            assert_eq!(bench.run(slot, op, 4096, Buffers::new()).0, Err(Errno(libc::EINVAL)));
        }
        // An offset of all ones means "the present position" to some system calls; here it means nothing.
        for offset in [u64::MAX, i64::MAX as u64] {
            let (result, _) = bench.run(slot, FileOp::Read, offset, Buffers::heap(8));
            assert_eq!(result, Err(Errno(libc::EINVAL)));
        }
        bench.engine.detach(slot);
    }
}

#[test]
fn more_operations_than_any_queue_holds_all_end_once() {
    const COUNT: usize = 6000;
    for mut bench in benches() {
        // Not in memory, whose files go through no queue.
        let folder = Folder::temporary();
        let path = folder.volume((COUNT * 8) as u64);
        let file = Arc::new(OsFile::open(&path, OpenOptions::default()).unwrap());
        let slot = bench.engine.attach(file).unwrap();
        for i in 0..COUNT {
            let list = Buffers::from(&(i as u64).to_le_bytes()[..]);
            bench.submit(slot, FileOp::Write { durable: false }, i as u64 * 8, list, i as u64);
        }
        assert_eq!(bench.engine.in_flight(), COUNT);
        let all = bench.finish();
        assert_eq!(all.len(), COUNT);
        assert!(all.values().all(|done| done.result == Ok(())));
        let bytes = bench.read(slot, 0, COUNT * 8);
        let numbers = bytes.chunks_exact(8).map(|c| u64::from_le_bytes(c.try_into().unwrap()));
        assert!(numbers.eq(0..COUNT as u64));
        bench.engine.detach(slot);
    }
}

#[test]
fn files_in_memory_are_done_with_when_they_are_flushed() {
    const COUNT: usize = 100;
    for mode in [Mode::Deferred, Mode::Plain] {
        let Ok(mut bench) = Bench::uring(mode, true) else { continue };
        let slot = bench.engine.attach(Arc::new(MemoryFile::new((COUNT * 8) as u64))).unwrap();
        for i in 0..COUNT {
            let list = Buffers::from(&(i as u64).to_le_bytes()[..]);
            bench.submit(slot, FileOp::Write { durable: i % 2 == 0 }, i as u64 * 8, list, i as u64);
        }
        bench.submit(slot, FileOp::Read, 8, Buffers::heap(8), COUNT as u64);
        // No thread of the kernel's had the time for all of them.
        let mut done = Vec::new();
        bench.engine.flush();
        assert_eq!(bench.engine.reap(&mut done), COUNT + 1);
        assert!(done.iter().all(|done| done.result == Ok(())));
        assert_eq!(memory_of(done.pop().unwrap().payload).to_vec(), 1u64.to_le_bytes());
        // What else there is to do goes the usual way, and is seen.
        let (result, _) = bench.run(slot, FileOp::Discard { len: 4096 }, 0, Buffers::new());
        assert_eq!((result, bench.read(slot, 8, 8)), (Ok(()), vec![0; 8]));
        let (long, _) = bench.run(slot, FileOp::Read, 0, Buffers::heap(COUNT * 8 + 1));
        assert!(long.is_err(), "there is no such byte");
        bench.engine.detach(slot);
    }
}

#[test]
fn a_payload_of_more_segments_than_a_system_call_takes() {
    const COUNT: usize = 2500;
    for mut bench in benches() {
        let slot = bench.engine.attach(Arc::new(MemoryFile::new(COUNT as u64 * 3))).unwrap();
        let mut list = Buffers::new();
        for i in 0..COUNT {
            let mut buffer = Buffer::heap(3);
            buffer.fill(i as u8);
            list.push(buffer);
        }
        let want = list.to_vec();
        let (result, mut list) = bench.run(slot, FileOp::Write { durable: true }, 0, list);
        assert_eq!(result, Ok(()));
        list.fill(0);
        let (result, list) = bench.run(slot, FileOp::Read, 0, list);
        assert_eq!((result, list.to_vec() == want), (Ok(()), true));
        bench.engine.detach(slot);
    }
}

#[test]
fn more_files_than_are_registered() {
    for mut bench in benches() {
        let file = Arc::new(MemoryFile::new(4096));
        let slots: Vec<_> = (0..1100).map(|_| bench.engine.attach(file.clone()).unwrap()).collect();
        for (i, &slot) in slots.iter().enumerate() {
            let list = Buffers::from(&[i as u8; 2][..]);
            assert_eq!(bench.run(slot, FileOp::Write { durable: false }, i as u64, list).0, Ok(()));
        }
        assert_eq!(bench.read(slots[1099], 1099, 2), [1099u32 as u8; 2]);
        slots.into_iter().for_each(|slot| bench.engine.detach(slot));
        assert_eq!(Arc::strong_count(&file), 1);
    }
}

#[test]
fn an_engine_that_is_dropped_lets_go_of_everything() {
    for mut bench in benches() {
        let folder = Folder::temporary();
        let path = folder.volume(16 << 20);
        let options = OpenOptions { read_only: false, direct: true };
        let slot = bench.engine.attach(OsFiles.open(&path, options).unwrap()).unwrap();
        let dropped = Arc::new(AtomicUsize::new(0));
        for i in 0..100u64 {
            let op = if i % 10 == 9 { FileOp::Sync } else { FileOp::Write { durable: i % 2 == 0 } };
            let mut list = bench.pool.alloc(if op == FileOp::Sync { 0 } else { 4096 }).unwrap();
            list.fill(1);
            let payload = Box::new(Memory { list, dropped: Some(Arc::clone(&dropped)) });
            bench.engine.submit(FileRequest { slot, op, offset: i * 65_536, payload, token: i });
            if i == 70 {
                bench.engine.flush();
            }
        }
        let Bench { engine, mut pool, parker: _parker } = bench;
        drop(engine);
        assert_eq!(dropped.load(Ordering::Relaxed), 100);
        assert!(pool.is_whole());
        // The file can be opened again at once.
        OsFiles.open(&path, options).unwrap();
    }
}

#[test]
fn a_detached_file_can_be_opened_again_at_once() {
    for mut bench in benches() {
        let folder = Folder::temporary();
        let path = folder.volume(65_536);
        for _ in 0..20 {
            let file = OsFiles.open(&path, OpenOptions::default()).unwrap();
            let slot = bench.engine.attach(file).unwrap();
            assert_eq!(bench.run(slot, FileOp::Write { durable: false }, 0, Buffers::heap(512)).0, Ok(()));
            bench.engine.detach(slot);
        }
    }
}

#[test]
fn detaching_a_file_in_use_is_a_bug() {
    for mut bench in benches() {
        let slot = bench.engine.attach(Arc::new(MemoryFile::new(4096))).unwrap();
        bench.submit(slot, FileOp::Read, 0, Buffers::heap(8), 0);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| bench.engine.detach(slot)));
        assert!(result.is_err());
    }
}

#[test]
fn a_file_of_another_world_is_refused() {
    struct Elsewhere;
    impl File for Elsewhere {
        fn path(&self) -> &Path {
            Path::new("elsewhere")
        }
        fn source(&self) -> Source {
            Source::Virtual(1)
        }
        fn info(&self) -> FileInfo {
            MemoryFile::new(0).info()
        }
        fn bytes(&self) -> io::Result<u64> {
            Ok(0)
        }
    }
    for mut bench in benches() {
        assert!(bench.engine.attach(Arc::new(Elsewhere)).is_err());
    }
}

#[test]
fn engines_say_what_they_are() {
    let mode = |choice| Bench::new(|region, parker| os_engine(choice, region, parker)).map(|b| b.engine.mode());
    assert_eq!(mode(EngineChoice::Threads).unwrap(), "4 threads");
    let auto = mode(EngineChoice::Auto).unwrap();
    match Bench::uring(Mode::Plain, false) {
        Ok(bench) => {
            // Whether buffers can be registered depends on what else this user has locked at the moment.
            assert!(auto.starts_with("io_uring, "), "{auto}");
            assert!(mode(EngineChoice::Uring).unwrap().starts_with("io_uring, "));
            assert_eq!(bench.engine.mode(), "io_uring, plain, registered files");
        }
        Err(_) => {
            assert_eq!(auto, "4 threads");
            let error = mode(EngineChoice::Uring).unwrap_err();
            assert!(error.to_string().contains("io_uring cannot be used"), "{error}");
        }
    }
}

/// A loop device over a file, where the test may make one.
struct Loop(PathBuf);

impl Loop {
    fn over(path: &Path) -> Option<Loop> {
        let out = std::process::Command::new("losetup").args(["--find", "--show"]).arg(path).output().ok()?;
        let name = String::from_utf8(out.stdout).ok()?;
        (out.status.success() && !name.trim().is_empty()).then(|| Loop(PathBuf::from(name.trim())))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

#[test]
fn block_devices_work_like_files() {
    let folder = Folder::temporary();
    let path = folder.volume(2 << 20);
    let Some(device) = Loop::over(&path) else {
        eprintln!("skipped: this user may not make a loop device");
        return;
    };
    for mut bench in benches() {
        for direct in [false, true] {
            let options = OpenOptions { read_only: false, direct };
            let file = OsFile::open(&device.0, options).unwrap();
            let info = file.info();
            assert_eq!((info.bytes, info.block_device, info.direct), (2 << 20, true, direct));
            assert_eq!(info.io_unit, if direct { 512 } else { 1 });
            assert!(!info.discard_zeroes && info.volatile_cache);
            assert_eq!(OsFile::open(&device.0, options).unwrap_err().kind(), io::ErrorKind::ResourceBusy);
            let slot = bench.engine.attach(Arc::new(file)).unwrap();
            let mut list = bench.pool.alloc(65_536).unwrap();
            list.fill(5);
            let (result, list) = bench.run(slot, FileOp::Write { durable: true }, 0, list);
            assert_eq!(result, Ok(()));
            bench.pool.put(list);
            for (at, may_unmap) in [(0, false), (8192, true)] {
                let zero = FileOp::WriteZeroes { len: 8192, may_unmap };
                assert_eq!(bench.run(slot, zero, at, Buffers::new()).0, Ok(()));
            }
            if info.discard {
                assert_eq!(bench.run(slot, FileOp::Discard { len: 16_384 }, 32_768, Buffers::new()).0, Ok(()));
            }
            assert_eq!(bench.run(slot, FileOp::Sync, 0, Buffers::new()).0, Ok(()));
            assert_eq!(bench.read(slot, 0, 16_384), [0; 16_384]);
            assert_eq!(bench.read(slot, 16_384, 16_384), [5; 16_384]);
            // Past the end there is nothing, and nothing can be put there.
            let beyond = bench.run(slot, FileOp::Read, 2 << 20, Buffers::heap(4096)).0;
            assert_eq!(beyond, Err(Errno(libc::EIO)));
            let beyond = bench.run(slot, FileOp::Write { durable: false }, 2 << 20, Buffers::heap(4096)).0;
            assert_eq!(beyond, Err(Errno(libc::ENOSPC)));
            bench.engine.detach(slot);
        }
    }
}
