//! The checkpoints of one run: a directory with a file for each saved step.

use std::collections::BTreeMap;
use std::io;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::commit::{Progress, failed, retried};
use super::disk::{Disk, OsDisk};
use super::read::{load_from, seems_whole};
use super::tree::Tree;
use super::write::save_to;
use crate::error::{Error, ErrorKind, Result};

const PREFIX: &str = "step-";
const SUFFIX: &str = ".safetensors";
/// Marks a file that could not be read when a later run needed its place in the order.
const DAMAGED: &str = ".damaged";

/// A directory of checkpoints by step: `step-00000100.safetensors`, `step-00000200.safetensors` …
///
/// Every file is written by [`save`](super::save)'s protocol, and none that is in place is ever written to, so
/// a crash at any moment leaves the checkpoints that were there, or these and the new one.
///
/// ```
/// use roptim::checkpoint::{OsDisk, Series, Tree};
///
/// # let directory = tempfile::tempdir().unwrap();
/// # let directory = directory.path().join("run");
/// let series = Series::open(OsDisk, &directory, std::num::NonZeroUsize::new(3))?;
/// series.save(100, &Tree::dict([("epoch", Tree::Int(1))]), &mut |_, _| Ok(()))?;
/// let newest = series.latest(&mut |_, _| Ok(()), &mut |_| ())?;
/// assert_eq!(newest, Some((100, Tree::dict([("epoch", Tree::Int(1))]))));
/// # Ok::<(), roptim::Error>(())
/// ```
#[derive(Debug)]
pub struct Series<D: Disk = OsDisk> {
    disk: D,
    directory: PathBuf,
    keep: Option<NonZeroUsize>,
    /// Steps whose files were written or looked at, and whether they are whole.
    seen: Mutex<BTreeMap<u64, bool>>,
}

/// What a save did besides saving.
#[derive(Debug, Default)]
pub struct Saved {
    /// Damaged files of later steps, renamed out of the way.
    pub set_aside: Vec<PathBuf>,
    /// Why old checkpoints are still there: each that could not be removed, or that none could be looked for.
    pub kept: Vec<Error>,
}

impl<D: Disk> Series<D> {
    /// The series in a directory, which is made if it is absent. `keep` of the newest checkpoints stay, all of
    /// them without it.
    pub fn open(disk: D, directory: impl Into<PathBuf>, keep: Option<NonZeroUsize>) -> Result<Self> {
        let directory = directory.into();
        retried(|| disk.create_directory(&directory)).map_err(failed(&directory, "the directory could not be made"))?;
        Ok(Self { disk, directory, keep, seen: Mutex::default() })
    }

    /// The file of a step.
    pub fn path(&self, step: u64) -> PathBuf {
        self.directory.join(format!("{PREFIX}{step:08}{SUFFIX}"))
    }

    /// Steps that have a file, in ascending order, whatever is in it.
    pub fn steps(&self) -> Result<Vec<u64>> {
        let names = retried(|| self.disk.list(&self.directory))
            .map_err(failed(&self.directory, "the directory could not be read"))?;
        let mut steps: Vec<u64> = names.iter().filter_map(|name| step_of(name)).collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// Saves a step, then removes the oldest beyond `keep`.
    ///
    /// A step may be saved again. One that lies before the newest checkpoint is refused, since
    /// [`latest`](Series::latest) would not find it: see [`discard_after`](Series::discard_after). Later files
    /// that are damaged do not count; they are renamed to `….damaged`. Nor do those found
    /// damaged, or of a wrong length, count among those that stay.
    pub fn save(&self, step: u64, tree: &Tree, progress: Progress<'_>) -> Result<Saved> {
        let mut saved = Saved::default();
        for later in self.steps()?.into_iter().filter(|&later| later > step) {
            let path = self.path(later);
            match load_from(&self.disk, &path, &mut super::commit::silent) {
                Ok(_) => {
                    let place = self.directory.display();
                    let error = Error::refuse(
                        ErrorKind::Value,
                        place,
                        "step",
                        format!("at least {later}, the newest checkpoint's"),
                        step,
                    );
                    return Err(error.with_remedy(format!("discard_after({step}) removes what is newer")));
                }
                Err(error) if is_absent(&error) => {}
                Err(error) if is_damage(&error) => saved.set_aside.push(self.set_aside(&path)?),
                Err(error) => return Err(error),
            }
        }
        save_to(&self.disk, &self.path(step), tree, progress)?;
        self.seen().insert(step, true);
        if let Some(keep) = self.keep {
            // The step is saved; what goes wrong with the old ones does not make that untrue.
            saved.kept = self.prune(step, keep.get()).unwrap_or_else(|error| vec![error]);
        }
        Ok(saved)
    }

    /// Removes what is older than the `keep` newest whole checkpoints up to `newest`, which counts as one of them;
    /// returns what could not be removed.
    fn prune(&self, newest: u64, keep: usize) -> Result<Vec<Error>> {
        let (mut kept, mut surplus) = (1, Vec::new());
        for old in self.steps()?.into_iter().rev().filter(|&old| old < newest) {
            if kept >= keep {
                surplus.push(old);
            } else if self.is_whole(old) {
                // A damaged one takes nobody's place.
                kept += 1;
            }
        }
        self.seen().retain(|step, _| !surplus.contains(step));
        // The oldest first: whoever reads meanwhile finds the newest.
        Ok(surplus.into_iter().rev().filter_map(|old| self.remove(old).err()).collect())
    }

    /// Whether a step's file was found whole, or has the form and length of one that is.
    fn is_whole(&self, step: u64) -> bool {
        let known = self.seen().get(&step).copied();
        known.unwrap_or_else(|| {
            let whole = seems_whole(&self.disk, &self.path(step));
            self.seen().insert(step, whole);
            whole
        })
    }

    fn seen(&self) -> MutexGuard<'_, BTreeMap<u64, bool>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Renames a damaged file; returns the new name, which nothing had before.
    fn set_aside(&self, path: &Path) -> Result<PathBuf> {
        let failed = |what| failed(path, what);
        let mut number = 1;
        loop {
            let mut aside = path.as_os_str().to_owned();
            aside.push(if number == 1 { DAMAGED.into() } else { format!("{DAMAGED}-{number}") });
            let aside = PathBuf::from(aside);
            let taken = retried(|| self.disk.kind(&aside)).map_err(failed("its place aside could not be examined"))?;
            if taken.is_none() {
                retried(|| self.disk.rename(path, &aside)).map_err(failed("the damaged file could not be renamed"))?;
                return Ok(aside);
            }
            number += 1;
        }
    }

    /// What was saved at a step.
    pub fn load(&self, step: u64, progress: Progress<'_>) -> Result<Tree> {
        let loaded = load_from(&self.disk, &self.path(step), progress);
        match &loaded {
            Ok(_) => drop(self.seen().insert(step, true)),
            Err(error) if is_damage(error) => drop(self.seen().insert(step, false)),
            Err(_) => {}
        }
        loaded
    }

    /// The newest checkpoint that can be read, and its step; nothing where none was ever saved.
    ///
    /// `damaged` is told of each newer one that cannot. If none can, that is an error: to begin anew then
    /// would lose the run.
    pub fn latest(&self, progress: Progress<'_>, damaged: &mut dyn FnMut(Error)) -> Result<Option<(u64, Tree)>> {
        // Again where another process removed all that was there meanwhile. What is listed a second time and cannot
        // be found is no such thing but damage: a link to nothing.
        let mut before = Vec::new();
        loop {
            let steps = self.steps()?;
            let again = steps == before;
            let mut last = None;
            for &step in steps.iter().rev() {
                match self.load(step, progress) {
                    Ok(tree) => return Ok(Some((step, tree))),
                    Err(error) if is_absent(&error) && !again => {}
                    Err(error) if unreadable(&error) => {
                        last = Some(error.to_string());
                        damaged(error);
                    }
                    Err(error) => return Err(error),
                }
            }
            match last {
                None if steps.is_empty() => return Ok(None),
                None => before = steps,
                Some(last) => {
                    let place = self.directory.display();
                    let error = Error::refuse(ErrorKind::File, place, "a checkpoint", "readable", "none that is");
                    let remedy = format!("restore one from a copy, or remove the damaged ones to begin anew ({last})");
                    return Err(error.with_remedy(remedy));
                }
            }
        }
    }

    /// Removes the checkpoints of all later steps, to go on from an earlier one; returns which.
    pub fn discard_after(&self, step: u64) -> Result<Vec<u64>> {
        let mut later = self.steps()?;
        later.retain(|&later| later > step);
        // The newest first: whatever a killed process leaves is a series without holes.
        later.reverse();
        later.iter().try_for_each(|&later| self.remove(later))?;
        // Without this a power cut could bring them back, and the newest again be one that was discarded. Also where
        // there was nothing to remove: the call before may have failed here.
        retried(|| self.disk.directory(&self.directory))
            .and_then(|directory| retried(|| self.disk.sync_directory(&directory)))
            .map_err(failed(
                &self.directory,
                "the checkpoints are removed, but flushing their directory to disk failed",
            ))?;
        Ok(later)
    }

    fn remove(&self, step: u64) -> Result<()> {
        let path = self.path(step);
        match retried(|| self.disk.remove(&path)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(failed(&path, "the old checkpoint could not be removed")(error))
            }
            _ => Ok(()),
        }
    }
}

/// The step that a file is named for.
fn step_of(name: &str) -> Option<u64> {
    let digits = name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?;
    let step = digits.parse().ok()?;
    // Only names as `path` makes them: no sign, no more zeros.
    (format!("{step:08}") == digits).then_some(step)
}

fn is_absent(error: &Error) -> bool {
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref::<io::Error>());
    source.is_some_and(|source| source.kind() == io::ErrorKind::NotFound)
}

fn unreadable(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::File | ErrorKind::Io)
}

/// Whether a file is beyond reading, now and later: what a system merely refuses, as for want of a permission, may
/// be whole.
fn is_damage(error: &Error) -> bool {
    // A medium that failed, and links that lead in a circle.
    #[cfg(unix)]
    let lost = [libc::EIO, libc::ELOOP];
    #[cfg(not(unix))]
    let lost = [];
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref::<io::Error>());
    let beyond = |source: &io::Error| {
        // What is no regular file was not written by a save.
        source.kind() == io::ErrorKind::InvalidInput || source.raw_os_error().is_some_and(|code| lost.contains(&code))
    };
    error.kind() == ErrorKind::File || source.is_some_and(beyond)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_names_it_gives_are_steps() {
        let series = Series { disk: OsDisk, directory: "run".into(), keep: None, seen: Mutex::default() };
        for step in [0, 1, 99_999_999, 100_000_000, u64::MAX] {
            let path = series.path(step);
            assert_eq!(step_of(path.file_name().unwrap().to_str().unwrap()), Some(step));
        }
        for name in
            ["step-1.safetensors", "step-000000001.safetensors", "step-+0000001.safetensors", "step-.safetensors"]
        {
            assert_eq!(step_of(name), None);
        }
        assert_eq!(step_of("step-00000001.safetensors.damaged"), None);
        assert_eq!(series.path(1), Path::new("run/step-00000001.safetensors"));
    }
}
