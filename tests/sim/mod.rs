//! A disk whose power can be cut and whose operations can fail.
//!
//! It keeps apart what a living process sees and what is sure to survive. A power cut decides about everything
//! in between, as freely as [`Disk`] allows:
//!
//! ```text
//! a write without a sync of its file       each sector of 512 bytes on its own: as before, written, or zeros
//! the length without a sync of the file    as before, as written, or at a sector's boundary between
//! a name made, renamed, removed without    there or not, whatever became of the changes before and after it;
//! a sync of its directory                  a rename is one change
//! ```
//!
//! Real disks are kinder; whoever survives this one survives them. Not modelled: damage to what was synced,
//! links and renames between directories, and two processes at once.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::rc::{Rc, Weak};

use roptim::checkpoint::{Disk, Kind};

pub(crate) const SECTOR: usize = 512;

/// A generator of pseudo-random numbers (SplitMix64): the same seed gives the same case everywhere.
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// Below `n`; the bias of the remainder does not matter here.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub(crate) fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn of<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len())]
    }
}

/// What a power cut makes of a sector of an unsynced write.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Sector {
    Before,
    Written,
    Zeros,
}

const SECTORS: [Sector; 3] = [Sector::Before, Sector::Written, Sector::Zeros];

/// Who decides what survives a power cut.
pub(crate) trait Fate {
    /// A number below `n`.
    fn choose(&mut self, n: usize) -> usize;

    /// What becomes of a write that touches `n` sectors.
    fn write(&mut self, n: usize) -> Vec<Sector>;
}

impl Fate for Rng {
    fn choose(&mut self, n: usize) -> usize {
        self.below(n)
    }

    fn write(&mut self, n: usize) -> Vec<Sector> {
        // The even forms by name: sector by sector they would hardly ever come up in a long write.
        let torn_at = match self.below(6) {
            0 => return vec![Sector::Before; n],
            1 => return vec![Sector::Zeros; n],
            2 => n,
            3 => self.below(n + 1),
            _ => return (0..n).map(|_| self.of(&SECTORS)).collect(),
        };
        let rest = self.of(&[Sector::Before, Sector::Zeros]);
        (0..n).map(|i| if i < torn_at { Sector::Written } else { rest }).collect()
    }
}

/// Every possible fate, one after the other.
#[derive(Default)]
pub(crate) struct Every {
    /// The choices of this round with their numbers of alternatives.
    choices: Vec<(usize, usize)>,
    used: usize,
}

impl Every {
    /// Goes on to the next fate; false after the last.
    pub(crate) fn advance(&mut self) -> bool {
        self.used = 0;
        while let Some((choice, n)) = self.choices.pop() {
            if choice + 1 < n {
                self.choices.push((choice + 1, n));
                return true;
            }
        }
        false
    }
}

impl Fate for Every {
    fn choose(&mut self, n: usize) -> usize {
        if self.used == self.choices.len() {
            self.choices.push((0, n));
        }
        let (choice, alternatives) = self.choices[self.used];
        assert_eq!(alternatives, n, "the same choices lead to the same questions");
        self.used += 1;
        choice
    }

    fn write(&mut self, n: usize) -> Vec<Sector> {
        (0..n).map(|_| SECTORS[self.choose(SECTORS.len())]).collect()
    }
}

/// What a disk does other than it must, so that the tests show that they would notice.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Sabotage {
    None,
    /// `sync` does nothing.
    NoSync,
    /// `sync_directory` does nothing.
    NoDirectorySync,
    /// `sync` happens only after the rename, with `sync_directory`.
    SyncAfterRename,
    /// What is written goes straight into the file of this name.
    InPlace(&'static str),
    /// `rename` removes its target first.
    RenameInTwo,
    /// `remove_abandoned` does nothing.
    NoSweep,
    /// `remove` does nothing.
    NoRemoval,
    /// A failing `write` reports success.
    NoWriteErrors,
    /// A write that took only the start of the bytes reports all of them.
    NoShortWrites,
}

/// What goes wrong at an operation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Wrong {
    /// The operation fails and does nothing, except that a failing write may leave some of its bytes.
    Error(io::ErrorKind),
    /// The device fails (EIO), for which the standard library has no kind.
    Device,
    /// One byte is written or read; other operations are as ever.
    Short,
    /// No byte is written or read; other operations are as ever.
    Nothing,
}

impl Wrong {
    fn error(self) -> Option<io::Error> {
        match self {
            Self::Error(kind) => Some(kind.into()),
            Self::Device => Some(io::Error::other("input/output error")),
            Self::Short | Self::Nothing => None,
        }
    }
}

/// Which operations go wrong: those from `from` until before `until`, counted from the start.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fault {
    pub(crate) wrong: Wrong,
    pub(crate) from: usize,
    pub(crate) until: usize,
}

#[derive(Debug, Clone)]
struct Write {
    at: usize,
    bytes: Vec<u8>,
}

#[derive(Debug, Clone, Default)]
struct File {
    live: Vec<u8>,
    durable: Vec<u8>,
    unsynced: Vec<Write>,
    /// Lives as long as the process that writes it.
    holder: Weak<()>,
    sync_failed: bool,
}

impl File {
    fn sync(&mut self) {
        self.durable.clone_from(&self.live);
        self.unsynced.clear();
    }

    /// The contents after a power cut.
    fn survivor(&self, fate: &mut impl Fate) -> Vec<u8> {
        let mut bytes = self.durable.clone();
        let most = self.unsynced.iter().map(|write| write.at + write.bytes.len()).max().unwrap_or(0);
        bytes.resize(most.max(bytes.len()), 0);
        for Write { at, bytes: written } in &self.unsynced {
            let end = at + written.len();
            let sectors = at / SECTOR..end.div_ceil(SECTOR);
            for (sector, outcome) in sectors.clone().zip(fate.write(sectors.len())) {
                let range = (sector * SECTOR).max(*at)..((sector + 1) * SECTOR).min(end);
                match outcome {
                    Sector::Before => {}
                    Sector::Written => bytes[range.clone()].copy_from_slice(&written[range.start - at..range.end - at]),
                    Sector::Zeros => bytes[range].fill(0),
                }
            }
        }
        let (low, high) = (self.durable.len().min(self.live.len()), self.durable.len().max(self.live.len()));
        if low < high {
            let mut lengths = vec![low, high];
            lengths.extend((low / SECTOR + 1..high.div_ceil(SECTOR)).map(|sector| sector * SECTOR));
            bytes.resize(lengths[fate.choose(lengths.len())], 0);
        } else {
            bytes.resize(low, 0);
        }
        bytes
    }
}

#[derive(Debug, Clone)]
enum Node {
    Directory,
    Link(PathBuf),
    File(File),
}

type Names = BTreeMap<PathBuf, usize>;

/// A change of a directory's names.
#[derive(Debug, Clone)]
enum Change {
    Made(PathBuf, usize),
    Renamed(PathBuf, PathBuf, usize),
    Removed(PathBuf),
}

impl Change {
    fn directory(&self) -> Option<&Path> {
        let (Self::Made(path, _) | Self::Renamed(_, path, _) | Self::Removed(path)) = self;
        path.parent()
    }

    fn apply(&self, names: &mut Names) {
        match self {
            Self::Made(path, node) => drop(names.insert(path.clone(), *node)),
            Self::Renamed(from, to, node) => {
                names.remove(from);
                names.insert(to.clone(), *node);
            }
            Self::Removed(path) => drop(names.remove(path)),
        }
    }
}

#[derive(Debug)]
struct State {
    nodes: Vec<Node>,
    /// What a living process sees.
    live: Names,
    durable: Names,
    /// Not yet durable, in order.
    changes: Vec<Change>,
    /// Temporary files ever made, for their names.
    made: usize,
    /// Changing operations until the power goes.
    left: Option<usize>,
    off: bool,
    /// Bytes of a read or write, at most.
    portion: usize,
    sabotage: Sabotage,
    /// For [`Sabotage::SyncAfterRename`].
    late: Vec<usize>,
    fault: Option<Fault>,
    operations: usize,
    failed: Vec<&'static str>,
    misuse: Option<String>,
}

/// The disk; a clone is the same disk.
#[derive(Debug, Clone)]
pub(crate) struct SimDisk(Rc<RefCell<State>>);

impl SimDisk {
    /// An empty disk with these directories.
    pub(crate) fn new(sabotage: Sabotage, directories: &[&str]) -> Self {
        let state = State {
            nodes: vec![Node::Directory],
            live: directories.iter().map(|&path| (path.into(), 0)).collect(),
            durable: directories.iter().map(|&path| (path.into(), 0)).collect(),
            changes: Vec::new(),
            made: 0,
            left: None,
            off: false,
            portion: usize::MAX,
            sabotage,
            late: Vec::new(),
            fault: None,
            operations: 0,
            failed: Vec::new(),
            misuse: None,
        };
        Self(Rc::new(RefCell::new(state)))
    }

    fn put_node(&self, path: &str, node: Node) {
        let state = &mut *self.0.borrow_mut();
        state.nodes.push(node);
        for names in [&mut state.live, &mut state.durable] {
            names.insert(path.into(), state.nodes.len() - 1);
        }
    }

    /// Puts a durable file.
    pub(crate) fn put(&self, path: &str, bytes: &[u8]) {
        self.put_node(path, Node::File(File { live: bytes.into(), durable: bytes.into(), ..File::default() }));
    }

    /// Puts a durable link.
    pub(crate) fn put_link(&self, path: &str, to: &str) {
        self.put_node(path, Node::Link(to.into()));
    }

    /// The contents that a living process sees, links not followed.
    pub(crate) fn contents(&self, path: impl AsRef<Path>) -> Option<Vec<u8>> {
        let state = self.0.borrow();
        match &state.nodes[*state.live.get(path.as_ref())?] {
            Node::File(file) => Some(file.live.clone()),
            _ => None,
        }
    }

    /// Reads and writes take at most `portion` bytes.
    pub(crate) fn portion(&self, portion: usize) {
        self.0.borrow_mut().portion = portion;
    }

    /// The power goes after this many more changing operations: from then on every operation fails.
    pub(crate) fn cut_after(&self, changes: usize) {
        self.0.borrow_mut().left = Some(changes);
    }

    pub(crate) fn is_off(&self) -> bool {
        self.0.borrow().off
    }

    /// Cuts the power, if it is not off already, and starts again with what is left of the disk.
    pub(crate) fn restart(&self, fate: &mut impl Fate) {
        let state = &mut *self.0.borrow_mut();
        let mut names = std::mem::take(&mut state.durable);
        for change in state.changes.drain(..) {
            if fate.choose(2) == 1 {
                change.apply(&mut names);
            }
        }
        for node in names.values().copied().collect::<BTreeSet<_>>() {
            if let Node::File(file) = &mut state.nodes[node] {
                let bytes = if file.unsynced.is_empty() && file.live.len() == file.durable.len() {
                    std::mem::take(&mut file.durable)
                } else {
                    file.survivor(fate)
                };
                *file = File { live: bytes.clone(), durable: bytes, ..File::default() };
            }
        }
        state.live.clone_from(&names);
        state.durable = names;
        state.late.clear();
        (state.left, state.off) = (None, false);
    }

    /// The same disk in the same state, on its own from here.
    pub(crate) fn copy(&self) -> Self {
        let state = self.0.borrow();
        Self(Rc::new(RefCell::new(State {
            nodes: state.nodes.clone(),
            live: state.live.clone(),
            durable: state.durable.clone(),
            changes: state.changes.clone(),
            late: state.late.clone(),
            failed: state.failed.clone(),
            misuse: state.misuse.clone(),
            ..*state
        })))
    }

    /// Counts operations from zero and lets these go wrong.
    pub(crate) fn fail(&self, fault: Fault) {
        let state = &mut *self.0.borrow_mut();
        (state.operations, state.fault) = (0, Some(fault));
        state.failed.clear();
    }

    /// Nothing goes wrong any more. Returns the operations that did.
    pub(crate) fn heal(&self) -> Vec<&'static str> {
        let state = &mut *self.0.borrow_mut();
        state.fault = None;
        std::mem::take(&mut state.failed)
    }

    /// Operations since [`fail`](Self::fail), or in all.
    pub(crate) fn operations(&self) -> usize {
        self.0.borrow().operations
    }

    /// What the protocol must never do, if it was done.
    pub(crate) fn misuse(&self) -> Option<String> {
        self.0.borrow().misuse.clone()
    }

    /// Temporary files of saves in a directory.
    pub(crate) fn temporaries(&self, directory: &str) -> Vec<String> {
        let names = self.0.borrow().names(directory.as_ref());
        names.into_iter().filter(|name| name.starts_with(".roptim-") && name.ends_with(".tmp")).collect()
    }
}

impl State {
    /// Starts an operation; says what is wrong with it short of failing.
    fn start(&mut self, name: &'static str, changes: bool) -> io::Result<Option<Wrong>> {
        if changes && self.left.is_some_and(|left| left == 0) {
            self.off = true;
        }
        if self.off {
            return Err(io::Error::other("the power is off"));
        }
        if let (true, Some(left)) = (changes, &mut self.left) {
            *left -= 1;
        }
        let number = self.operations;
        self.operations += 1;
        match self.fault {
            Some(Fault { wrong, from, until }) if (from..until).contains(&number) => {
                self.failed.push(name);
                wrong.error().map_or(Ok(Some(wrong)), Err)
            }
            _ => Ok(None),
        }
    }

    fn node(&self, path: &Path) -> io::Result<usize> {
        self.live.get(path).copied().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn file(&mut self, node: usize) -> &mut File {
        match &mut self.nodes[node] {
            Node::File(file) => file,
            other => panic!("{other:?} is no file"),
        }
    }

    fn change(&mut self, change: Change) {
        change.apply(&mut self.live);
        self.changes.push(change);
    }

    fn names(&self, directory: &Path) -> Vec<String> {
        let here = self.live.keys().filter(|path| path.parent() == Some(directory));
        here.filter_map(|path| Some(path.file_name()?.to_str()?.to_owned())).collect()
    }

    fn misused(&mut self, what: String) {
        self.misuse.get_or_insert(what);
    }
}

/// A file being written, held by this process.
pub(crate) struct SimFile {
    node: usize,
    _held: Rc<()>,
}

pub(crate) struct SimReader {
    disk: SimDisk,
    node: usize,
    at: usize,
}

impl Read for SimReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let state = &mut *self.disk.0.borrow_mut();
        let wrong = state.start("read", false)?;
        let most = match wrong {
            Some(Wrong::Nothing) => 0,
            Some(Wrong::Short) => 1,
            _ => state.portion,
        };
        let left = &state.file(self.node).live[self.at..];
        let count = left.len().min(buffer.len()).min(most);
        buffer[..count].copy_from_slice(&left[..count]);
        self.at += count;
        Ok(count)
    }
}

impl Disk for SimDisk {
    type File = SimFile;
    type Reader = SimReader;
    type Directory = PathBuf;
    type Permissions = ();

    fn kind(&self, path: &Path) -> io::Result<Option<Kind>> {
        let state = &mut *self.0.borrow_mut();
        state.start("kind", false)?;
        Ok(state.live.get(path).map(|&node| match &state.nodes[node] {
            Node::Directory => Kind::Directory,
            Node::Link(_) => Kind::Link,
            Node::File(_) => Kind::File,
        }))
    }

    fn read_link(&self, path: &Path) -> io::Result<PathBuf> {
        let state = &mut *self.0.borrow_mut();
        state.start("read_link", false)?;
        match &state.nodes[state.node(path)?] {
            Node::Link(to) => Ok(to.clone()),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn permissions(&self, path: &Path) -> io::Result<()> {
        let state = &mut *self.0.borrow_mut();
        state.start("permissions", false)?;
        state.node(path).map(drop)
    }

    fn create_directory(&self, path: &Path) -> io::Result<()> {
        let state = &mut *self.0.borrow_mut();
        state.start("create_directory", true)?;
        for names in [&mut state.live, &mut state.durable] {
            names.entry(path.into()).or_insert(0);
        }
        Ok(())
    }

    fn directory(&self, path: &Path) -> io::Result<PathBuf> {
        let state = &mut *self.0.borrow_mut();
        state.start("directory", false)?;
        state.node(path).map(|_| path.into())
    }

    fn sync_directory(&self, directory: &PathBuf) -> io::Result<()> {
        let state = &mut *self.0.borrow_mut();
        state.start("sync_directory", true)?;
        for node in std::mem::take(&mut state.late) {
            state.file(node).sync();
        }
        if state.sabotage == Sabotage::NoDirectorySync {
            return Ok(());
        }
        for change in std::mem::take(&mut state.changes) {
            if change.directory() == Some(directory) {
                change.apply(&mut state.durable);
            } else {
                state.changes.push(change);
            }
        }
        Ok(())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let state = &mut *self.0.borrow_mut();
        state.start("list", false)?;
        state.node(path)?;
        Ok(state.names(path))
    }

    fn create(&self, directory: &Path, prefix: &str, suffix: &str, _: Option<()>) -> io::Result<(SimFile, PathBuf)> {
        let state = &mut *self.0.borrow_mut();
        state.start("create", true)?;
        state.node(directory)?;
        state.made += 1;
        let path = directory.join(format!("{prefix}{:06}{suffix}", state.made));
        let held = Rc::new(());
        let node = match state.sabotage {
            // Another name of the target, which is emptied.
            Sabotage::InPlace(target) if state.live.contains_key(Path::new(target)) => state.node(target.as_ref())?,
            _ => {
                state.nodes.push(Node::File(File::default()));
                state.nodes.len() - 1
            }
        };
        let file = state.file(node);
        file.live.clear();
        file.holder = Rc::downgrade(&held);
        state.change(Change::Made(path.clone(), node));
        Ok((SimFile { node, _held: held }, path))
    }

    fn write(&self, file: &mut SimFile, bytes: &[u8]) -> io::Result<usize> {
        let state = &mut *self.0.borrow_mut();
        let outcome = state.start("write", true);
        let most = match &outcome {
            // An operation that was interrupted did nothing; of what was refused some may stand in the file.
            Err(error) if state.off || error.kind() == io::ErrorKind::Interrupted => 0,
            Err(_) => bytes.len() / 2,
            Ok(Some(Wrong::Nothing)) => 0,
            Ok(Some(Wrong::Short)) => 1,
            Ok(_) => state.portion,
        };
        let written = &bytes[..bytes.len().min(most)];
        let (sabotage, node) = (state.sabotage, state.file(file.node));
        if !written.is_empty() {
            node.unsynced.push(Write { at: node.live.len(), bytes: written.into() });
            node.live.extend_from_slice(written);
        }
        match outcome {
            Err(error) if sabotage != Sabotage::NoWriteErrors => Err(error),
            Ok(_) if sabotage != Sabotage::NoShortWrites => Ok(written.len()),
            _ => Ok(bytes.len()),
        }
    }

    fn sync(&self, file: &mut SimFile) -> io::Result<()> {
        let state = &mut *self.0.borrow_mut();
        if state.file(file.node).sync_failed {
            state.misused("a sync that had failed was tried again".into());
        }
        if let Err(error) = state.start("sync", true) {
            state.file(file.node).sync_failed = error.kind() != io::ErrorKind::Interrupted;
            return Err(error);
        }
        match state.sabotage {
            Sabotage::NoSync => {}
            Sabotage::SyncAfterRename => state.late.push(file.node),
            _ => state.file(file.node).sync(),
        }
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let state = &mut *self.0.borrow_mut();
        state.start("rename", true)?;
        assert_eq!(from.parent(), to.parent(), "renames between directories are not modelled");
        let node = state.node(from)?;
        if state.file(node).sync_failed {
            state.misused("a file whose sync had failed was put in place".into());
        }
        if state.sabotage == Sabotage::RenameInTwo && state.live.contains_key(to) {
            state.change(Change::Removed(to.into()));
        }
        state.change(Change::Renamed(from.into(), to.into(), node));
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let state = &mut *self.0.borrow_mut();
        state.start("remove", true)?;
        state.node(path)?;
        if state.sabotage != Sabotage::NoRemoval {
            state.change(Change::Removed(path.into()));
        }
        Ok(())
    }

    fn remove_abandoned(&self, path: &Path) -> io::Result<()> {
        let state = &mut *self.0.borrow_mut();
        state.start("remove_abandoned", true)?;
        let node = state.node(path)?;
        let abandoned = matches!(&state.nodes[node], Node::File(file) if file.holder.strong_count() == 0);
        if abandoned && state.sabotage != Sabotage::NoSweep {
            state.change(Change::Removed(path.into()));
        }
        Ok(())
    }

    fn open(&self, path: &Path) -> io::Result<(SimReader, u64)> {
        let state = &mut *self.0.borrow_mut();
        state.start("open", false)?;
        let mut path = path.to_owned();
        loop {
            let node = state.node(&path)?;
            match &state.nodes[node] {
                Node::Directory => return Err(io::ErrorKind::InvalidInput.into()),
                Node::Link(to) => path = path.parent().map_or(to.clone(), |parent| parent.join(to)),
                Node::File(file) => {
                    return Ok((SimReader { disk: self.clone(), node, at: 0 }, file.live.len() as u64));
                }
            }
        }
    }
}
