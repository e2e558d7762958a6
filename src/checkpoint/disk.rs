//! What writer and reader ask of a file system, so that tests can put a failing one in its place.

use std::fs::{self, File};
use std::io::{self, Read, Write as _};
use std::path::{Path, PathBuf};

/// What a path names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Link,
    /// A device, pipe or socket.
    Other,
}

/// A file system, as far as checkpoints need one.
///
/// Durability has three rules: what was written to a file survives a power cut once [`sync`](Disk::sync) has
/// returned; a new name, a rename or a removal does once [`sync_directory`](Disk::sync_directory) has; and a
/// rename is seen either whole or not at all. Nothing else is relied on.
///
/// An operation that gives [`ErrorKind::Interrupted`](io::ErrorKind::Interrupted) did nothing and is tried
/// again.
pub trait Disk {
    /// A file being written.
    type File;
    /// A file being read.
    type Reader: Read;
    /// A directory whose entries can be made durable.
    type Directory;
    /// What may be done with a file by whom.
    type Permissions: Clone;

    /// What is at a path, links not followed; nothing where there is nothing.
    fn kind(&self, path: &Path) -> io::Result<Option<Kind>>;

    /// Where a link points.
    fn read_link(&self, path: &Path) -> io::Result<PathBuf>;

    /// Of an existing file.
    fn permissions(&self, path: &Path) -> io::Result<Self::Permissions>;

    /// Makes a directory and those above it, durably; one that exists is fine.
    fn create_directory(&self, path: &Path) -> io::Result<()>;

    /// Opens a directory.
    fn directory(&self, path: &Path) -> io::Result<Self::Directory>;

    /// Makes the entries of a directory durable.
    fn sync_directory(&self, directory: &Self::Directory) -> io::Result<()>;

    /// Names in a directory.
    fn list(&self, path: &Path) -> io::Result<Vec<String>>;

    /// Makes a new file with a name of its own between `prefix` and `suffix`, held by this process: see
    /// [`remove_abandoned`](Disk::remove_abandoned). Without permissions it has those of any new file.
    fn create(
        &self,
        directory: &Path,
        prefix: &str,
        suffix: &str,
        permissions: Option<Self::Permissions>,
    ) -> io::Result<(Self::File, PathBuf)>;

    /// Writes the start of `bytes`; returns how many.
    fn write(&self, file: &mut Self::File, bytes: &[u8]) -> io::Result<usize>;

    /// Makes a file's contents durable.
    fn sync(&self, file: &mut Self::File) -> io::Result<()>;

    /// Gives a file another name, whose file it replaces.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Removes a file of [`create`](Disk::create), unless a living process holds it.
    fn remove_abandoned(&self, path: &Path) -> io::Result<()>;

    /// Opens a file for reading, and its length. What is not a regular file is refused.
    fn open(&self, path: &Path) -> io::Result<(Self::Reader, u64)>;
}

/// The operating system's file system.
#[derive(Debug, Clone, Copy, Default)]
pub struct OsDisk;

/// A directory that is open where the system can flush it.
#[derive(Debug)]
pub struct OsDirectory {
    #[cfg(unix)]
    handle: File,
}

impl Disk for OsDisk {
    type File = File;
    type Reader = File;
    type Directory = OsDirectory;
    type Permissions = fs::Permissions;

    fn kind(&self, path: &Path) -> io::Result<Option<Kind>> {
        match fs::symlink_metadata(path) {
            Ok(facts) if facts.is_symlink() => Ok(Some(Kind::Link)),
            Ok(facts) if facts.is_file() => Ok(Some(Kind::File)),
            Ok(facts) if facts.is_dir() => Ok(Some(Kind::Directory)),
            Ok(_) => Ok(Some(Kind::Other)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn read_link(&self, path: &Path) -> io::Result<PathBuf> {
        fs::read_link(path)
    }

    fn permissions(&self, path: &Path) -> io::Result<fs::Permissions> {
        Ok(fs::metadata(path)?.permissions())
    }

    fn create_directory(&self, path: &Path) -> io::Result<()> {
        if path.is_dir() {
            return Ok(());
        }
        let parent = parent(path);
        // A root, the empty path and a working directory that is gone have nothing above them.
        if parent != path {
            self.create_directory(parent)?;
        }
        match fs::create_dir(path) {
            // Somebody else was faster.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
            outcome => outcome?,
        }
        self.sync_directory(&self.directory(parent)?)
    }

    #[cfg(unix)]
    fn directory(&self, path: &Path) -> io::Result<OsDirectory> {
        Ok(OsDirectory { handle: File::open(path)? })
    }

    #[cfg(unix)]
    fn sync_directory(&self, directory: &OsDirectory) -> io::Result<()> {
        match directory.handle.sync_all() {
            // Some network file systems know no flush of a directory; there is nothing more to ask for.
            Err(error) if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => Ok(()),
            outcome => outcome,
        }
    }

    // Elsewhere directories cannot be flushed by the standard library; the rename is atomic all the same.
    #[cfg(not(unix))]
    fn directory(&self, path: &Path) -> io::Result<OsDirectory> {
        fs::metadata(path).map(|_| OsDirectory {})
    }

    #[cfg(not(unix))]
    fn sync_directory(&self, _: &OsDirectory) -> io::Result<()> {
        Ok(())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        // What is not UTF-8 was not named by this library.
        fs::read_dir(path)?
            .filter_map(|entry| entry.map(|entry| entry.file_name().into_string().ok()).transpose())
            .collect()
    }

    fn create(
        &self,
        directory: &Path,
        prefix: &str,
        suffix: &str,
        permissions: Option<fs::Permissions>,
    ) -> io::Result<(File, PathBuf)> {
        const TRIES: usize = 16;
        // A forked process has its parent's source of random names, so the number of the process is in them.
        let prefix = format!("{prefix}{}-", std::process::id());
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix).suffix(suffix);
        // From the first moment no wider than in the end; the umask narrows it where the file is new.
        #[cfg(unix)]
        builder.permissions(permissions.clone().unwrap_or_else(|| {
            use std::os::unix::fs::PermissionsExt as _;
            fs::Permissions::from_mode(0o666)
        }));
        for _ in 0..TRIES {
            let temporary = builder.tempfile_in(directory)?;
            // Held while it is open: whoever sweeps takes what is free of locks for abandoned. Where the system
            // has no locks nobody sweeps.
            let held = matches!(temporary.as_file().try_lock(), Err(fs::TryLockError::WouldBlock));
            if held || !is_at(temporary.as_file(), temporary.path()) {
                // Swept between its making and its lock.
                continue;
            }
            if let Some(permissions) = permissions {
                temporary.as_file().set_permissions(permissions)?;
            }
            return temporary.keep().map_err(|error| error.error);
        }
        Err(io::Error::other("temporary files are removed as soon as they are made"))
    }

    fn write(&self, file: &mut File, bytes: &[u8]) -> io::Result<usize> {
        file.write(bytes)
    }

    fn sync(&self, file: &mut File) -> io::Result<()> {
        file.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn remove_abandoned(&self, path: &Path) -> io::Result<()> {
        if self.kind(path)? != Some(Kind::File) {
            return Ok(());
        }
        let mut options = fs::OpenOptions::new();
        // What somebody may have put there since it was looked at is neither followed nor waited for.
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NOFOLLOW | libc::O_NONBLOCK);
        // For writing, as network file systems ask of whoever locks; what was to replace a read-only file opens for
        // reading alone.
        let file = options.write(true).open(path).or_else(|_| options.write(false).read(true).open(path))?;
        // The lock is kept until the name is gone. What had the name may have been renamed since it was opened, and
        // somebody else's file have it now.
        if file.try_lock().is_ok() && is_at(&file, path) { fs::remove_file(path) } else { Ok(()) }
    }

    fn open(&self, path: &Path) -> io::Result<(File, u64)> {
        // Before opening: to open a pipe would wait for its other end.
        if !fs::metadata(path)?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
        }
        let file = File::open(path)?;
        let len = file.metadata()?.len();
        Ok((file, len))
    }
}

/// Whether an open file is what a path names.
#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let identity = |facts: fs::Metadata| (facts.dev(), facts.ino());
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(opened), Ok(named)) => identity(opened) == identity(named),
        _ => false,
    }
}

/// Elsewhere files have no identity in the standard library, and an open one keeps its name.
#[cfg(not(unix))]
fn is_at(_: &File, path: &Path) -> bool {
    path.exists()
}

/// The directory that a file's name stands in.
pub(super) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        // The root has no parent, and is its own directory.
        None => path,
        _ => Path::new("."),
    }
}
