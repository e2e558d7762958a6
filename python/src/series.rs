//! Checkpoints of a run: snapshots of values, and the directory they are saved in.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use pyo3::prelude::*;
use roptim::Error;
use roptim::checkpoint::{OsDisk, Tree};

use crate::arrays::Taking;
use crate::errors::{OrRaise, guarded, raise};
use crate::files::{Reporter, from_tree, to_tree};

/// A tree of values; copied, what happens to the arrays later does not change it.
#[pyclass(frozen, module = "roptim._roptim")]
pub(crate) struct Snapshot {
    pub(crate) tree: Tree,
}

#[pymethods]
impl Snapshot {
    #[new]
    fn new(object: &Bound<'_, PyAny>, place: &str, copied: bool) -> PyResult<Self> {
        let taking = if copied { Taking::Copied } else { Taking::Lent };
        Ok(Self { tree: to_tree(object, place, "obj", taking)? })
    }
}

/// A step and what was saved at it.
type Found<'py> = Option<(u64, Bound<'py, PyAny>)>;

/// A directory of checkpoints by step.
#[pyclass(frozen, module = "roptim._roptim")]
pub(crate) struct Series {
    series: roptim::checkpoint::Series,
    place: &'static str,
}

#[pymethods]
impl Series {
    #[new]
    fn new(py: Python<'_>, directory: PathBuf, keep: Option<NonZeroUsize>) -> PyResult<Self> {
        let place = "roptim.Checkpointer";
        let open = || guarded(place, || roptim::checkpoint::Series::open(OsDisk, directory, keep));
        Ok(Self { series: py.detach(open).or_raise(py)?, place })
    }

    /// Steps that have a file.
    fn steps(&self, py: Python<'_>) -> PyResult<Vec<u64>> {
        py.detach(|| guarded(self.place, || self.series.steps())).or_raise(py)
    }

    /// The file of a step.
    fn path(&self, step: u64) -> PathBuf {
        self.series.path(step)
    }

    /// Saves a step; returns files set aside because they are damaged, and errors of old ones that stayed.
    fn save(
        &self,
        py: Python<'_>,
        step: u64,
        snapshot: &Snapshot,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<(Vec<PathBuf>, Vec<String>)> {
        let mut reporter = Reporter::new(progress);
        let saved = py.detach(|| {
            guarded(self.place, || {
                self.series.save(step, &snapshot.tree, &mut |done, total| reporter.report(done, total))
            })
        });
        let saved = reporter.outcome(py, saved)?;
        Ok((saved.set_aside, saved.kept.iter().map(Error::to_string).collect()))
    }

    /// What was saved at a step.
    fn load<'py>(&self, py: Python<'py>, step: u64, progress: Option<Py<PyAny>>) -> PyResult<Bound<'py, PyAny>> {
        let mut reporter = Reporter::new(progress);
        let tree = py
            .detach(|| guarded(self.place, || self.series.load(step, &mut |done, total| reporter.report(done, total))));
        from_tree(py, reporter.outcome(py, tree)?)
    }

    /// Step and values of the newest readable checkpoint, and the errors of newer ones that are not.
    fn latest<'py>(&self, py: Python<'py>, progress: Option<Py<PyAny>>) -> PyResult<(Found<'py>, Vec<String>)> {
        let mut reporter = Reporter::new(progress);
        let mut damaged = Vec::new();
        let found = py.detach(|| {
            guarded(self.place, || {
                self.series.latest(&mut |done, total| reporter.report(done, total), &mut |error| {
                    damaged.push(error.to_string());
                })
            })
        });
        let found = reporter.outcome(py, found)?;
        let found = found.map(|(step, tree)| Ok::<_, PyErr>((step, from_tree(py, tree)?))).transpose()?;
        Ok((found, damaged))
    }

    /// Removes the checkpoints of later steps; returns which.
    fn discard_after(&self, py: Python<'_>, step: u64) -> PyResult<Vec<u64>> {
        py.detach(|| guarded(self.place, || self.series.discard_after(step))).or_raise(py)
    }
}

/// What is in a file, the checksum it states, the one its contents give, and its bytes.
#[pyfunction]
pub(crate) fn examine<'py>(py: Python<'py>, path: PathBuf) -> PyResult<(Bound<'py, PyAny>, String, String, u64)> {
    let place = "roptim inspect";
    let seen = py.detach(|| guarded(place, || roptim::checkpoint::examine(path)));
    let seen = seen.map_err(|error| raise(py, &error))?;
    Ok((from_tree(py, seen.tree)?, seen.stated, seen.found, seen.len))
}
