//! The commit: bytes to disk, so that a crash at any moment leaves the old file or the new one.

use std::io;
use std::path::{Path, PathBuf};

use super::disk::{Disk, Kind, parent};
use crate::error::{Error, ErrorKind, Result};

/// Marks temporary files as ours, for whoever cleans up after a crash.
const TEMPORARY_PREFIX: &str = ".roptim-";
const TEMPORARY_SUFFIX: &str = ".tmp";

/// Bytes that are written or read between two calls of a [`Progress`], and at most at once.
pub(super) const PORTION: usize = 8 << 20;

/// Called with the bytes done and the bytes in all, after each portion of a file and at its end. An error
/// ends the work; what was there before is untouched then.
pub type Progress<'p> = &'p mut dyn FnMut(u64, u64) -> Result<()>;

/// Counts bytes, and reports them now and then.
pub(super) struct Meter<'p> {
    done: u64,
    total: u64,
    progress: Progress<'p>,
}

impl<'p> Meter<'p> {
    pub(super) fn new(total: u64, progress: Progress<'p>) -> Self {
        Self { done: 0, total, progress }
    }

    /// So many more are done.
    pub(super) fn advance(&mut self, len: usize) -> Result<()> {
        let before = self.done / PORTION as u64;
        self.done += len as u64;
        if self.done == self.total || self.done / PORTION as u64 > before {
            (self.progress)(self.done, self.total)?;
        }
        Ok(())
    }
}

/// Bytes that are looked at as soon as they are read or copied: they stay in the cache meanwhile.
pub(super) const PIECE: usize = 1 << 20;

/// No report of progress.
pub(super) fn silent(_: u64, _: u64) -> Result<()> {
    Ok(())
}

/// An operation, again where a signal came in between.
pub(super) fn retried<T>(mut operation: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match operation() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            outcome => return outcome,
        }
    }
}

/// What the system refused, at a path.
pub(super) fn failed<'p>(path: &'p Path, what: &'p str) -> impl FnOnce(io::Error) -> Error + 'p {
    move |source| Error::plain(ErrorKind::Io, format!("{}: {what}: {source}", path.display())).with_source(source)
}

/// A file that is removed unless it is renamed, also by a panic.
struct Temporary<'d, D: Disk> {
    disk: &'d D,
    path: PathBuf,
    finished: bool,
}

impl<D: Disk> Drop for Temporary<'_, D> {
    fn drop(&mut self) {
        if !self.finished {
            // What cannot be removed now is what a later save removes.
            let _ = retried(|| self.disk.remove(&self.path));
        }
    }
}

/// A new file while it is filled.
pub(super) struct Sink<'s, D: Disk> {
    disk: &'s D,
    path: &'s Path,
    file: D::File,
    meter: Meter<'s>,
}

impl<D: Disk> Sink<'_, D> {
    /// Appends all of these bytes.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        for portion in bytes.chunks(PORTION) {
            let mut left = portion;
            while !left.is_empty() {
                let written = match retried(|| self.disk.write(&mut self.file, left)) {
                    Ok(0) => Err(io::Error::from(io::ErrorKind::WriteZero)),
                    outcome => outcome,
                };
                left = &left[written.map_err(failed(self.path, "writing failed"))?..];
            }
            self.meter.advance(portion.len())?;
        }
        Ok(())
    }
}

/// Replaces a file by the `total` bytes that `fill` writes, durably.
///
/// ```text
/// remove what dead processes left    .roptim-*.tmp without a lock
/// create                             .roptim-*.tmp, locked
/// fill, flush                        each write checked
/// rename over the target
/// flush the directory
/// ```
pub(super) fn replace<D: Disk>(
    disk: &D,
    path: &Path,
    total: u64,
    progress: Progress<'_>,
    fill: impl FnOnce(&mut Sink<'_, D>) -> Result<()>,
) -> Result<()> {
    let failed = |what| failed(path, what);
    let target = follow_links(disk, path).map_err(failed("the path could not be followed"))?;
    let existing = match retried(|| disk.kind(&target)).map_err(failed("the target could not be examined"))? {
        None => None,
        Some(Kind::File) => {
            Some(retried(|| disk.permissions(&target)).map_err(failed("the target's permissions could not be read"))?)
        }
        Some(kind) => {
            let got = if kind == Kind::Directory { "a directory" } else { "a device, pipe or socket" };
            return Err(Error::refuse(ErrorKind::Io, path.display(), "the target", "a regular file or absent", got));
        }
    };
    if target.file_name().and_then(|name| name.to_str()).is_some_and(is_temporary) {
        let allowed = format!("named other than {TEMPORARY_PREFIX}…{TEMPORARY_SUFFIX}, which later saves remove");
        let got = target.display();
        return Err(Error::refuse(ErrorKind::Io, path.display(), "the target", allowed, got));
    }
    let directory = parent(&target);
    // Opened before anything is written, so that a directory that cannot be opened leaves the old file.
    let flushed = retried(|| disk.directory(directory)).map_err(failed("the directory could not be opened"))?;
    sweep(disk, directory);
    let (file, temporary) = retried(|| disk.create(directory, TEMPORARY_PREFIX, TEMPORARY_SUFFIX, existing.clone()))
        .map_err(failed("a temporary file could not be made beside it"))?;
    let mut temporary = Temporary { disk, path: temporary, finished: false };
    let mut sink = Sink { disk, path, file, meter: Meter::new(total, progress) };
    fill(&mut sink)?;
    // An error here is final: the system may have dropped what it could not write.
    retried(|| disk.sync(&mut sink.file)).map_err(failed("flushing to disk failed"))?;
    retried(|| disk.rename(&temporary.path, &target)).map_err(failed("the finished file could not be renamed"))?;
    temporary.finished = true;
    retried(|| disk.sync_directory(&flushed))
        .map_err(failed("the file is in place, but flushing its directory to disk failed"))
}

fn is_temporary(name: &str) -> bool {
    name.starts_with(TEMPORARY_PREFIX) && name.ends_with(TEMPORARY_SUFFIX)
}

/// Removes what crashed saves left in a directory; what cannot be removed harms nobody.
fn sweep<D: Disk>(disk: &D, directory: &Path) {
    for name in retried(|| disk.list(directory)).unwrap_or_default().iter().filter(|name| is_temporary(name)) {
        let _ = retried(|| disk.remove_abandoned(&directory.join(name)));
    }
}

/// The place a path names once its last part is no symbolic link, whether or not a file is there.
fn follow_links<D: Disk>(disk: &D, path: &Path) -> io::Result<PathBuf> {
    const LINKS: usize = 40;
    let mut target = path.to_owned();
    for _ in 0..LINKS {
        if retried(|| disk.kind(&target))? != Some(Kind::Link) {
            return Ok(target);
        }
        let next = retried(|| disk.read_link(&target))?;
        target = target.parent().map(|parent| parent.join(&next)).unwrap_or(next);
    }
    Err(io::Error::other("too many symbolic links"))
}
