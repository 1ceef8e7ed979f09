//! What every engine must do, run on each of them, on a memory file system and on a disk, cached and direct.

use super::*;
use crate::buffer::{BufferPool, PoolConfig};
use crate::file::os::OsFiles;
use crate::park::{EpollParker, Ready};

struct Memory(Buffers);

impl Payload for Memory {
    fn buffers(&mut self) -> &mut Buffers {
        &mut self.0
    }
    fn into_any(self: Box<Self>) -> Box<dyn Any + Send> {
        self
    }
}

/// A folder of its own, removed with it.
struct Folder(PathBuf);

impl Folder {
    fn new(parent: &Path) -> Folder {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("ringstone-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = parent.join(name);
        std::fs::create_dir(&path).unwrap();
        Folder(path)
    }

    fn file(&self, bytes: u64) -> PathBuf {
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

/// An engine with the reactor's things that it needs.
struct Bench {
    engine: Box<dyn FileEngine>,
    pool: BufferPool,
    parker: EpollParker,
}

impl Bench {
    fn new(choice: EngineChoice) -> Bench {
        let pool = BufferPool::new(PoolConfig { small: 64, medium: 16, large: 8 }).unwrap();
        let mut parker = EpollParker::new().unwrap();
        let engine = os_engine(choice, pool.region(), &mut parker).unwrap();
        Bench { engine, pool, parker }
    }

    fn submit(&mut self, slot: FileSlot, op: FileOp, offset: u64, memory: Buffers, token: u64) {
        self.engine.submit(FileRequest { slot, op, offset, payload: Box::new(Memory(memory)), token });
    }

    /// Sleeps until the engine has something, as a reactor does.
    fn next(&mut self) -> Vec<FileDone> {
        let mut out = Vec::new();
        self.engine.flush();
        while self.engine.reap(&mut out) == 0 {
            assert!(self.engine.in_flight() > 0);
            let mut ready: Vec<Ready> = Vec::new();
            self.parker.wait(None, &mut ready).unwrap();
        }
        out
    }

    fn run(&mut self, slot: FileSlot, op: FileOp, offset: u64, memory: Buffers) -> (Result<(), Errno>, Buffers) {
        self.submit(slot, op, offset, memory, 77);
        let done = self.next().pop().unwrap();
        assert_eq!(done.token, 77);
        (done.result, done.payload.into_any().downcast::<Memory>().unwrap().0)
    }
}

#[test]
fn what_is_written_is_read() {
    for choice in [EngineChoice::Threads, EngineChoice::Auto] {
        for parent in [std::env::temp_dir(), PathBuf::from("/dev/shm")] {
            for direct in [false, true] {
                let folder = Folder::new(&parent);
                let path = folder.file(1 << 20);
                let mut bench = Bench::new(choice);
                let file = OsFiles.open(&path, OpenOptions { read_only: false, direct }).unwrap();
                let slot = bench.engine.attach(file).unwrap();
                let mut memory = bench.pool.alloc(8192).unwrap();
                memory.fill(7);
                let (result, memory) = bench.run(slot, FileOp::Write { durable: true }, 4096, memory);
                assert_eq!(result, Ok(()));
                let (result, memory) = bench.run(slot, FileOp::Read, 0, memory);
                assert_eq!(result, Ok(()));
                let bytes = memory.to_vec();
                assert!(bytes[..4096].iter().all(|&b| b == 0) && bytes[4096..].iter().all(|&b| b == 7));
                bench.pool.put(memory);
                assert_eq!(bench.run(slot, FileOp::Sync, 0, Buffers::new()).0, Ok(()));
                bench.engine.detach(slot);
            }
        }
    }
}
