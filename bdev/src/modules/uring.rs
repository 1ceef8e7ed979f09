//! Regular files and block devices.
//!
//! File I/O goes through the reactor's engine: io_uring, or blocking threads where the kernel refuses that. The methods
//! of both names that scripts know, `bdev_uring_*` and `bdev_aio_*`, make the same device; only what it is called
//! differs.
//!
//! | operation | file | block device |
//! |---|---|---|
//! | flush | fdatasync | fdatasync: the device's cache too |
//! | write, FUA | write with RWF_DSYNC | the same |
//! | unmap | punches a hole, which reads as zeroes | discard, which promises nothing |
//! | write zeroes | fallocate, or written by the engine | the same; with FUA followed by fdatasync |
//!
//! Direct I/O is used where the file allows it in units of the block size; the log and `bdev_get_bdevs` say when it is
//! not. A file that has become shorter than the device fails what lies beyond its end; `*_rescan` takes the new size.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use reactor::file::{Errno as HostErrno, File, FileInfo, FileOp, FileSlot, OpenOptions};
use schema::{ConfigEntry, Errno, Kind, Method, Param, Params, RpcError, code};
use serde_json::{Value, json};
use uuid::Uuid;

use super::Module;
use super::common::{check_size, device_as, rpc_delete, take_uuid, whole_blocks};
use crate::conformance::{Spec, Subject};
use crate::core::{
    Bdev, BdevError, BdevInfo, BdevSystem, ChannelCx, Geometry, Io, IoChannel, IoCx, IoStatus, NewBdev, Op, OpKind,
    OpSet,
};

/// How long a file that is locked is waited for.
const LOCK_PATIENCE: Duration = Duration::from_secs(3);
/// How often it is tried meanwhile.
const LOCK_PERIOD: Duration = Duration::from_millis(20);

/// The module.
pub const MODULE: Module =
    Module { name: "uring", methods: METHODS, subjects: &[URING_SUBJECT, AIO_SUBJECT, PLAIN_SUBJECT], examine: None };

/// Under which methods a device was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavor {
    /// `bdev_uring_*`.
    Uring,
    /// `bdev_aio_*`.
    Aio,
}

impl Flavor {
    fn product(self) -> &'static str {
        match self {
            Flavor::Uring => "URING bdev",
            Flavor::Aio => "AIO disk",
        }
    }

    fn create_method(self) -> &'static str {
        match self {
            Flavor::Uring => "bdev_uring_create",
            Flavor::Aio => "bdev_aio_create",
        }
    }
}

/// How to make one.
#[derive(Clone, Debug)]
pub struct FileOptions {
    /// Under which methods.
    pub flavor: Flavor,
    /// The file or block device.
    pub path: PathBuf,
    /// Bytes in a block; `None`: the block device's own, 512 for a file.
    pub block_size: Option<u32>,
    /// Refuse writes.
    pub read_only: bool,
    /// Whether unmap and native write-zeroes are offered; `None`: if the file can.
    pub fallocate: Option<bool>,
}

struct FileBdev {
    options: FileOptions,
    block_size: u32,
    num_blocks: AtomicU64,
    /// Until the device is removed.
    file: Mutex<Option<Arc<dyn File>>>,
    info: FileInfo,
}

impl FileBdev {
    fn file(&self) -> io::Result<Arc<dyn File>> {
        let file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.clone().ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the bdev has been removed"))
    }

    fn allocates(&self) -> bool {
        !self.options.read_only && self.options.fallocate != Some(false)
    }
}

impl Bdev for FileBdev {
    fn product_name(&self) -> &'static str {
        self.options.flavor.product()
    }

    fn geometry(&self) -> Geometry {
        let mut geometry = Geometry::new(self.block_size, self.num_blocks.load(Ordering::Acquire));
        geometry.physical_block_size = self.info.physical_block.max(self.block_size);
        geometry.volatile_cache = self.info.volatile_cache;
        geometry.unmap_zeroes = self.info.discard_zeroes;
        geometry.read_only = self.options.read_only;
        geometry
    }

    fn native_ops(&self) -> OpSet {
        let mut ops = OpSet::of(&[OpKind::Read, OpKind::Flush]);
        if !self.options.read_only {
            ops = ops.with(OpKind::Write);
        }
        if self.allocates() && self.info.discard {
            ops = ops.with(OpKind::Unmap);
        }
        if self.allocates() && self.info.write_zeroes {
            ops = ops.with(OpKind::WriteZeroes);
        }
        ops
    }

    fn open_channel(&self, cx: &mut ChannelCx<'_>) -> io::Result<Box<dyn IoChannel>> {
        let slot = cx.attach_file(self.file()?)?;
        let path = self.options.path.clone();
        Ok(Box::new(FileChannel { slot, block_size: self.block_size.into(), path, errors: 0 }))
    }

    fn removed(&self) {
        self.file.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    fn driver_specific(&self) -> Value {
        let filename = self.options.path.to_string_lossy();
        let native = self.native_ops();
        match self.options.flavor {
            Flavor::Uring => json!({ "uring": { "filename": filename, "direct": self.info.direct } }),
            Flavor::Aio => json!({
                "aio": {
                    "filename": filename,
                    "block_size_override": self.options.block_size.is_some(),
                    "readonly": self.options.read_only,
                    "fallocate": native.contains(OpKind::Unmap),
                    "direct": self.info.direct,
                }
            }),
        }
    }

    fn config(&self, info: &BdevInfo) -> Vec<ConfigEntry> {
        let mut params = json!({
            "name": info.name(),
            "filename": self.options.path.to_string_lossy(),
            "block_size": self.block_size,
            "uuid": info.uuid().to_string(),
        });
        if self.options.flavor == Flavor::Aio {
            params["readonly"] = json!(self.options.read_only);
            if let Some(fallocate) = self.options.fallocate {
                params["fallocate"] = json!(fallocate);
            }
        }
        vec![ConfigEntry::new(self.options.flavor.create_method(), params)]
    }
}

struct FileChannel {
    slot: FileSlot,
    block_size: u64,
    path: PathBuf,
    /// Operations that the host failed; the log shows the first and then ever fewer.
    errors: u64,
}

impl IoChannel for FileChannel {
    #[inline]
    fn submit(&mut self, io: Io, cx: &mut IoCx<'_>) {
        let len = io.blocks().saturating_mul(self.block_size);
        let op = match io.op() {
            Op::Read => FileOp::Read,
            Op::Write { fua } => FileOp::Write { durable: fua },
            Op::Flush => FileOp::Sync,
            Op::Unmap => FileOp::Discard { len },
            Op::WriteZeroes { may_unmap, .. } => FileOp::WriteZeroes { len, may_unmap },
            // Not among the native operations.
            Op::Compare | Op::CompareAndWrite { .. } | Op::Copy { .. } | Op::Reset => {
                return cx.complete(io, IoStatus::NotSupported);
            }
        };
        let offset = if op == FileOp::Sync { 0 } else { io.lba() * self.block_size };
        cx.submit_file(self.slot, op, offset, io);
    }

    fn file_done(&mut self, mut io: Io, result: Result<(), HostErrno>, cx: &mut IoCx<'_>) {
        let op = io.op();
        match result {
            Ok(()) if matches!(op, Op::WriteZeroes { fua: true, .. }) => {
                // The host has no durable way of zeroing; it is made so.
                io.set_op(Op::Flush);
                cx.submit_file(self.slot, FileOp::Sync, 0, io);
            }
            Ok(()) => cx.complete(io, IoStatus::Success),
            Err(errno) => {
                self.errors += 1;
                if self.errors.is_power_of_two() {
                    tracing::error!(
                        file = %self.path.display(),
                        op = op.kind().name(),
                        lba = io.lba(),
                        blocks = io.blocks(),
                        errors = self.errors,
                        "file I/O failed: {errno}"
                    );
                }
                cx.complete(io, IoStatus::from_errno(errno.0, op.kind()));
            }
        }
    }

    fn close(&mut self, cx: &mut ChannelCx<'_>) {
        cx.detach_file(self.slot);
    }
}

/// Opens the file, and waits a while for one that is locked: the kernel ends the I/O of a server that was killed after its
/// process is gone, and keeps its files until then. The server that is started in its place must not stumble over them.
async fn open_patiently(system: &BdevSystem, options: &FileOptions) -> Result<(Arc<dyn File>, u32), BdevError> {
    let mut waited = Duration::ZERO;
    loop {
        match open(system, options) {
            Err(BdevError::Host { source, .. })
                if source.kind() == io::ErrorKind::ResourceBusy && waited < LOCK_PATIENCE =>
            {
                system.executor().sleep(LOCK_PERIOD).await;
                waited += LOCK_PERIOD;
            }
            other => return other,
        }
    }
}

/// Opens the file, directly where that fits the block size.
fn open(system: &BdevSystem, options: &FileOptions) -> Result<(Arc<dyn File>, u32), BdevError> {
    let files = system.platform().files();
    let path = &options.path;
    let how = |direct| OpenOptions { read_only: options.read_only, direct };
    let opened = |direct| files.open(path, how(direct)).map_err(|error| BdevError::host("opening the file", error));
    let file = opened(true)?;
    let info = file.info();
    let own = if info.block_device { info.io_unit.max(512) } else { 512 };
    let block_size = options.block_size.unwrap_or(own);
    if !info.direct {
        tracing::info!(file = %path.display(), "the file does not allow direct I/O; the page cache is used");
    } else if info.io_unit > block_size {
        tracing::info!(
            file = %path.display(),
            "direct I/O needs units of {} bytes, more than a block of {block_size}; the page cache is used",
            info.io_unit
        );
        // Closed first: it is locked.
        drop(file);
        return Ok((opened(false)?, block_size));
    }
    Ok((file, block_size))
}

/// Whole blocks in `bytes` bytes of `path`; the rest is ignored, and that is said.
fn blocks_in(path: &Path, bytes: u64, block_size: u32) -> u64 {
    let rest = bytes % u64::from(block_size);
    if rest != 0 {
        tracing::warn!(
            file = %path.display(),
            "its {bytes} bytes are no whole number of {block_size}-byte blocks; the last {rest} bytes are not used"
        );
    }
    whole_blocks(bytes, block_size)
}

/// Creates and registers a device on a file or block device.
///
/// # Errors
/// [`BdevError::Host`] when the file cannot be opened; [`BdevError::Invalid`] for a block size that cannot be served or a
/// file shorter than a block; as [`BdevSystem::register`].
pub async fn create(
    system: &BdevSystem,
    name: &str,
    uuid: Option<Uuid>,
    options: FileOptions,
) -> Result<Arc<BdevInfo>, BdevError> {
    if let Some(block_size) = options.block_size {
        check_size(block_size, 1)?;
    }
    let (file, block_size) = open_patiently(system, &options).await?;
    let info = file.info();
    let num_blocks = blocks_in(&options.path, info.bytes, block_size);
    if num_blocks == 0 {
        let reason = format!("the file has {} bytes, less than one block of {block_size}", info.bytes);
        return Err(BdevError::invalid("filename", options.path.display(), reason));
    }
    check_size(block_size, num_blocks)?;
    let device =
        FileBdev { options, block_size, num_blocks: AtomicU64::new(num_blocks), file: Mutex::new(Some(file)), info };
    if device.options.fallocate == Some(true) && !device.native_ops().contains(OpKind::Unmap) {
        let reason = "the file cannot give back space, or is read-only";
        return Err(BdevError::invalid("fallocate", true, reason));
    }
    system.register(NewBdev { name: name.to_string(), uuid, aliases: Vec::new(), device: Arc::new(device) }).await
}

/// Takes the file's present size.
///
/// # Errors
/// [`BdevError::NotFound`], [`BdevError::WrongKind`]; [`BdevError::Host`] when the size cannot be read;
/// [`BdevError::Invalid`] when it is less than a block.
pub async fn rescan(system: &BdevSystem, name: &str, flavor: Flavor) -> Result<(), BdevError> {
    let info = system.get(name)?;
    if info.device().product_name() != flavor.product() {
        return Err(BdevError::wrong_kind(&info, flavor.product()));
    }
    let device = device_as::<FileBdev>(&info, flavor.product())?;
    let bytes = device
        .file()
        .and_then(|file| file.bytes())
        .map_err(|error| BdevError::host("reading the file's size", error))?;
    let num_blocks = blocks_in(&device.options.path, bytes, device.block_size);
    if num_blocks == 0 {
        let reason = format!("its file has {bytes} bytes, less than one block of {}", device.block_size);
        return Err(BdevError::invalid("name", name, reason));
    }
    check_size(device.block_size, num_blocks)?;
    if device.num_blocks.swap(num_blocks, Ordering::AcqRel) == num_blocks {
        return Ok(());
    }
    system.resized(&info).await
}

const NAME: Param = Param::required("name", Kind::Str, "Name of the bdev").at_least(1);
const FILENAME: Param =
    Param::required("filename", Kind::Str, "Path of a regular file or block device").at_least(1).at_most(4096);
const BLOCK_SIZE: Param = Param::optional(
    "block_size",
    Kind::U32,
    "Bytes in a block, a power of two from 512 to 65536; when left out, the block device's own, 512 for a file",
);
const UUID: Param = Param::optional("uuid", Kind::Uuid, "UUID of the bdev; drawn at random when left out");

const METHODS: &[Method<BdevSystem>] = &[
    Method::new("bdev_uring_create", "Create a bdev on a file or block device.", |s, p| {
        Box::pin(rpc_create(s, p, Flavor::Uring))
    })
    .params(&[FILENAME, NAME, BLOCK_SIZE, UUID])
    .mutates()
    .refuses_with(code::INTERNAL_ERROR)
    .result("name of the bdev"),
    Method::new("bdev_uring_rescan", "Take the present size of a bdev's file.", |s, p| {
        Box::pin(rpc_rescan(s, p, Flavor::Uring))
    })
    .params(&[Param::required("name", Kind::Str, "Name of the bdev")])
    .mutates()
    .refuses_with(code::INTERNAL_ERROR),
    Method::new("bdev_uring_delete", "Delete a bdev; its file stays.", |s, p| {
        Box::pin(rpc_delete(s, p, Flavor::Uring.product()))
    })
    .params(&[Param::required("name", Kind::Str, "Name of the bdev")])
    .mutates()
    .refuses_with(code::INTERNAL_ERROR),
    Method::new(
        "bdev_aio_create",
        "Create a bdev on a file or block device, under the name that scripts know.",
        |s, p| Box::pin(rpc_create(s, p, Flavor::Aio)),
    )
    .params(&[
        NAME,
        FILENAME,
        BLOCK_SIZE,
        Param::optional("readonly", Kind::Bool, "Refuse writes; false when left out"),
        Param::optional(
            "fallocate",
            Kind::Bool,
            "Offer unmap and write zeroes by the file; when left out, if the file can",
        ),
        UUID,
        Param::optional("nowait", Kind::Bool, "Accepted, without effect: no file I/O blocks a reactor").deprecated(),
    ])
    .mutates()
    .refuses_with(code::INTERNAL_ERROR)
    .result("name of the bdev"),
    Method::new("bdev_aio_rescan", "Take the present size of a bdev's file.", |s, p| {
        Box::pin(rpc_rescan(s, p, Flavor::Aio))
    })
    .params(&[Param::required("name", Kind::Str, "Name of the bdev")])
    .mutates()
    .refuses_with(code::INTERNAL_ERROR),
    Method::new("bdev_aio_delete", "Delete a bdev; its file stays.", |s, p| {
        Box::pin(rpc_delete(s, p, Flavor::Aio.product()))
    })
    .params(&[Param::required("name", Kind::Str, "Name of the bdev")])
    .mutates()
    .refuses_with(code::INTERNAL_ERROR),
];

async fn rpc_create(system: Arc<BdevSystem>, params: Params, flavor: Flavor) -> Result<Value, RpcError> {
    let options = FileOptions {
        flavor,
        path: PathBuf::from(params.str("filename")?),
        block_size: params.opt_u32("block_size").filter(|&size| size != 0),
        read_only: params.opt_bool("readonly").unwrap_or(false),
        fallocate: params.opt_bool("fallocate"),
    };
    let uuid = take_uuid(&params)?;
    let info = create(&system, params.str("name")?, uuid, options).await.map_err(|error| match error {
        BdevError::Host { .. } => {
            let error = RpcError::from(error);
            let fix = match error.code() {
                code if code == -Errno::NOENT.0 => "create it first, for instance with truncate -s 1G",
                code if code == -Errno::ACCES.0 => "let the server's user read and write it",
                code if code == -Errno::BUSY.0 => "close it there, or choose another file",
                _ => "choose a regular file or block device that the server may use",
            };
            params.blame("filename", error.fix(fix))
        }
        other => other.into(),
    })?;
    Ok(json!(info.name()))
}

async fn rpc_rescan(system: Arc<BdevSystem>, params: Params, flavor: Flavor) -> Result<Value, RpcError> {
    rescan(&system, params.str("name")?, flavor).await?;
    Ok(json!(true))
}

const URING_SUBJECT: Subject = Subject {
    label: "uring",
    block_sizes: &[512, 4096],
    forgets: false,
    make: |system, spec| conformance_make(system, spec, Flavor::Uring, None),
    resize: Some(|system, spec, blocks| conformance_resize(system, spec, blocks, Flavor::Uring)),
};

const AIO_SUBJECT: Subject = Subject {
    label: "aio",
    block_sizes: &[4096],
    forgets: false,
    make: |system, spec| conformance_make(system, spec, Flavor::Aio, None),
    resize: Some(|system, spec, blocks| conformance_resize(system, spec, blocks, Flavor::Aio)),
};

/// Without what the file can do besides reading and writing.
const PLAIN_SUBJECT: Subject = Subject {
    label: "aio-without-fallocate",
    block_sizes: &[512],
    forgets: false,
    make: |system, spec| conformance_make(system, spec, Flavor::Aio, Some(false)),
    resize: None,
};

fn conformance_make(
    system: Arc<BdevSystem>,
    spec: Spec,
    flavor: Flavor,
    fallocate: Option<bool>,
) -> BoxFuture<'static, Result<Vec<String>, BdevError>> {
    Box::pin(async move {
        let path = spec.folder.join(&spec.name);
        let bytes = spec.num_blocks * u64::from(spec.block_size);
        let files = system.platform().files();
        match files.create(&path, bytes) {
            Ok(()) => {}
            // Left by an earlier check: emptied, so that it reads as zeroes again.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let emptied = files.set_len(&path, 0).and_then(|()| files.set_len(&path, bytes));
                emptied.map_err(|error| BdevError::host("emptying the file", error))?;
            }
            Err(error) => return Err(BdevError::host("creating the file", error)),
        }
        let options = FileOptions { flavor, path, block_size: Some(spec.block_size), read_only: false, fallocate };
        create(&system, &spec.name, None, options).await?;
        Ok(vec![spec.name])
    })
}

fn conformance_resize(
    system: Arc<BdevSystem>,
    spec: Spec,
    blocks: u64,
    flavor: Flavor,
) -> BoxFuture<'static, Result<(), BdevError>> {
    Box::pin(async move {
        let set = system.platform().files().set_len(&spec.folder.join(&spec.name), blocks * u64::from(spec.block_size));
        set.map_err(|error| BdevError::host("resizing the file", error))?;
        rescan(&system, &spec.name, flavor).await
    })
}
